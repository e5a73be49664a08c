"""Latents, a generator's training on them and its pictures: against the tokenizer itself, by kills and by shares."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from textok_mini import generate, generator, run, sample, training
from textok_mini.attributes import AttributeReader
from textok_mini.captions import plain
from textok_mini.data import load_data
from textok_mini.images import to_float
from textok_mini.latents import Latents, LatentSpace, main
from textok_mini.own_data import DataError
from textok_mini.recipe import text_encoder
from textok_mini.run import TrainingError, load_run
from textok_mini.settings import config_json, load_config
from textok_mini.tokenizer import TexTok

DATA = ("data.scenes=64", "data.objects=16", "training.sample_every=0")


def save_tokenizer(folder, seed: int = 0, *overrides: str):
    """A run's folder with random weights, whose latents are far from the standard normal."""
    config = load_config("smoke", [*DATA, *overrides])
    torch.manual_seed(seed)
    model = TexTok(config.tokenizer)
    with torch.no_grad():
        model.latent_out.weight.mul_(torch.linspace(1, 40, 8)[:, None])
        model.latent_out.bias.add_(torch.linspace(-30, 30, 8))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_json(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def home(small_home):
    save_tokenizer(small_home / "tokenizer", 0, "tokenizer.latent=plain")
    assert main(["tokenizer=tokenizer", "latents=latents", "captions=1", "batch_size=24"]) == 0
    return small_home


def test_latents_are_the_tokenizers_normalised_once(home):
    rows, (model, config) = Latents("latents"), load_run(home / "tokenizer")
    data = load_data(config.data, "train", 32)
    with torch.no_grad():
        text = text_encoder(config, data.captions, torch.device("cpu"))(data.captions)
        z = model.encode(to_float(data.images(list(range(64)))), text)
    flat = z.double().flatten(0, 1)
    expected = (z - flat.mean(0)) / flat.std(0, correction=0)
    batch = rows.__getitems__(list(range(64)))
    torch.testing.assert_close(batch["latents"], expected.float(), atol=1e-3, rtol=1e-3)
    assert flat.std(0).max() > 5 and flat.mean(0).abs().max() > 5  # or a missing normalisation would go unseen
    torch.testing.assert_close(rows.space.denormalise(batch["latents"]), z, atol=1e-3, rtol=1e-3)
    assert batch["id"] == data.ids and batch["caption"] == data.captions and torch.equal(batch["label"], data.labels)


def test_pictures_of_the_training_latents_are_reconstructions(home, monkeypatch):
    """The classic mistake, whichever way: a generator that gives a row's own latents must give its picture back."""
    train_dit(home / "dit")
    rows, (model, config) = Latents("latents"), load_run(home / "tokenizer")

    def given(model, process, told, nothing, numbers, *_):
        return rows.__getitems__(numbers)["latents"]

    monkeypatch.setattr(sample, "sample_latents", given)
    assert sample.main(["dit=dit", "output=own", "each=2"]) == 0
    lines = [json.loads(line) for line in (home / "own" / "metadata.jsonl").read_text().splitlines()]
    text = text_encoder(config, None, torch.device("cpu"))([line["caption"] for line in lines])
    images = to_float(load_data(config.data, "train", 32).images(list(range(len(lines)))))
    with torch.no_grad():
        own = text_encoder(config, rows.captions, torch.device("cpu"))(rows.captions[: len(lines)])
        expected = ((model.decode(model.encode(images, own), text).clamp(-1, 1) + 1) * 127.5).round()
    found = np.stack([np.asarray(Image.open(home / "own" / line["file_name"])) for line in lines])
    assert np.abs(found.astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_another_tokenizers_latents_are_refused(home):
    space = LatentSpace("latents")
    space.tokenizer()
    with pytest.raises(DataError, match="another tokenizer's"):
        space.tokenizer(save_tokenizer(home / "other", 1, "tokenizer.latent=plain"))
    with pytest.raises(DataError, match=r"python -m textok_mini\.latents"):
        LatentSpace("nowhere")
    assert main(["tokenizer=other", "latents=latents"]) == 2


def test_shards_and_killed_runs_fill_the_same_folder(home, monkeypatch):
    monkeypatch.setattr("textok_mini.latents.ROWS_A_FILE", 20)
    for shard in ("1/2", "0/2"):
        assert main(["tokenizer=tokenizer", "latents=parts", "captions=1", f"shard={shard}"]) == 0
    one, many = Latents("latents"), Latents("parts")
    assert len(many.files) == 4
    whole = list(range(64))
    monkeypatch.setattr("textok_mini.latents.ROWS_A_FILE", 20)
    both = many.__getitems__(whole)["latents"]
    monkeypatch.undo()
    torch.testing.assert_close(both, one.__getitems__(whole)["latents"], atol=1e-5, rtol=1e-5)


def test_a_mirrored_row_is_the_flipped_picture_and_only_where_its_caption_allows(home, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "own"
    lines = [("a cat top left on a red background", True), ("a red kite", False), ("a dog to the right", True)] * 4
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for i, (caption, _) in enumerate(lines):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "caption": caption}) + "\n")
    given = ["tokenizer=tokenizer", f"latents={tmp_path / 'out'}", "captions=0"]
    assert main([*given, f"data={folder}", "data.mirror=true"]) == 0
    rows, (model, config) = Latents(tmp_path / "out"), load_run(home / "tokenizer")
    data = load_data(str(folder), "train", 32)
    free = [i for i, caption in enumerate(data.captions) if caption == "a red kite"]
    assert 0 < len(free) < len(data) and len(rows) == len(data) + len(free)
    assert rows.captions[len(data) :] == ["a red kite"] * len(free)
    images = to_float(data.images(free)).flip(-1)
    with torch.no_grad():
        text = text_encoder(config, None, torch.device("cpu"))(["a red kite"] * len(free))
        expected = rows.space.normalise(model.encode(images, text))
    found = rows.__getitems__(list(range(len(data), len(rows))))["latents"]
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert (found - rows.__getitems__(free)["latents"]).abs().max() > 0.1  # or the flip would go unseen


