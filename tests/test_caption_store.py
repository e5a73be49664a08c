"""The captions' store: nothing lost, doubled or mixed, whatever is written in it and whoever writes."""

import hashlib
import json
import subprocess
import sys
import threading

import datasets
import pyarrow.parquet as pq
import pytest

from textok_mini.caption_store import COLUMNS, CaptionStore, read_captions, storable
from textok_mini.own_data import DataError

SETTINGS = {"model": "m", "revision": "r", "prompt": "p", "words": 75, "licence": "mit", "temperature": 0.7}


def row(name: str, number: int = 0, caption: str | None = "a dog", **others) -> dict:
    return {"file_name": name, "number": number, "caption": caption, **others}


def put(store: CaptionStore, *rows: dict) -> None:
    for r in rows:
        store.add(store.bucket_of(r["file_name"]), [r])


def test_rows_come_back_sorted_and_typed(tmp_path):
    store = CaptionStore.open(tmp_path / "s", SETTINGS, pictures=20_000)
    assert store.buckets == 79  # 20,000 / 256 = 78.1
    put(store, row("b.png", 1, "second"), row("b.png", 0, "first", words=1, seed=3, seconds=0.5))
    put(store, row("a/c.png", 0, None, error="unreadable"), row("a.png"))
    rows = store.read()
    assert isinstance(rows, datasets.Dataset) and rows.column_names == COLUMNS.names
    keys = [(r["file_name"], r["number"]) for r in rows]
    assert keys == [("a.png", 0), ("a/c.png", 0), ("b.png", 0), ("b.png", 1)]
    assert rows[2]["seed"] == 3 and rows[2]["seconds"] == 0.5 and rows[1]["caption"] is None
    assert read_captions(tmp_path / "s") == {"a.png": "a dog", "b.png": "first"}
    assert read_captions(tmp_path / "s", 1) == {"b.png": "second"}


def test_buckets_follow_from_the_name(tmp_path):
    store = CaptionStore.open(tmp_path, SETTINGS, pictures=25_000)
    for name in ("a.png", "é/ü.png", "b c.png"):
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 98
        assert store.buckets == 98 and store.bucket_of(name) == bucket
        put(store, row(name))
        assert [r["file_name"] for r in store.rows(bucket)].count(name) == 1
        assert pq.read_table(tmp_path / f"bucket-{bucket:05d}.parquet", partitioning=None).schema.equals(COLUMNS)


def test_an_empty_store_and_an_empty_addition(tmp_path):
    store = CaptionStore.open(tmp_path, SETTINGS, pictures=0)
    store.add(0, [])
    assert store.buckets == 16 and len(store.read()) == 0 and read_captions(tmp_path) == {}
    assert store.rows(0) == [] and not list(tmp_path.glob("*.parquet"))


def test_the_first_row_of_a_key_stays(tmp_path):
    store = CaptionStore.open(tmp_path / "key=value", SETTINGS, pictures=1)  # a name that parquet readers interpret
    put(store, row("a.png", 0, "one"), row("a.png", 0, "two"))
    store.add(0, [row("b.png", 0, "three"), row("b.png", 0, "four")])
    assert [r["caption"] for r in store.read()] == ["one", "three"]
    assert store.read().column_names == COLUMNS.names


ODD = {
    "newlines": "two\nlines\r\nand\ttabs",
    "right to left": "קוף \u202eעל\u202c עץ",
    "markup": '<b onclick="x()">&amp;</b> {{ x }} `$(rm)` \\n %s',
    "controls": "\x00NUL \x1b[31mred\x07 \x7f",
    "emoji": "👩🏽‍🚀 \U0001f1e9\U0001f1ea",
    "long": "word " * 200_000,
    "blank": "  ",
    "mark": "\ufeffbegins with a byte order mark",
}


@pytest.mark.parametrize("kind", ODD)
def test_captions_are_data(tmp_path, kind):
    store = CaptionStore.open(tmp_path, SETTINGS, pictures=300)
    put(store, row(ODD[kind][:40], 0, ODD[kind]))
    assert read_captions(tmp_path) == {ODD[kind][:40]: ODD[kind]}


def test_surrogates_are_joined_or_replaced(tmp_path):
    assert storable("a \ud83d\ude00 b") == "a 😀 b"  # both halves, as broken JSON readers leave them
    assert storable("a\ud83d") == "a\ufffd" and storable("\ude00b") == "\ufffdb" and storable("\ud83dab") == "\ufffdab"
    store = CaptionStore.open(tmp_path, SETTINGS, pictures=300)
    put(store, row("caf\udce9.png", 0, "half \udc00."))
    assert read_captions(tmp_path) == {"caf\ufffd.png": "half \ufffd."}


@pytest.mark.parametrize("change", [{"prompt": "q"}, {"words": 50, "model": "n"}, {"new": 1}])
def test_other_settings_are_refused_by_name(tmp_path, change):
    CaptionStore.open(tmp_path, SETTINGS, pictures=1_000)
    with pytest.raises(DataError, match="choose another store") as caught:
        CaptionStore.open(tmp_path, SETTINGS | change, pictures=1_000)
    message = str(caught.value)
    assert ", ".join(sorted(change)) in message and "\n" not in message and "licence" not in message


def test_the_same_settings_go_on_and_buckets_never_change(tmp_path):
    CaptionStore.open(tmp_path, SETTINGS, pictures=20_000)
    again = CaptionStore.open(tmp_path, SETTINGS | {"licence": "unknown"}, pictures=99_999)
    assert again.buckets == 79 and again.settings["licence"] == "mit"
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS | {"buckets": 79}


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_folder_that_is_no_store_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "settings.json").write_text(text)
    with pytest.raises(DataError, match="is no caption store") as caught:
        read_captions(tmp_path)
    assert "\n" not in str(caught.value)


FILL = """
import sys
import threading
from textok_mini.caption_store import CaptionStore
folder, part, settings = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
store = CaptionStore.open(folder, settings, pictures=400)
names = [f"{i}.png" for i in range(60)]
for name in names[part::2] + names[:5]:
    row = {"file_name": name, "number": 0, "caption": f"{name} says {name}"}
    store.add(store.bucket_of(name), [row])
"""


def test_several_processes_in_the_same_buckets_lose_nothing(tmp_path):
    commands = [[sys.executable, "-c", FILL, str(tmp_path), str(part), repr(SETTINGS)] for part in (0, 1, 1)]
    assert [process.wait() for process in [subprocess.Popen(command) for command in commands]] == [0, 0, 0]
    names = sorted(f"{i}.png" for i in range(60))
    assert CaptionStore(tmp_path).read()["file_name"][:] == names
    assert read_captions(tmp_path) == {name: f"{name} says {name}" for name in names}


def test_a_store_can_be_read_while_it_grows(tmp_path):
    """A reader gets one state of a file or the next, never the end of one with the beginning of another."""
    store = CaptionStore.open(tmp_path / "s", {"model": "m"}, pictures=1)
    done = threading.Event()

    def grow():
        for i in range(150):
            store.add(0, [row(f"{i}.png", 0, "word " * (i + 1))])
        done.set()

    writer = threading.Thread(target=grow)
    writer.start()
    counts = [0]
    while not done.is_set():
        counts.append(len(store.rows(0)))
    writer.join()
    assert counts == sorted(counts) and len(set(counts)) > 10 and len(store.rows(0)) == 150
