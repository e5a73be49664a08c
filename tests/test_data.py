"""The door for data: prepared sets, folders, hub sets, and one clear line for all that can be wrong."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from textok_mini import data, openmoji, own_data
from textok_mini.config import DataConfig
from textok_mini.data import DataError, as_batch, load_data
from textok_mini.openmoji import CATEGORIES, drawings
from textok_mini.own_data import fit
from textok_mini.scenes import Scene, caption, class_label, render

SMALL = DataConfig(scenes=60, objects=16)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing here may touch the real data/."""
    monkeypatch.setenv("TEXTOK_MINI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(data, "HELD_OUT_SCENES", 40)
    return tmp_path / "home"


def picture(width: int = 40, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth picture, so that resizing can be compared with a tolerance of few grey levels."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def folder(path, count: int = 12, **columns):
    """An imagefolder of `count` good pictures; returns the path of its metadata.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture(seed=i).save(path / f"{i}.png")
        extra = {key: values[i] for key, values in columns.items()}
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": f"picture number {i}"} | extra))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path / "metadata.jsonl"


def edit(metadata, line: int, **changes):
    lines = metadata.read_text().splitlines()
    lines[line - 1] = json.dumps({k: v for k, v in (json.loads(lines[line - 1]) | changes).items() if v != "DROP"})
    metadata.write_text("\n".join(lines) + "\n")


# --- The kit's own sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test", "zero-shot"])
def test_rows_of_scenes_are_what_their_scenes_say(split):
    rows = load_data(SMALL, split, 32)
    assert len(rows) == len(rows.captions) == len(rows.labels) == (60 if split == "train" else 40)
    assert rows.label_names == list(CATEGORIES)
    for i in (0, 7, len(rows) - 1):
        row, scene = rows[i], rows.scene(i)
        assert row["image"].dtype == torch.uint8 and row["image"].shape == (3, 32, 32)
        assert np.array_equal(row["image"].permute(1, 2, 0).numpy(), render(scene, 32))
        assert row["caption"] == rows.captions[i] == caption(scene) and row["label"] == class_label(scene)
        assert row["id"] == f"{split}-{i:06d}" and isinstance(row["label"], int)
        assert rows.wrong(i, "object", np.random.default_rng(0)).objects[0].key in {
            d.key for d in rows.world.pool(split)
        }


def test_batches_are_one_dict_in_the_order_asked_for():
    rows = load_data(SMALL, "train", 32)
    batch = rows.__getitems__([5, 2, 5])
    assert (
        batch["image"].shape == (3, 3, 32, 32)
        and batch["image"].is_contiguous()
        and batch["label"].dtype == torch.int64
    )
    for place, i in enumerate([5, 2, 5]):
        assert torch.equal(batch["image"][place], rows[i]["image"]) and batch["id"][place] == rows[i]["id"]
    assert [len(batch["id"]) for batch in DataLoader(rows, 25, collate_fn=as_batch)] == [25, 25, 10]
    seen = [i for batch in DataLoader(rows, 25, collate_fn=as_batch, num_workers=1) for i in batch["id"]]
    assert seen == rows.ids
    assert rows[-1]["id"] == rows.ids[-1] and len(list(rows)) == 60
    with pytest.raises(IndexError):
        rows[60]


def test_the_first_rows_are_a_split_of_their_own():
    rows = load_data(SMALL, "test", 32)
    few = rows.first(3)
    assert len(few) == 3 and len(rows) == 40 and few.ids == rows.ids[:3] and few.captions == rows.captions[:3]
    assert torch.equal(few.labels, rows.labels[:3]) and torch.equal(few[-1]["image"], rows[2]["image"])
    assert few.scene(2) == rows.scene(2) and few.world == rows.world and few.split == "test"
    assert len(rows.first(1_000)) == 40
    with pytest.raises(IndexError):
        few[3]


def test_the_same_scenes_at_every_size_and_caption_level(home):
    rows = {size: load_data(SMALL, "test", size) for size in (16, 32)}
    assert rows[16].captions == rows[32].captions and rows[16].scene(3) == rows[32].scene(3)
    files = set(home.rglob("*.arrow"))
    for level in ("short", "long"):
        level_rows = load_data(DataConfig(scenes=60, objects=16, captions=level), "test", 32)
        assert level_rows.captions[5] == caption(level_rows.scene(5), level)
    assert set(home.rglob("*.arrow")) == files, "a caption level must not render anything again"


def test_prepared_data_is_mapped_kept_and_keyed_by_its_settings(home):
    first = load_data(SMALL, "test", 32)
    assert first.table.cache_files, "not memory-mapped"
    (file,) = home.rglob("test.arrow")
    before = file.stat().st_mtime_ns
    load_data(SMALL, "test", 32)
    assert file.stat().st_mtime_ns == before
    others = [DataConfig(scenes=60, objects=16, world_seed=1), DataConfig(scenes=60, objects=17)]
    for other in others:
        assert load_data(other, "test", 32).captions != first.captions
    assert len(list(home.rglob("test.arrow"))) == 3


def test_a_new_generator_makes_new_data(home, monkeypatch):
    load_data(SMALL, "test", 16)
    monkeypatch.setitem(data.GENERATOR, "openmoji-scenes", data.GENERATOR["openmoji-scenes"] + 1)
    load_data(SMALL, "test", 16)
    assert len(list(home.rglob("test.arrow"))) == 2


def test_the_card_tells_the_sizes_of_the_splits():
    card = (Path(data.__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    [scenes] = re.findall(r"\| `openmoji-scenes`.*\| ([\d,]+) \(.*\| ([\d,]+) \| ([\d,]+) \|", card)
    assert scenes == (f"{DataConfig().scenes:,}", "2,000", "2,000")
    assert "HELD_OUT_SCENES = 2_000" in Path(data.__file__).read_text()  # tests have fewer
    [single] = re.findall(r"\| `openmoji` .*\| ([\d,]+) \| ([\d,]+) \| none", card)
    held_out = sum(own_data.is_for_test(drawing.motif) for drawing in openmoji.drawings().values())
    assert single == (f"{len(openmoji.drawings()) - held_out:,}", f"{held_out:,}")


LOAD = """
import sys
from textok_mini.config import DataConfig
from textok_mini.data import load_data
rows = load_data(DataConfig(scenes=int(sys.argv[1]), objects=16), "train", 32)
import hashlib
print(hashlib.sha256(rows.__getitems__(range(len(rows)))["image"].numpy().tobytes()).hexdigest())
"""


def start(scenes: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LOAD, str(scenes)], stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_leaves_nothing_half_made(home):
    process = start(1_500)
    deadline = time.monotonic() + 60
    while not list(home.rglob("train.part")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)  # its output ends once its workers, which share it, have ended too
    assert process.returncode == -signal.SIGKILL
    assert list(home.rglob("train.part")) and not list(home.rglob("train.arrow"))
    rows = load_data(DataConfig(scenes=1_500, objects=16), "train", 32)
    assert len(rows) == 1_500 and np.array_equal(rows[1_499]["image"].permute(1, 2, 0), render(rows.scene(1_499), 32))
    assert not list(home.rglob("*.part"))


@pytest.mark.skipif(sys.platform != "linux", reason="drawn by one process there")
def test_several_processes_draw_the_same_rows_in_order_and_leave_the_random_numbers_alone(monkeypatch):
    config, before = DataConfig(scenes=1_530, objects=16), torch.random.get_rng_state()
    told = []
    monkeypatch.setattr(data, "DataLoader", lambda *given, **how: told.append(how) or DataLoader(*given, **how))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    rows = list(data.scene_rows(config, "train", 8))
    assert [how["num_workers"] for how in told] == [3] and torch.equal(torch.random.get_rng_state(), before)
    alone = list(data.draw_rows(data.world_of(config), "train", 8, [0, 99, 100, 777, 1_529]))
    assert [rows[i] for i in (0, 99, 100, 777, 1_529)] == alone and len(rows) == 1_530
    assert [row["id"] for row in rows] == [f"train-{i:06d}" for i in range(1_530)]


def test_two_processes_prepare_once_and_agree():
    outputs = [process.communicate(timeout=120)[0].split("\n") for process in [start(300), start(300)]]
    assert outputs[0][-2] == outputs[1][-2] != ""
    assert sum("preparing" in line for output in outputs for line in output) == 1


def test_single_pictures_are_split_by_motif(monkeypatch):
    every = drawings()
    shown = ("astronaut", "apple", "hand", "prince", "crown", "running")
    few = {key: d for key, d in every.items() if any(word in d.name for word in shown)}
    monkeypatch.setattr(data, "drawings", lambda: few)
    splits = {split: load_data("openmoji", split, 32) for split in ("train", "test")}
    motifs = {split: {every[key].motif for key in rows.ids} for split, rows in splits.items()}
    assert motifs["train"].isdisjoint(motifs["test"]) and sum(map(len, splits.values())) == len(few) > 100
    for variants in (("prince", "princess", "person with crown"), ("woman running", "man running facing right")):
        assert len({d.motif for d in few.values() if d.name in variants}) == 1, variants
    apple = splits["train"].captions[splits["train"].ids.index("1F34E")]
    assert apple == "a red apple, food & drink, red"
    assert (splits["train"][0]["image"][:, 0, 0] == 255).all()
    share = np.mean([own_data.is_for_test(motif) for motif in {d.motif for d in every.values()}])
    assert 0.07 < share < 0.13


# --- Pictures from a folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 100), (34, 32), (400, 37)])
def test_fit_against_pil_fitting(size):
    source = picture(*size)
    expected = np.asarray(ImageOps.fit(source, (32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(fit(source, 32) - expected).mean() < 3


def test_fit_cuts_the_centre():
    striped = np.zeros((32, 96, 3), np.uint8)
    striped[:, 32:64] = (0, 200, 0)
    assert (fit(Image.fromarray(striped), 32) == (0, 200, 0)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    clear = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    clear.paste((10, 10, 10, 255), (0, 0, 20, 40))
    fitted = fit(clear.convert(mode), 40)
    assert (fitted[:, 25:] == 255).all() and (fitted[:, :15] < 20).all()
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 128))
    assert np.abs(fit(half, 40).astype(int) - 127).max() <= 1


def test_exif_orientation_is_applied():
    upright, exif, stored = picture(48, 40), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, "PNG", exif=exif)
    assert np.array_equal(fit(Image.open(stored), 32), fit(upright, 32))


def test_other_modes_become_rgb():
    ramp = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    sixteen = fit(Image.fromarray(ramp), 32)
    assert sixteen[0].max() < 10 and sixteen[-1].min() > 245 and 120 < sixteen.mean() < 135
    assert fit(picture().convert("CMYK"), 32).shape == fit(picture().convert("L"), 32).shape == (32, 32, 3)


def test_a_folder_is_loaded_and_a_tenth_held_out(tmp_path):
    metadata = folder(tmp_path / "own", 200)
    splits = {split: load_data(str(tmp_path / "own"), split, 32) for split in ("train", "test")}
    ids = {split: set(rows.ids) for split, rows in splits.items()}
    assert ids["train"].isdisjoint(ids["test"]) and len(ids["train"] | ids["test"]) == 200
    assert 8 <= len(ids["test"]) <= 35
    row = splits["test"][0]
    number = row["id"].removesuffix(".png")
    assert row["caption"] == f"picture number {number}" and row["label"] == -1
    assert np.array_equal(row["image"].permute(1, 2, 0), fit(picture(seed=int(number)), 32))
    picture(seed=999).save(tmp_path / "own" / "new.png")
    with metadata.open("a") as file:
        file.write('{"file_name": "new.png", "caption": "a new one"}\n')
    assert ids["test"] <= set(load_data(str(tmp_path / "own"), "test", 32).ids) <= ids["test"] | {"new.png"}


def test_folders_of_splits_share_their_labels(tmp_path):
    folder(tmp_path / "own" / "train", 3, label=["zebra", "ant", "zebra"])
    folder(tmp_path / "own" / "test", 2, label=["bee", None])
    train, test = (load_data(str(tmp_path / "own"), split, 32) for split in ("train", "test"))
    assert train.label_names == test.label_names == ["ant", "bee", "zebra"]
    assert train.labels.tolist() == [2, 0, 2] and test.labels.tolist() == [1, -1]
    assert train.ids == ["train/0.png", "train/1.png", "train/2.png"]
    with pytest.raises(DataError, match=r"no split 'other'; there are: test, train"):
        load_data(str(tmp_path / "own"), "other", 32)


def test_one_list_over_split_folders(tmp_path):
    metadata = folder(tmp_path / "own", 4)
    for number, split in enumerate(("train", "train", "test", "train"), 1):
        (tmp_path / "own" / split).mkdir(exist_ok=True)
        name = f"{split}/{number - 1}.png"
        (tmp_path / "own" / f"{number - 1}.png").rename(tmp_path / "own" / name)
        edit(metadata, number, file_name=name)
    assert load_data(str(tmp_path / "own"), "test", 32).ids == ["test/2.png"]


@pytest.mark.parametrize("name", own_data.VALIDATION)
def test_a_validation_split_serves_for_testing(tmp_path, name):
    """As in ImageNet's `val/`: none of its rows may slip into training."""
    metadata = folder(tmp_path / "own", 4)
    for number, split in enumerate(("train", name, "train", name), 1):
        (tmp_path / "own" / split).mkdir(exist_ok=True)
        (tmp_path / "own" / f"{number - 1}.png").rename(tmp_path / "own" / split / f"{number - 1}.png")
        edit(metadata, number, file_name=f"{split}/{number - 1}.png")
    train, test, same = (load_data(str(tmp_path / "own"), split, 32).ids for split in ("train", "test", name))
    assert train == ["train/0.png", "train/2.png"] and test == same == [f"{name}/1.png", f"{name}/3.png"]


def test_whole_numbers_as_labels_keep_their_order(tmp_path):
    folder(tmp_path / "own" / "train", 3, label=[10, 9, 10])
    rows = load_data(str(tmp_path / "own"), "train", 32)
    assert rows.label_names == ["9", "10"] and set(rows.labels.tolist()) <= {0, 1}


# --- One clear line for each bad row ------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def truncated_jpeg(metadata):
    """Its head is whole, so only decoding finds out."""
    picture(200, 200).save(metadata.parent / "1.jpg")
    stored = (metadata.parent / "1.jpg").read_bytes()
    (metadata.parent / "1.jpg").write_bytes(stored[: len(stored) * 3 // 4])
    (metadata.parent / "1.png").unlink()
    edit(metadata, 2, file_name="1.jpg")


BAD = {
    "no caption": (lambda m: edit(m, 3, caption="DROP"), "line 3 (2.png)", "no caption"),
    "null caption": (lambda m: edit(m, 3, caption=None), "line 3 (2.png)", "no caption"),
    "empty caption": (lambda m: edit(m, 3, caption="  \n"), "line 3 (2.png)", "no caption"),
    "caption that is no text": (lambda m: edit(m, 3, caption=["a", "b"]), "line 3 (2.png)", "no caption"),
    "1,001 words": (lambda m: edit(m, 4, caption="word " * 1_001), "line 4 (3.png)", "1,001 words"),
    "10,000 words": (lambda m: edit(m, 4, caption="word " * 10_000), "line 4 (3.png)", "10,000 words"),
    "truncated": (lambda m: truncate(m.parent / "1.png"), "line 2 (1.png)", "cannot be read"),
    "truncated JPEG": (truncated_jpeg, "line 2 (1.jpg)", "cannot be read"),
    "not a picture": (lambda m: (m.parent / "1.png").write_text("hello"), "line 2 (1.png)", "cannot be read"),
    "tiny": (lambda m: picture(100, 31).save(m.parent / "5.png"), "line 6 (5.png)", "has 31 pixels"),
    "duplicate": (lambda m: edit(m, 5, file_name="./0.png"), "line 5 (./0.png)", "line 1 has this picture too"),
    "picture without a row": (lambda m: picture().save(m.parent / "lost.JPG"), "lost.JPG", "has no line for it"),
    "row without a picture": (lambda m: (m.parent / "7.png").unlink(), "line 8 (7.png)", "no such file"),
    "broken JSON": (lambda m: m.write_text(m.read_text() + "{'a'\n"), "line 13", "not valid JSON"),
    "not UTF-8": (lambda m: m.write_bytes(m.read_bytes() + b'{"a": "\xff"}\n'), "line 13", "not valid JSON"),
    "no file name": (lambda m: m.write_text(m.read_text() + "[1]\n"), "line 13", "no file_name"),
    "outside": (lambda m: edit(m, 2, file_name="../1.png"), "line 2 (../1.png)", "leads out of the folder"),
    "absolute": (lambda m: edit(m, 2, file_name="/etc/passwd"), "line 2 (/etc/passwd)", "leads out of the folder"),
    "label that is a list": (lambda m: edit(m, 2, label=[1]), "line 2 (1.png)", "label [1]"),
    "label that is a truth": (lambda m: edit(m, 2, label=True), "line 2 (1.png)", "label True"),
}


@pytest.mark.parametrize("kind", BAD)
def test_each_bad_row_is_one_clear_line(tmp_path, kind):
    metadata = folder(tmp_path / "own")
    spoil, where, what = BAD[kind]
    spoil(metadata)
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path / "own"), "train", 32)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "own") in message and len(message) < 500
    assert where in message and what in message and "skip_bad_rows" in message


def test_small_pictures_are_enlarged_where_asked(tmp_path):
    """As PIL does it, and the centre of the longer side."""
    metadata = folder(tmp_path / "own")
    small = picture(50, 20)
    small.save(metadata.parent / "5.png")
    rows = load_data(DataConfig(source=str(tmp_path / "own"), enlarge=True), "train", 32)
    image = rows[rows.ids.index("5.png")]["image"]
    expected = small.resize((80, 32), Image.Resampling.BICUBIC).crop((24, 0, 56, 32))
    assert (image.permute(1, 2, 0).numpy() == np.asarray(expected)).all()


@pytest.mark.parametrize("kind", BAD)
def test_each_bad_row_can_be_skipped_and_is_counted(tmp_path, kind, capsys):
    spoil = BAD[kind][0]
    spoil(folder(tmp_path / "own"))
    config = DataConfig(source=str(tmp_path / "own"), skip_bad_rows=True)
    rows = load_data(config, "train", 32)
    assert sum(rows.skipped.values()) >= 1 and len(rows[0]["caption"]) > 0
    assert capsys.readouterr().out.count("skipped") == 1
    again = load_data(config, "train", 32)
    assert again.skipped == rows.skipped and again.ids == rows.ids
    assert "skipped" not in capsys.readouterr().out


def test_many_bad_rows_are_counted_by_kind(tmp_path):
    metadata = folder(tmp_path / "own")
    edit(metadata, 3, caption="")
    edit(metadata, 4, caption="")
    truncate(tmp_path / "own" / "7.png")
    rows = load_data(DataConfig(source=str(tmp_path / "own"), skip_bad_rows=True), "train", 32)
    assert rows.skipped == {"no caption": 2, "unreadable picture": 1}
    assert not {"2.png", "3.png", "7.png"} & set(rows.ids)
    with pytest.raises(DataError, match=r"line 3 .*\(2 more"):
        load_data(str(tmp_path / "own"), "train", 32)


def test_a_caption_of_1000_words_is_fine(tmp_path):
    metadata = folder(tmp_path / "own" / "train", 2)
    edit(metadata, 1, caption="word " * 1_000)
    assert len(load_data(str(tmp_path / "own"), "train", 32).captions[0].split()) == 1_000


@pytest.mark.parametrize("source", ["nosuch", "/no/such/folder", "openmoji-scene", "a/b/c"])
def test_a_source_that_is_nothing(source):
    with pytest.raises(DataError, match="there is no data"):
        load_data(source)


def test_folders_without_rows(tmp_path):
    (tmp_path / "own").mkdir()
    with pytest.raises(DataError, match=r"own has no metadata\.jsonl: write one"):
        load_data(str(tmp_path / "own"))
    (tmp_path / "own" / "metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match="split 'train' is empty"):
        load_data(str(tmp_path / "own"))
    folder(tmp_path / "own", 1)
    empty = "train" if own_data.is_for_test("0.png") else "test"
    with pytest.raises(DataError, match=f"split '{empty}' is empty"):
        load_data(str(tmp_path / "own"), empty)


def test_made_sets_say_which_splits_exist():
    with pytest.raises(DataError, match=r"openmoji has no split 'zero-shot'; there are: train, test"):
        load_data("openmoji", "zero-shot")
    with pytest.raises(DataError, match=r"there are: train, test, zero-shot"):
        load_data(SMALL, "validation")
    with pytest.raises(DataError, match="objects must be"):
        load_data(DataConfig(objects=5_000), "test")
    with pytest.raises(DataError, match="image_size"):
        load_data(SMALL, "test", 4)


def test_the_verdict_is_kept_until_something_changes(tmp_path, monkeypatch):
    metadata = folder(tmp_path / "own")
    checked = []
    real = own_data.problem_of
    monkeypatch.setattr(own_data, "problem_of", lambda row, smallest: checked.append(1) or real(row, smallest))
    load_data(str(tmp_path / "own"), "train", 32)
    assert len(checked) == 12
    load_data(str(tmp_path / "own"), "train", 32)
    assert len(checked) == 12, "checked again although nothing changed"
    load_data(str(tmp_path / "own"), "train", 24)
    assert len(checked) == 24, "another image size must be checked"
    truncate(tmp_path / "own" / "3.png")
    with pytest.raises(DataError, match=r"3\.png"):
        load_data(str(tmp_path / "own"), "train", 32)
    picture(seed=3).save(tmp_path / "own" / "3.png")
    os.utime(metadata, (1, 1))
    load_data(str(tmp_path / "own"), "train", 32)
    assert len(checked) == 48


# --- Hub data sets ------------------------------------------------------------------------------------------


HUB = {"source": "someone/pictures", "image_column": "picture", "caption_column": "text"}


def hub(monkeypatch, splits: dict[str, int], labels=None):
    """A stand-in for the network; everything behind it is real `datasets`."""
    features = {"picture": datasets.Image(), "text": datasets.Value("string")}
    tables = {}
    for split, count in splits.items():
        columns = {"picture": [picture(seed=i) for i in range(count)], "text": [f"hub {i}" for i in range(count)]}
        if labels:
            columns["label"] = [i % 2 for i in range(count)]
        known = datasets.Features(features | ({"label": labels} if labels else {}))
        tables[split] = datasets.Dataset.from_dict(columns, known)
    monkeypatch.setattr(own_data, "load_from_hub", lambda name: datasets.DatasetDict(tables))
    return tables


def test_a_hub_set_with_column_names(monkeypatch):
    hub(monkeypatch, {"train": 5, "test": 3}, datasets.ClassLabel(names=["cat", "dog"]))
    config = DataConfig(**HUB)
    rows = load_data(config, "test", 32)
    assert rows.captions == ["hub 0", "hub 1", "hub 2"] and rows.label_names == ["cat", "dog"]
    assert rows.labels.tolist() == [0, 1, 0]
    assert np.array_equal(rows[1]["image"].permute(1, 2, 0), fit(picture(seed=1), 32))
    with pytest.raises(DataError, match=r"no column 'image': set data\.image_column to one of picture, text"):
        load_data("someone/pictures", "test", 32)
    with pytest.raises(DataError, match="no split 'zero-shot'; there are: train, test"):
        load_data(config, "zero-shot", 32)


def test_a_hub_set_without_a_test_split_keeps_a_tenth(monkeypatch):
    hub(monkeypatch, {"train": 100}, datasets.Value("int64"))
    config = DataConfig(**HUB)
    train, test = (load_data(config, split, 32) for split in ("train", "test"))
    assert len(train) + len(test) == 100 and 2 <= len(test) <= 25 and not set(train.ids) & set(test.ids)
    assert test.captions[0] == f"hub {test.ids[0]}" and test.label_names == ["0", "1"]


def test_a_hub_sets_validation_split_serves_for_testing(monkeypatch):
    hub(monkeypatch, {"train": 5, "validation": 3})
    config = DataConfig(source="someone/pictures", image_column="picture", caption_column="text")
    test, same, train = (load_data(config, split) for split in ("test", "validation", "train"))
    assert len(test) == 3 and test.captions == same.captions and len(train) == 5


def test_a_hub_set_with_the_usual_column_names(monkeypatch):
    tables = hub(monkeypatch, {"train": 3, "test": 3})
    for split, table in tables.items():
        tables[split] = table.rename_columns({"picture": "image", "text": "caption"})
    rows = load_data("someone/pictures", "train", 32)
    assert rows.captions[1] == "hub 1" and rows[1]["image"].shape == (3, 32, 32) and rows[1]["label"] == -1


def test_a_gated_hub_set_says_what_to_accept(monkeypatch):
    def refuse(name):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' is a gated dataset on the Hub.")

    monkeypatch.setattr(own_data, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"accept its terms at \S+/datasets/ILSVRC/imagenet-1k, then `hf auth login`"):
        load_data("ILSVRC/imagenet-1k", "train", 32)


def test_a_mirror_never_makes_a_caption_false():
    images = torch.arange(5 * 3 * 2 * 4).reshape(5, 3, 2, 4).float()
    captions = ["a dog", "a dog on the left", "a cat", "a sign that reads STOP", "A bright owl"]
    seen = data.mirrored(images, captions, torch.tensor([0.1, 0.1, 0.6, 0.2, 0.49]))
    for i, flipped in enumerate([True, False, False, False, True]):
        assert torch.equal(seen[i], images[i].flip(-1) if flipped else images[i])


def test_bad_rows_of_a_hub_set_are_named(monkeypatch):
    tables = hub(monkeypatch, {"train": 5, "test": 3})
    config = DataConfig(**HUB)
    with pytest.raises(DataError, match=r"someone/pictures train row 0: .*40 pixels"):
        load_data(config, "train", 64)
    tables["test"] = tables["test"].remove_columns("text").add_column("text", ["a", None, "c"])
    with pytest.raises(DataError, match=r"someone/pictures test row 1: no caption"):
        load_data(config, "test", 32)
    rows = load_data(DataConfig(**HUB, skip_bad_rows=True), "test", 32)
    assert rows.ids == ["0", "2"] and rows.skipped == {"no caption": 1}


def test_without_a_network_it_is_one_line_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code = "from textok_mini.data import load_data; load_data('someone/pictures')"
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DataError: data set 'someone/pictures' is no folder here and cannot be had" in result.stderr
    assert "Retrying" not in result.stderr and time.monotonic() - start < 30


# --- The command line ---------------------------------------------------------------------------------------


def test_prepare_says_what_it_made(home, capsys):
    assert data.main(["prepare", "image_size=16", "data.scenes=20", "data.objects=9"]) == 0
    printed = capsys.readouterr().out
    assert "openmoji-scenes train: 20 pictures of 16 px" in printed and "zero-shot: 40 pictures" in printed
    assert "CC BY-SA 4.0" in printed and {p.stem for p in home.rglob("*.arrow")} == {"train", "test", "zero-shot"}


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["prepare", "size=32"], "unknown setting 'size'"),
        (["prepare", "image_size=big"], "image_size must be a whole number"),
        (["prepare", "data.scene=3"], "data.scene"),
        (["prepare", "data.scenes=many"], "data.scenes"),
        (["prepare", "data=nowhere"], "there is no data 'nowhere'"),
        (["prepare", "data"], "KEY=VALUE"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(capsys, arguments, line):
    assert data.main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert line in message and "\n" not in message


@pytest.mark.parametrize("arguments, code", [([], 2), (["show"], 2), (["--help"], 0)])
def test_without_prepare_it_prints_its_help(capsys, arguments, code):
    assert data.main(arguments) == code and "prepare data=openmoji-scenes" in capsys.readouterr().out


def test_a_scene_survives_its_column():
    rows = load_data(SMALL, "test", 16)
    assert Scene.from_json(rows.table[0]["scene"]) == rows.scene(0)
    pixels = rows.table[0]["image"]
    assert hashlib.sha256(pixels).digest() == hashlib.sha256(render(rows.scene(0), 16).tobytes()).digest()