def test_kept_captions_are_no_trainings(home):
    lists = json.loads((home / "latents" / "captions.json").read_text())
    trained = set(map(plain, Latents("latents").captions))
    assert lists and all(len(texts) == 1 for texts in lists.values())
    assert not trained & {plain(text) for texts in lists.values() for text in texts}
    (home / "mine.json").write_text(json.dumps({name: [Latents("latents").captions[0]] for name in lists}))
    assert sample.main(["dit=dit", "output=mine", "captions=mine.json"]) == 2


def smoke(*overrides):
    dit = ("dit.width=32", "dit.layers=2", "dit.heads=2", "generator.sample_every=0", "generator.checkpoint_every=4")
    return load_config("smoke", [*DATA, *dit, "generator.latents=latents", *overrides])


def train_dit(folder, *overrides):
    if not (folder / "model.safetensors").exists():
        training.train(smoke(*overrides), folder)
    return folder


def contents(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "log.jsonl")]


@pytest.mark.parametrize(
    "settings", [("generator.process=diffusion",), ("dit.condition=text", "generator.process=flow")]
)
def test_a_killed_generator_ends_as_if_it_never_was(home, tmp_path, monkeypatch, settings):
    train_dit(tmp_path / "whole", *settings)
    calls, told = iter(range(100)), generator.GeneratorRecipe.told

    def killed(*given):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return told(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generator.GeneratorRecipe, "told", killed)
        training.train(smoke(*settings), tmp_path / "killed")
    training.train(smoke(*settings), tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_generator_on_two_processes_learns_as_on_one(home, tmp_path):
    settings = ["generator.process=diffusion", "generator.learning_rate=1e-4"]
    train_dit(tmp_path / "one", *settings)
    dit = ["dit.width=32", "dit.layers=2", "dit.heads=2", "generator.sample_every=0", "generator.checkpoint_every=4"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    two += ["textok_mini.train", "smoke", *DATA, *dit, "generator.latents=latents", *settings]
    done = subprocess.run([*two, f"output_dir={tmp_path / 'two'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for a, b in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_dit_of_another_shape_or_with_other_labels_is_one_line(home, tmp_path):
    with pytest.raises(TrainingError, match=r"2 latent tokens of 8 numbers, but dit has 3 of 8"):
        training.train(smoke("dit.num_latent_tokens=3"), tmp_path / "a")
    with pytest.raises(TrainingError, match=r"labels must be 0 to 1"):
        training.train(smoke("dit.num_classes=2"), tmp_path / "b")


def test_pictures_are_the_same_in_any_batch_shard_and_after_a_kill(home, tmp_path):
    train_dit(home / "dit")
    common = ["dit=dit", "each=2", "steps=4"]
    assert sample.main([*common, f"output={tmp_path / 'whole'}", "npz=true"]) == 0
    for shard in ("0/3", "2/3", "1/3"):
        assert not (tmp_path / "parts" / "metadata.jsonl").exists()
        assert sample.main([*common, f"output={tmp_path / 'parts'}", f"shard={shard}", "batch_size=1"]) == 0
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.png"))
    pictures = [[np.asarray(Image.open(tmp_path / f / n)).astype(int) for n in names] for f in ("whole", "parts")]
    assert np.abs(np.stack(pictures[0]) - np.stack(pictures[1])).max() <= 1  # rounding, at a half
    for gone in names[::3]:
        (tmp_path / "whole" / gone).unlink()
    (tmp_path / "whole" / "metadata.jsonl").unlink()
    assert sample.main([*common, f"output={tmp_path / 'whole'}", "npz=true"]) == 0
    again = [np.asarray(Image.open(tmp_path / "whole" / n)).astype(int) for n in names]
    assert np.abs(np.stack(again) - np.stack(pictures[0])).max() <= 1
    packed = np.load(tmp_path / "whole" / "pictures.npz")
    assert (packed["arr_0"] == np.stack(again)).all() and packed["arr_0"].dtype == np.uint8
    rows = load_data(str(tmp_path / "whole"), "train", 32)
    counts = np.bincount(packed["arr_1"])
    assert set(counts[counts > 0]) == {2} and set(rows.label_names) <= set(LatentSpace("latents").meta["label_names"])
    assert sample.main([*common, f"output={tmp_path / 'whole'}", "seed=1"]) == 2  # another folder, or delete this one


def test_a_kept_generator_draws_the_same_pictures(home, tmp_path):
    """Kept in half precision, beside latents of which nothing but latents.json and captions.json is kept."""
    train_dit(home / "dit")
    assert run.main(["keep", "dit", "kept"]) == 0
    weights, half = (load_file(home / name / "model.safetensors") for name in ("dit", "kept"))
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert all(torch.allclose(weights[name], half[name].float(), atol=1e-3, rtol=1e-3) for name in weights)
    (home / "few").mkdir()
    for name in ("latents.json", "captions.json"):
        shutil.copy(home / "latents" / name, home / "few")
    config = json.loads((home / "kept" / "config.json").read_text())
    config["generator"]["latents"] = "few"
    (home / "kept" / "config.json").write_text(json.dumps(config))
    pictures = []
    for name in ("dit", "kept"):
        assert sample.main([f"dit={name}", f"output={name}-pictures", "each=1", "steps=4"]) == 0
        paths = sorted((home / f"{name}-pictures").glob("*.png"))
        pictures.append(np.stack([np.asarray(Image.open(path)).astype(int) for path in paths]))
    assert len(pictures[0]) > 1 and np.abs(pictures[0] - pictures[1]).max() <= 3
    assert run.main(["keep", "nowhere", "kept"]) == 2


def test_prompts_are_drawn_as_they_are_told(home, tmp_path):
    train_dit(home / "told", "dit.condition=text")
    (tmp_path / "prompts.txt").write_text("a cat top left on a red background\n\na dog\n")
    out = tmp_path / "out"
    assert sample.main(["dit=told", f"prompts={tmp_path / 'prompts.txt'}", f"output={out}", "each=2", "steps=2"]) == 0
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == ["a cat top left on a red background"] * 2 + ["a dog"] * 2
    shutil.rmtree(out)


def test_controls_are_told_the_captions_and_have_real_or_random_latents(home):
    rows, seen = Latents("latents"), []
    labels = [int(label) for label in rows.labels[:6]]
    them = SimpleNamespace(decode=lambda x, captions: seen.append((x, captions)) or torch.zeros(len(x), 3, 8, 8))
    pictures = generate.controls(them, rows, labels, list("abcdef"))
    assert {name: (*images.shape, images.dtype) for name, images in pictures.items()} == {
        name: (6, 3, 8, 8, torch.uint8) for name in ("random latent tokens", "another's of its class")
    }
    (random, told), (another, _) = seen
    assert told == list("abcdef") and 0.5 < random.std() < 1.5
    every = rows.__getitems__(list(range(len(rows))))["latents"]
    for x, label in zip(another, labels, strict=True):
        same = (every == x).flatten(1).all(1).nonzero().flatten().tolist()
        assert same and {int(rows.labels[row]) for row in same} == {label}


def test_seen_captions_are_of_the_class_and_of_training_and_the_latents_are_the_pictures_own(home):
    """With a decoder that gives back what it is told: the numbers of the latents, and the captions."""
    rows, told, drawn = Latents("latents"), [], []
    labels = [int(rows.labels[row]) for row in (0, 0, 0, 1, 1)]
    unseen, how = ["one", "two", "one", "three", "three"], sample.Settings("dit", "out", batch_size=2, guidance=3.0)
    them = SimpleNamespace(
        latents=lambda asked, numbers, **given: drawn.append(given) or list(zip(numbers, asked, strict=True)),
        decode=lambda x, captions: told.extend(captions) or torch.full((len(x), 3, 8, 8), x[0][0] / 127.5 - 1),
    )
    pictures = generate.seen(them, rows, labels, unseen, how)
    assert pictures[:, 0, 0, 0].tolist() == [0, 0, 2, 2, 4]  # the batches' first numbers
    assert all(given == how.drawing and given["guidance"] == 3.0 for given in drawn)
    for label in set(labels):
        mine = [text for text, of in zip(told, labels, strict=True) if of == label]
        known = {rows.captions[row] for row in range(len(rows)) if rows.labels[row] == label}
        wanted = len({text for text, of in zip(unseen, labels, strict=True) if of == label})
        assert set(mine) <= known and len(set(mine)) == min(wanted, len(known))


def test_one_command_goes_all_the_way_and_is_judged_on_its_pictures(home, monkeypatch):
    names = sorted(
        {scene.objects[0].name for scene in map(load_data(load_run(home / "tokenizer")[1].data).scene, range(64))}
    )
    torch.manual_seed(0)
    reader = AttributeReader(8, names).eval()
    monkeypatch.setattr(AttributeReader, "of", lambda data, size: reader)
    arguments = [
        "smoke",
        "tokenizer=tokenizer",
        "output_dir=all",
        "sample.each=1",
        "sample.steps=2",
        *DATA,
        "generator.sample_every=0",
    ]
    assert generate.main(arguments) == 0
    results = json.loads((home / "all" / "results.json").read_text())
    rows = load_data(str(home / "all" / "pictures"), "train", 32)
    assert results["pictures"] == len(list((home / "all" / "pictures").glob("*.png")))
    measures = {"kernel_efficientnet_lite0", "precision", "recall"}
    assert set(results["distances"]) >= measures | {f"{name}, seen captions" for name in measures}
    test = load_data(load_run(home / "tokenizer")[1].data, "test", 32)
    real = reader.score(test.images(list(range(len(test)))), test.labels.tolist(), test.captions)
    assert results["shown"]["real"]["place"] == pytest.approx(np.nanmean(real["place"])) and len(rows)
    assert set(results["shown"]) == {
        "generated",
        "real",
        "drawn again",
        "random latent tokens",
        "another's of its class",
    }
    stamps = {path: path.stat().st_mtime_ns for path in (home / "all" / "pictures").glob("*.png")}
    assert generate.main(arguments) == 0  # nothing is done again
    assert stamps == {path: path.stat().st_mtime_ns for path in (home / "all" / "pictures").glob("*.png")}
    assert generate.main(["smoke", "output_dir=all"]) == 2
    for wrong in ("sample.each=none", "sample.colour=red", "unseen=0", "generator.step=1"):  # before anything is made
        assert generate.main(["smoke", "tokenizer=tokenizer", "output_dir=wrong", wrong]) == 2
    assert not (home / "wrong").exists()
