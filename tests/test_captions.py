"""Captions: real architectures without a hub, samples that follow from names alone, and runs that survive anything."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from textok_mini import caption_store, captioner, captions, comparison, hub, own_data
from textok_mini.caption_store import CaptionStore, read_captions
from textok_mini.captioner import Captioner, GumbelMax, licence, trim
from textok_mini.captions import Job, Settings, assert_disjoint, class_captions, main
from textok_mini.config import DataConfig
from textok_mini.data import CaptionedImages, DataError, load_data

KILLS = int(os.environ.get("TEXTOK_MINI_KILLS", "3"))
WORDS = "a dog top left and an owl bottom right on a sky blue background"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def larger_weights(model: torch.nn.Module) -> None:
    """Random weights as they come give nearly the same scores for every word and picture."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The default model's architecture and processor, Qwen3-VL, with few weights, all random."""
    tokenizer = hf.Qwen2Tokenizer().train_new_from_iterator(["describe this picture in one caption"] * 50, 320)
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    _, end, start, stop, image, video = tokenizer.convert_tokens_to_ids(special)
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    looks = hf.Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=pixels)
    processor = hf.Qwen3VLProcessor(looks, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=TEMPLATE)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10_000.0}
    text = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, max_position_embeddings=512)
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=16)
    vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=64)
    ids = dict(image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=stop)
    torch.manual_seed(0)
    model = hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    larger_weights(model)
    model.generation_config.eos_token_id = end
    folder = tmp_path_factory.mktemp("models") / "chat"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def encoder_decoder(folder, seed: int):
    """A ViT that looks and a GPT-2 that writes, as notebook 01 trains them, with random weights."""
    marks = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    words = Tokenizer(WordLevel({w: i for i, w in enumerate([*marks.values(), *sorted(set(WORDS.split()))])}, "[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    look = {"model_type": "vit", "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1}
    look |= {"intermediate_size": 128, "num_attention_heads": 1}
    write = {"model_type": "gpt2", "vocab_size": words.get_vocab_size(), "n_positions": 128, "n_embd": 32} | ends
    write |= {"n_layer": 1, "n_head": 1, "add_cross_attention": True}
    both = hf.VisionEncoderDecoderConfig(encoder=look, decoder=write, decoder_start_token_id=1, pad_token_id=0, **ends)
    torch.manual_seed(seed)
    larger_weights(model := hf.VisionEncoderDecoderModel(both))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    for part in (model, tokenizer, hf.ViTImageProcessor(size=16)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return encoder_decoder(tmp_path_factory.mktemp("models") / "small", seed=1)


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(path, count: int):
    """Pictures of many sizes, some in folders of the folder."""
    for i in range(count):
        name = path / ("more/deep" if i % 3 == 0 else "") / f"{i:02d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        noise(20 + 7 * i % 50, 20 + 11 * i % 40, i).save(name)
    return path


def run(*arguments: str) -> int:
    return main(list(arguments))


def rows_of(store) -> list[tuple]:
    return [(r["file_name"], r["number"], r["caption"]) for r in CaptionStore(store).read()]


# --- captioners ---


SIZES = [(40, 40), (64, 96), (90, 33), (64, 64), (96, 96)]


@pytest.mark.parametrize("number", [0, 1])
def test_batches_and_one_by_one_give_the_same(chat, number, monkeypatch):
    captioner = Captioner(chat, "describe this", words=8, temperature=1.0)
    pictures, names = [noise(*size, i) for i, size in enumerate(SIZES)], list("abcde")
    masks, real = [], captioner.model.generate

    def spy(**inputs):
        masks.append(inputs["attention_mask"])
        return real(**inputs)

    monkeypatch.setattr(captioner.model, "generate", spy)
    together = captioner.generate(pictures, names, [number] * 5)
    (mask,) = masks  # one batch, in which padding comes first and prompts are of several lengths
    assert mask[:, -1].all() and (mask.diff(dim=1) >= 0).all() and len(set(mask.sum(1).tolist())) > 2
    one_by_one = [captioner.generate([p], [n], [number])[0] for p, n in zip(pictures, names, strict=True)]
    rows = list(zip(pictures, names, [number] * 5, strict=True))[::-1]
    backwards = [text for i in (0, 2, 4) for text in captioner.generate(*zip(*rows[i : i + 2], strict=True))][::-1]
    assert together == one_by_one == backwards
    assert len(set(together)) == 5 and all(together)
    assert mask.shape[0] == 5 and len(masks) == 1 + 5 + 3


def test_a_chat_model_reads_picture_and_prompt(chat):
    pictures = [noise(40, 40, 0), noise(40, 40, 1)]
    long, short = (Captioner(chat, prompt, words=8) for prompt in ("describe this picture", "this"))
    assert long.generate(pictures, ["a", "b"], [0, 0]) != short.generate(pictures, ["a", "b"], [0, 0])
    assert long.model.dtype == torch.float32 or torch.accelerator.is_available()
    first, second = long.generate(pictures, ["a", "a"], [0, 0])
    assert first != second


def test_greedy_is_the_likeliest_word_at_each_step(small):
    """Against a loop of its own over the whole network, without a cache."""
    captioner = Captioner(small, words=6, device="cpu")
    picture = noise(16, 16, 3)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    ids = torch.tensor([[1]])
    with torch.no_grad():
        for _ in range(12):  # two tokens a word
            scores = captioner.model(pixel_values=pixels, decoder_input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
            if ids[0, -1] == 2:
                break
    assert captioner.generate([picture], ["a"], [0]) == [captioner.tokenizer.decode(ids[0], skip_special_tokens=True)]


def test_samples_follow_from_seed_name_and_number_alone(small):
    picture = noise(16, 16, 0)

    def sample(name: str, number: int, seed: int = 0, temperature: float = 1.0) -> str:
        return Captioner(small, words=10, temperature=temperature, seed=seed).generate([picture], [name], [number])[0]

    greedy, first = sample("a", 0), sample("a", 1)
    assert first == sample("a", 1)
    assert len({greedy, first, sample("a", 2), sample("b", 1), sample("a", 1, seed=1)}) == 5
    assert greedy == sample("b", 0, seed=7) == sample("a", 3, temperature=0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_noise_samples_from_softmax(temperature):
    scores, count = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf"), 1.5]), 6_000
    keys = [(0, f"{i}.png", 1) for i in range(count // 3)]
    process = GumbelMax(keys, temperature)
    batch = scores.expand(len(keys), -1)
    drawn = torch.cat([process(None, batch).argmax(1) for _ in range(3)])  # three steps
    expected = torch.softmax(scores / temperature, 0).double().numpy() * count
    seen = np.bincount(drawn, minlength=6)
    assert seen[4] == 0
    keep = expected > 0
    expected = expected[keep] * seen.sum() / expected[keep].sum()
    assert scipy.stats.chisquare(seen[keep], expected).pvalue > 0.001
    steps = drawn.view(3, -1)
    assert (steps[0] != steps[1]).any() and torch.equal(batch[0], scores)


def test_a_row_without_a_key_keeps_its_scores():
    scores = torch.randn(3, 50)
    seen = GumbelMax([None, (0, "a", 1), None], 0.7)(None, scores)
    assert torch.equal(seen[[0, 2]], scores[[0, 2]]) and not torch.equal(seen[1], scores[1])
    other = GumbelMax([(0, "a", 1)], 0.7)(None, scores[1:2])  # the same row in another batch
    assert torch.equal(seen[1], other[0])


@pytest.mark.parametrize(
    "text, words, trimmed",
    [
        ("One two three.", 3, "One two three."),
        ("  One two three  ", 5, "One two three"),
        ("One two. Three four. Five", 4, "One two. Three four."),
        ("One two. Three four five", 4, "One two."),
        ('He said "no." Then he left', 4, 'He said "no."'),
        ("One 2.5 three four", 3, "One 2.5 three"),
        ("One\ntwo\u2026 three\tfour", 3, "One\ntwo\u2026"),
        ("A St. Bernard lies on a red sofa", 6, "A St. Bernard lies on a"),
        ("one two three four", 2, "one two"),
        ("", 5, ""),
        (" \n ", 5, ""),
    ],
)
def test_trim_cuts_at_a_sentence_if_it_can(text, words, trimmed):
    assert trim(text, words) == trimmed and len(trimmed.split()) <= words


def test_a_model_that_cannot_chat_is_one_line(chat, tmp_path):
    for file in chat.iterdir():
        if "jinja" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(OSError, match="has no chat template: name an instruction-tuned model"):
        Captioner(tmp_path)


def test_licences(tmp_path, monkeypatch):
    monkeypatch.setattr(captioner, "hub_reachable", lambda: False)
    assert licence("Qwen/Qwen3-VL-2B-Instruct") == licence("HuggingFaceTB/SmolVLM2-500M-Video-Instruct") == "apache-2.0"
    assert licence("someone/something") == licence(str(tmp_path)) == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence(str(tmp_path)) == "mit"


class StandIn:
    """What `VLLMCaptioner` uses of vLLM."""

    asked = []  # noqa: RUF012

    def __init__(self, model, revision):
        self.model, self.revision = model, revision

    def chat(self, talks, parameters, use_tqdm):
        StandIn.asked += zip(talks, parameters, strict=True)
        texts = [
            f"{talk[0]['content'][0]['image_pil'].size} {p['seed'] % 97}" for talk, p in StandIn.asked[-len(talks) :]
        ]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in texts]


def test_vllm_is_asked_for_the_same(chat, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandIn, SamplingParams=dict))
    monkeypatch.setattr(StandIn, "asked", [])
    data = folder_of(tmp_path / "data", 5)
    settings = [f"data={data}", f"store={tmp_path / 's'}", f"model={chat}", "captions=2", "prompt=what: is this"]
    assert run(*settings, "engine=vllm", "words=9", "temperature=0.5", "batch_size=3") == 0
    assert len(StandIn.asked) == 10 and len({p["seed"] for _, p in StandIn.asked}) == 10
    assert [p["temperature"] for _, p in StandIn.asked] == [0.0, 0.5] * 5
    assert {p["max_tokens"] for _, p in StandIn.asked} == {18}
    ((message,), _) = StandIn.asked[0]
    assert message["role"] == "user" and message["content"][1] == {"type": "text", "text": "what: is this"}
    rows = CaptionStore(tmp_path / "s").read()
    with Image.open(data / rows[0]["file_name"]) as picture:
        assert rows[0]["caption"].startswith(str(picture.size))
    assert json.loads(rows[1]["settings"]) == {"engine": "vllm", "dtype": "auto", "words": 9, "temperature": 0.5}


# --- the command ---


def test_a_folder_is_captioned(small, tmp_path):
    data = folder_of(tmp_path / "data", 7)
    (data / ".hidden.png").write_bytes(b"")
    (data / "metadata.jsonl").write_text("{}\n")
    (data / "more" / "broken.jpg").write_bytes(b"no picture")
    noise(500, 2, 0).save(data / "narrow.png")
    assert run(f"data={data}", f"store={tmp_path / 's'}", f"model={small}", "captions=2", "words=5", "seed=4") == 0
    rows = CaptionStore(tmp_path / "s").read().to_list()
    names = sorted(str(p.relative_to(data)) for p in data.rglob("*.*g") if p.name[0] != ".")
    assert [(r["file_name"], r["number"]) for r in rows] == [(name, n) for name in names for n in (0, 1)]
    bad = {r["file_name"]: r["error"] for r in rows if r["caption"] is None}
    assert set(bad) == {"more/broken.jpg", "narrow.png"} and "500 x 2 pixels" in bad["narrow.png"]
    assert all("cannot be read" in error and "\n" not in error for error in bad.values())
    assert {r["bytes"] == (data / r["file_name"]).stat().st_size for r in rows} == {True}
    direct = Captioner(small, words=5, temperature=0.7, seed=4)
    for row in (r for r in rows if r["caption"] is not None):
        with Image.open(data / row["file_name"]) as picture:
            expected = direct.generate([picture.convert("RGB")], [row["file_name"]], [row["number"]])[0]
        assert row["caption"] == trim(expected, 5) and row["error"] is None
        assert row["words"] == len(row["caption"].split()) <= 5 and row["seconds"] > 0 and row["seed"] == 4
        assert row["model"] == "small" and len(row["revision"]) == 10 and row["created"].endswith("+00:00")
    assert set(read_captions(tmp_path / "s")) == set(names) - set(bad)


def test_what_is_there_is_not_done_again(small, tmp_path, monkeypatch):
    data = folder_of(tmp_path / "data", 6)
    settings = [f"data={data}", f"store={tmp_path / 's'}", f"model={small}", "words=4"]
    assert run(*settings, "split=more") == 0
    assert [name for name, *_ in rows_of(tmp_path / "s")] == ["more/deep/00.png", "more/deep/03.png"]
    assert run(*settings) == 0
    before = CaptionStore(tmp_path / "s").read().to_list()
    assert len(before) == 6
    monkeypatch.setattr(Captioner, "__init__", None)  # nothing may load a model now
    assert run(*settings) == 0
    assert CaptionStore(tmp_path / "s").read().to_list() == before


def test_batches_hold_pictures_of_a_size_and_are_saved_on_the_way(small, tmp_path, monkeypatch):
    data, seen, real = folder_of(tmp_path / "data", 9), [], Captioner.generate

    def spy(self, pictures, *keys):
        seen.append([p.width * p.height for p in pictures])
        return real(self, pictures, *keys)

    monkeypatch.setattr(Captioner, "generate", spy)
    monkeypatch.setattr(caption_store, "FEWEST_BUCKETS", 1)
    source = DataConfig(source=str(data))
    job = Job(Settings(store=str(tmp_path / "s"), data=source, model=str(small), words=3, batch_size=4, save_seconds=0))
    saved = [(count, len(job.store.rows(0))) for count in job.run(0)]
    assert saved == [(4, 4), (4, 8), (1, 9)]
    assert [len(batch) for batch in seen] == [4, 4, 1] and max(seen[0]) <= min(seen[1]) and max(seen[1]) <= seen[2][0]


def test_more_captions_repaired_and_replaced_pictures_are_done_later(small, tmp_path):
    data, store = folder_of(tmp_path / "data", 4), tmp_path / "s"
    (data / "bad.png").write_bytes(b"no picture")
    settings = [f"data={data}", f"store={store}", f"model={small}", "words=5"]
    assert run(*settings) == 0
    first = {key: caption for *key, caption in rows_of(store) for key in [tuple(key)]}
    assert len(first) == 5 and first["bad.png", 0] is None
    assert run(*settings, "captions=2") == 0
    both = {(name, number): caption for name, number, caption in rows_of(store)}
    assert len(both) == 10 and both.items() >= first.items()
    noise(40, 40, 99).save(data / "01.png")  # another picture under the same name
    noise(30, 30, 98).save(data / "mended.png")
    (data / "mended.png").rename(data / "bad.png")
    assert set(read_captions(store, pictures=data)) == set(read_captions(store)) - {"01.png"}
    assert run(*settings, "captions=2") == 0
    after = {(name, number): caption for name, number, caption in rows_of(store)}
    assert all(after[key] == both[key] for key in both if key[0] not in ("01.png", "bad.png")) and len(after) == 10
    sizes = {(row["file_name"], row["bytes"]) for row in CaptionStore(store).read()}
    assert sizes == {(file.relative_to(data).as_posix(), file.stat().st_size) for file in data.rglob("*.png")}
    assert after["bad.png", 0] and after["bad.png", 1]
    with Image.open(data / "01.png") as picture:
        assert after["01.png", 0] == trim(Captioner(small, words=5).generate([picture], ["01.png"], [0])[0], 5)


def test_an_error_that_passes_is_tried_again_when_asked(small, tmp_path, monkeypatch):
    data, store, real = folder_of(tmp_path / "data", 3), tmp_path / "s", Image.open
    settings = [f"data={data}", f"store={store}", f"model={small}", "words=5"]

    def busy(file, *args):
        if str(file).endswith("01.png"):
            raise OSError("too many open files")
        return real(file, *args)

    monkeypatch.setattr(Image, "open", busy)
    assert run(*settings) == 0
    monkeypatch.setattr(Image, "open", real)
    assert run(*settings) == 0 and set(read_captions(store)) == {"02.png", "more/deep/00.png"}
    assert run(*settings, "retry=true") == 0 and len(read_captions(store)) == 3 == len(rows_of(store))


def test_one_picture_that_a_model_refuses_spoils_no_batch(small, tmp_path, monkeypatch, capsys):
    data, real = folder_of(tmp_path / "data", 7), Captioner.generate
    monkeypatch.setattr(caption_store, "FEWEST_BUCKETS", 1)
    settings = [f"data={data}", f"model={small}", "words=5", "batch_size=7"]

    def moody(self, pictures, names, numbers):
        if "04.png" in names or len(names) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, pictures, names, numbers)

    assert run(*settings, f"store={tmp_path / 'whole'}") == 0
    monkeypatch.setattr(Captioner, "generate", moody)
    assert run(*settings, f"store={tmp_path / 's'}") == 0
    whole, rows = (CaptionStore(tmp_path / name).read().to_list() for name in ("whole", "s"))
    for ours, theirs in zip(rows, whole, strict=True):
        refused = ours["file_name"] == "04.png"
        assert ours["caption"] == (None if refused else theirs["caption"])
        assert ours["error"] == ("the captioner fails (out of memory)" if refused else None)
    assert "1 captions could not be had" in capsys.readouterr().out
    monkeypatch.setattr(Captioner, "generate", lambda *_: 1 / 0)  # no picture's fault
    monkeypatch.setattr(captions, "IN_A_ROW", 3)
    with pytest.raises(ZeroDivisionError):
        run(*settings, f"store={tmp_path / 'none'}")
    assert rows_of(tmp_path / "none") == []


def test_a_hub_models_revision_is_its_commit(chat, tmp_path, monkeypatch):
    """A hub's cache as huggingface_hub lays it out; nothing is asked of the network."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(chat)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr(captioner, "hub_reachable", lambda: False)
    c = Settings(store="s", model="someone/model")
    assert (
        captions.identity(c)["revision"]
        == commit
        == captions.identity(dataclasses.replace(c, revision=commit))["revision"]
    )
    assert captions.identity(dataclasses.replace(c, model=str(chat)))["revision"] != commit


def test_pictures_are_turned_put_on_white_and_cut(small, tmp_path):
    half = Image.new("RGBA", (60, 40), (200, 0, 0, 0))
    half.paste((200, 0, 0, 255), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    half.save(tmp_path / "a.png", exif=exif)

    def read(**settings) -> Image.Image:
        source = DataConfig(source=str(tmp_path))
        return Job(Settings(store=str(tmp_path / str(settings)), data=source, model=str(small), **settings)).read(
            "a.png"
        )

    whole = read()
    assert whole.size == (40, 60) and whole.mode == "RGB"
    assert whole.getpixel((20, 5)) == (200, 0, 0) and whole.getpixel((20, 55)) == (255, 255, 255)
    assert read(longest_side=30).size == (20, 30) and read(image_size=32).size == (32, 32)


def test_two_shards_make_one_run(small, tmp_path, capsys):
    data = folder_of(tmp_path / "data", 14)
    common = [f"data={data}", f"model={small}", "captions=2", "words=5"]
    assert run(*common, f"store={tmp_path / 'one'}") == 0
    assert run(*common, f"store={tmp_path / 'two'}", "shard=1/2", "batch_size=3") == 0
    part = rows_of(tmp_path / "two")
    assert 0 < len(part) < 28
    assert run(*common, f"store={tmp_path / 'two'}", "shard=0/2", "batch_size=1") == 0
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two") and len(rows_of(tmp_path / "one")) == 28
    assert run(*common, f"store={tmp_path / 'one'}", "shard=3/100") == 2
    assert "shard must be one of at most 16, the buckets of this store" in capsys.readouterr().err


def test_killed_again_and_again_no_row_is_lost_or_doubled(small, tmp_path, monkeypatch):
    monkeypatch.setattr(caption_store, "FEWEST_BUCKETS", 3)
    pictures, store = 24 + 6 * KILLS, tmp_path / "killed"
    data = folder_of(tmp_path / "data", pictures)
    common = [f"data={data}", f"model={small}", "captions=2", "words=10", "batch_size=2", "save_seconds=0"]
    assert run(*common, f"store={tmp_path / 'whole'}") == 0
    Job(Settings(store=str(store), data=DataConfig(source=str(data)), model=str(small), words=10))  # of 3 buckets
    context = multiprocessing.get_context("forkserver")  # which imports once for all of them
    context.set_forkserver_preload(["textok_mini.captions"])
    done = [0]
    for kill in range(KILLS):
        process, writing = context.Process(target=main, args=([*common, f"store={store}"],)), False
        process.start()
        while process.is_alive() and not writing and len(rows_of(store)) < done[-1] + 6:
            time.sleep(0.0005)
            writing = (
                kill % 2 and len(rows_of(store)) > done[-1] and any(store.glob("*.part"))
            )  # in a write, or between
        assert process.is_alive(), "it ended before it could be killed"
        process.kill()
        process.join()
        done.append(len(rows_of(store)))
        assert done[-2] < done[-1] < 2 * pictures, "a kill lost rows, or nothing was left to do"
    assert run(*common, f"store={store}") == 0
    assert rows_of(store) == rows_of(tmp_path / "whole") and len(rows_of(store)) == 2 * pictures
    print(f"{KILLS} kills, no row lost or doubled")


def test_scenes_are_captioned_and_joined(small, small_home, tmp_path):
    arguments = [f"store={tmp_path / 's'}", f"model={small}", "words=3", "data=openmoji-scenes", "data.scenes=10"]
    assert run(*arguments, "data.world_seed=5", "image_size=16") == 0
    there = read_captions(tmp_path / "s")
    config = DataConfig(scenes=10, world_seed=5)
    rows = {split: load_data(config, split, 16) for split in ("train", "test", "zero-shot")}
    assert [len(r) for r in rows.values()] == [10, 24, 24]
    assert sorted(there) == sorted(name for r in rows.values() for name in r.ids)
    test = rows["test"]
    picture = Image.fromarray(test[3]["image"].permute(1, 2, 0).numpy())
    assert there[test.ids[3]] == trim(Captioner(small, words=3).generate([picture], [test.ids[3]], [0])[0], 3)
    # The door for all data takes them in place of the scenes' own.
    told = load_data(dataclasses.replace(config, captions_from=str(tmp_path / "s")), "test", 16)
    assert told.captions == [there[name] for name in test.ids] != test.captions
    assert comparison.other_captions(test, f"of {tmp_path / 's'}") == told.captions
    for change, line in (
        ({"world_seed": 6}, "world_seed=5, these have 6"),
        ({"scenes": 12}, "lacks captions of 2 pic"),
    ):
        with pytest.raises(DataError, match=line):
            load_data(dataclasses.replace(config, captions_from=str(tmp_path / "s"), **change), "train", 16)
    job = Job(Settings(store=str(tmp_path / "t"), data=config, model=str(small), split="test"))
    assert set(job.pictures) == set(test.ids) and job.pictures[test.ids[0]].open().size == (64, 64)


def test_a_hub_set_without_captions_is_captioned_and_joined(small, small_home, tmp_path, monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {split: [noise(40, 40, i) for i in seeds] for split, seeds in (("train", range(3)), ("validation", (7, 8)))}
    tables = {s: datasets.Dataset.from_dict({"image": p, "label": [0] * len(p)}, features) for s, p in rows.items()}
    for module in (captions, own_data):
        monkeypatch.setattr(module, "load_from_hub", lambda name: datasets.DatasetDict(tables))
    store, source = tmp_path / "s", "someone/pictures"
    assert run(f"store={store}", f"model={small}", "words=3", f"data={source}") == 0
    there = read_captions(store)
    assert sorted(there) == ["train/0", "train/1", "train/2", "validation/0", "validation/1"]
    assert there["validation/1"] == trim(Captioner(small, words=3).generate([noise(40, 40, 8)], [""], [0])[0], 3)
    with pytest.raises(DataError, match=r"no column 'caption': set data\.caption_column .* or captions_from"):
        load_data(source, "train", 32)
    test = load_data(DataConfig(source=source, captions_from=str(store)), "test", 32)
    assert test.captions == [there["validation/0"], there["validation/1"]] and test.label_names == ["cat", "dog"]


def test_a_stores_captions_are_joined_to_a_folder_by_file_name(small, small_home, tmp_path, capsys):
    """Pictures in folders of their class and split, no metadata: the store and the folders say all."""
    root = tmp_path / "pictures"
    for i in range(12):
        file = root / ("val" if i < 3 else "train") / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(40, 40, i).save(file)
    (root / "val" / "dog" / "1.png").write_bytes(b"no picture")
    store = tmp_path / "s"
    assert run(f"store={store}", f"model={small}", "words=3", f"data={root}", "image_size=16") == 0
    config = DataConfig(source=str(root), captions_from=str(store), skip_bad_rows=True)
    rows = {split: load_data(config, split, 16) for split in ("train", "val")}
    there = read_captions(store)
    assert [len(r) for r in rows.values()] == [9, 2] and rows["val"].skipped == {"no caption": 1}
    assert rows["val"].ids == ["val/cat/0.png", "val/cat/2.png"] and rows["val"].label_names == ["cat", "dog"]
    assert all(r.captions == [there[name] for name in r.ids] for r in rows.values())
    assert [r.label_names[label] for r in rows.values() for label in r.labels] == (
        ["cat"] * 4 + ["dog"] * 5 + ["cat"] * 2
    )
    with pytest.raises(DataError, match=r"val/dog/1\.png: the store has no caption of this picture"):
        load_data(dataclasses.replace(config, skip_bad_rows=False), "train", 16)
    # With metadata its classes and splits count, and the store's captions still come first.
    lines = [{"file_name": name, "caption": "mine", "label": 7} for name in there]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "val" / "dog" / "1.png").unlink()
    train = load_data(config, "train", 16)
    assert train.captions == [there[name] for name in train.ids] and set(train.label_names) == {"7"}
    # An own caption is there again without the store.
    assert set(load_data(DataConfig(source=str(root)), "train", 16).captions) == {"mine"}


OTHERS = {
    "words=6": "words",
    "longest_side=20": "longest_side",
    "seed=1": "seed",
    "temperature=0.5": "temperature",
    "image_size=16": "image_size",
    "engine=vllm": "engine",
    "prompt=other": None,  # which an encoder-decoder does not read
    "batch_size=3": None,
    "shard=0/2": None,
    "captions=2": None,  # more of them change none
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused_by_name(small, tmp_path, other, monkeypatch, capsys):
    monkeypatch.setattr(Captioner, "generate", lambda self, pictures, names, numbers: list(names))
    arguments = [f"data={folder_of(tmp_path / 'data', 2)}", f"store={tmp_path / 's'}", f"model={small}"]
    assert run(*arguments) == 0
    assert run(*arguments, other) == (2 if OTHERS[other] else 0)
    message = capsys.readouterr().err.splitlines()[-1]
    if OTHERS[other]:
        assert f"made with another {OTHERS[other]};" in message and "choose another store" in message


def test_other_weights_of_the_same_name_are_refused(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Captioner, "generate", lambda self, pictures, names, numbers: list(names))
    model, arguments = tmp_path / "small", [f"data={folder_of(tmp_path / 'data', 2)}", f"store={tmp_path / 's'}"]
    for seed in (0, 1):
        encoder_decoder(model, seed)
        assert run(*arguments, f"model={model}") == 2 * seed
    assert "made with another revision;" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["words=5"], "store must be a folder, as in store=runs/captions"),
        (["store=s", "wrods=5"], "unknown setting wrods; did you mean words?"),
        (["store=s", "data.scene=5"], "did you mean data.scenes?"),
        (["store=s", "words=many"], "words must be int"),
        (["store=s", "seed=x"], "seed must be int"),
        (["store=s", "words=0"], "words must be above 0"),
        (["store=s", "shard=2/2"], "shard must be I/N"),
        (["store=s", "shard=1"], "shard must be I/N"),
        (["store=s", "engine=vlm"], "did you mean vllm?"),
        (["store"], "KEY=VALUE"),
        (["store=s", "training.steps=5"], "unknown setting training"),
        (["store=s", "model=small", "data=nowhere"], "nowhere holds no pictures"),
        (["store=s", "model=small", "data=openmoji-scenes", "split=tset"], "no split 'tset'"),
        (["store=s", "model=nobody/nothing", "data.scenes=8"], "captioner 'nobody/nothing' is not on this disk"),
        (["store=s", "model=./nothing"], "there is no such folder"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(small, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").symlink_to(small)
    assert run(*arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and line in message and "\n" not in message


@pytest.mark.parametrize(
    "module, setting, hint", [("ray", "workers=2", "pip install -e '.[ray]'"), ("vllm", "engine=vllm", "")]
)
def test_a_missing_package_is_one_line(small, tmp_path, monkeypatch, capsys, module, setting, hint):
    monkeypatch.setitem(sys.modules, module, None)
    data = folder_of(tmp_path / "data", 1)
    assert run(f"data={data}", f"store={tmp_path / 's'}", f"model={small}", setting) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{hint or 'pip install vllm'}" in message


def test_ray_gives_the_same_rows(small, tmp_path, monkeypatch):
    monkeypatch.setattr(caption_store, "FEWEST_BUCKETS", 4)
    common = [f"data={folder_of(tmp_path / 'data', 14)}", f"model={small}", "captions=2", "words=5"]
    assert run(*common, f"store={tmp_path / 'plain'}") == 0
    command = [sys.executable, "-m", "textok_mini.captions", *common, f"store={tmp_path / 'ray'}", "workers=2"]
    kept = {"words": 5, "model": str(small)}
    Job(Settings(store=str(tmp_path / "ray"), data=DataConfig(source=str(tmp_path / "data")), **kept))  # 4 buckets
    subprocess.run(command, check=True)
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "plain") and len(rows_of(tmp_path / "ray")) == 28


# --- captions for classes ---


def rows_with(texts: list[str], labels: list[int]) -> CaptionedImages:
    table, names = datasets.Dataset.from_dict({"image": [b""] * len(texts)}), ["cat", "dog", "owl"]
    ids = [str(i) for i in range(len(texts))]
    return CaptionedImages(
        table=table, ids=ids, captions=texts, labels=labels, label_names=names, image_size=8, split="test"
    )


HELD_OUT = rows_with(
    ["a cat", "A  CAT", "a cat asleep", "a cat on a mat", "a dog", "a dog barks", "A Dog  Runs", "a dog", "anything"],
    [0, 0, 0, 0, 1, 1, 1, 1, -1],
)
TRAINING = rows_with(["A cat ", "a dog  BARKS", "an owl"], [0, 1, -1])


def test_class_captions_are_new_distinct_and_drawn_by_a_seed():
    drawn = class_captions(HELD_OUT, TRAINING, 2, seed=0)
    assert {name: sorted(texts) for name, texts in drawn.items()} == {
        "cat": ["a cat asleep", "a cat on a mat"],
        "dog": ["A Dog  Runs", "a dog"],
    }
    assert class_captions(HELD_OUT, TRAINING, 2, seed=0) == drawn
    ones = {tuple(class_captions(HELD_OUT, TRAINING, 1, seed)["cat"]) for seed in range(20)}
    assert ones == {("a cat asleep",), ("a cat on a mat",)}
    order = [8, 3, 5, 7, 1, 6, 2, 0, 4]
    shuffled = rows_with([HELD_OUT.captions[i] for i in order], HELD_OUT.labels[order].tolist())
    assert class_captions(shuffled, TRAINING, 2, seed=0) == drawn


def test_too_few_captions_are_one_line():
    with pytest.raises(DataError, match=r"class 'cat' has 2 held-out captions .* 3 are asked for: ask for fewer"):
        class_captions(HELD_OUT, TRAINING, 3, seed=0)
    owls = rows_with(["an owl"], [2])
    with pytest.raises(DataError, match="class 'owl' has 0 held-out captions"):
        class_captions(HELD_OUT, owls, 1, seed=0)


def test_what_training_has_seen_is_found():
    assert_disjoint({"cat": ["a dog"]}, ["a cat"])
    with pytest.raises(DataError, match="1 listed captions are training's too, such as 'a cat'"):
        assert_disjoint({"cat": ["a  Cat", "a dog"]}, ["A cat"])


def test_scenes_have_captions_for_every_class(small_home):
    train, test = (load_data(DataConfig(scenes=50, objects=16), split, 16) for split in ("train", "test"))
    drawn = class_captions(test, train, 1, seed=0)
    assert {test.label_names.index(name) for name in drawn} == set(train.labels.tolist()) == set(test.labels.tolist())
    assert not {text for texts in drawn.values() for text in texts} & set(train.captions)
