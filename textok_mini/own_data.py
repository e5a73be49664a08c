"""Anyone's own pictures: a folder in `datasets`' imagefolder form, or a hub data set; each row is checked.

A folder holds pictures and a `metadata.jsonl` of one line a picture, {"file_name": "a.png", "caption": "...", "label":
"cat"}; the label is optional. It may consist of such folders, one a split (`train/`, `test/`). Where there is no test
split, a tenth of the rows is kept for it. The verdict on the rows is kept until a file, its time or a setting changes.
Where captions come from a store, pictures in folders of their class (and split) are enough.
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from huggingface_hub import constants
from PIL import Image, ImageOps
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from textok_mini.command import Complaint
from textok_mini.config import DataConfig
from textok_mini.hub import hub_reachable
from textok_mini.paths import data_dir, write_text

CHECKS = 3  # raise it whenever a row would be judged otherwise: kept verdicts are found by it
HELD_OUT_SHARE = 0.1  # of rows, where there is no test split
MOST_WORDS = 1_000
METADATA = "metadata.jsonl"
VALIDATION = ("validation", "val", "valid", "dev")  # names of splits that serve for testing where there is no test
HELD_OUT = ("test", "zero-shot", *VALIDATION)
HUB_ID = r"[\w.-]+/[\w.-]+"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

AS_STORED = datasets.Image(decode=False)  # {"bytes": ..., "path": ...}
decode = datasets.Image().decode_example  # of such a picture


class DataError(Complaint):
    """Data that cannot be used: one line that names the file and the row, and says what to do."""


class Row(NamedTuple):
    """One row as it was found, not yet believed: `where` is how an error names it."""

    where: str
    id: str
    caption: Any
    label: Any
    open: Callable[[], Image.Image]


def digest(value: Any) -> str:
    """The same ten letters for the same plain values, on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def is_for_test(key: str) -> bool:
    """Whether a row is held out: by a hash of its name, so that new rows never move old ones."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < HELD_OUT_SHARE * 2**32


def known_split(split: str, splits: Iterable[str], source: str) -> None:
    if split not in splits:
        raise DataError(f"{source} has no split {split!r}; there are: {', '.join(splits)}")


def upright(picture: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF says, over white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # PIL would clip 16 bits to 8 instead of scaling them
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fit(picture: Image.Image, image_size: int) -> np.ndarray:
    """uint8 (image_size, image_size, 3): upright, shorter side resized, centre cut."""
    picture = upright(picture)
    width, height = (max(image_size, round(side * image_size / min(picture.size))) for side in picture.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + image_size, top + image_size)))


def problem_of(row: Row, smallest: int) -> tuple[str, str] | None:
    """What is wrong with a row, if anything: its kind, for counting, and its text. Decodes the whole picture, whose
    shorter side must have `smallest` pixels."""
    if not isinstance(row.caption, str) or not row.caption.strip():
        return "no caption", "no caption; give it a text of at least one word"
    if (words := len(row.caption.split())) > MOST_WORDS:
        return "long caption", f"its caption has {words:,} words; at most {MOST_WORDS:,} are allowed"
    if isinstance(row.label, bool) or not isinstance(row.label, (int, str, type(None))):
        return "bad label", f"label {row.label!r} must be a text or a whole number"
    try:
        with row.open() as picture:
            shorter = min(ImageOps.exif_transpose(picture).size)  # decodes it, to its last byte
    except FileNotFoundError:
        return "no picture", "there is no such file; add the picture or delete the line"
    except Exception as error:  # PIL has a dozen kinds for a broken picture; the row is bad whichever it is
        reason = " ".join(str(error).split()) or type(error).__name__
        return "unreadable picture", f"the picture cannot be read ({reason}); replace it"
    if shorter < smallest:
        sizes = f"the picture's shorter side has {shorter} pixels, image_size is {smallest}"
        return "tiny picture", f"{sizes}; use a larger picture, a smaller image_size or data.enlarge=true"
    return None


def judge(source: str, key: list, find: Callable[[], tuple], config: DataConfig, image_size: int) -> dict:
    """The good rows: {"splits": {split: [[id, caption, label], ...]}, "skipped": {kind: count}}.

    Made once and kept under `key`; `find` gives all rows by split, and what is wrong with their list. Raises DataError
    for the first bad row, unless bad rows are to be skipped."""
    smallest = 1 if config.enlarge else image_size
    path = data_dir() / "verified" / f"{digest([CHECKS, *key, smallest, config.skip_bad_rows])}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    splits, problems = find()
    rows = [row for split in splits.values() for row in split]
    print(f"checking {len(rows):,} rows of {source}, once ...", flush=True)
    check, workers = partial(problem_of, smallest=smallest), min(32, os.cpu_count() or 1)
    # Threads, because decoding lets other threads run. disable=None: a bar on a terminal, none in a log file.
    found = thread_map(check, rows, max_workers=workers, tqdm_class=tqdm, desc="checking", unit=" rows", disable=None)
    bad = {row.where: problem for row, problem in zip(rows, found, strict=True) if problem}
    problems = problems + [(kind, f"{where}: {text}") for where, (kind, text) in bad.items()]
    if problems and not config.skip_bad_rows:
        more = f" ({len(problems) - 1} more like this)" if problems[1:] else ""
        raise DataError(f"{problems[0][1]}; data.skip_bad_rows=true leaves bad rows out{more}")
    if skipped := dict(Counter(kind for kind, _ in problems).most_common()):
        counts = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        print(f"{source}: skipped {len(problems)} bad rows: {counts}")
    if "test" not in splits and (held_out := [name for name in VALIDATION if name in splits]):
        splits["test"] = splits[held_out[0]]
    if set(splits) <= {"train"}:  # no split for testing
        splits = {name: [row for row in rows if is_for_test(row.id) == (name == "test")] for name in ("train", "test")}
    verdict = {"splits": {}, "skipped": skipped}
    for split, rows in splits.items():
        verdict["splits"][split] = [[r.id, " ".join(r.caption.split()), r.label] for r in rows if r.where not in bad]
    write_text(path, json.dumps(verdict))
    return verdict


def columns_of(verdict: dict, split: str, names: list[str], source: str) -> dict:
    """One split's good rows as `CaptionedImages` takes them, but for their pictures."""
    known_split(split, verdict["splits"], source)
    if not (rows := verdict["splits"][split]):
        raise DataError(f"{source}: split {split!r} is empty; add pictures, or make a folder for each split")
    place = {name: index for index, name in enumerate(names)}
    ids, captions, labels = map(list, zip(*rows, strict=True))
    labels = [-1 if label is None else place[str(label)] for label in labels]
    return dict(ids=ids, captions=captions, labels=labels, label_names=names, skipped=verdict["skipped"])


def names_of(labels: Iterable[Any]) -> list[str]:
    """All labels as text, whole numbers in their order before words in theirs."""
    names = sorted({str(label) for label in labels if label is not None})
    return sorted(names, key=lambda name: int(name) if re.fullmatch(r"-?[0-9]+", name) else float("inf"))


def folder_rows(root: Path) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    """All rows by split, and what is wrong with the list itself."""
    lists = [root / METADATA] if (root / METADATA).is_file() else sorted(root.glob(f"*/{METADATA}"))
    if not lists:
        example = '{"file_name": "a.png", "caption": "a red apple"}'
        raise DataError(f"{root} has no {METADATA}: write one, a line a picture, like {example}")
    splits, problems, lines = defaultdict(list), [], {}  # lines: of a picture, the number of its line
    numbered = [(path, *line) for path in lists for line in enumerate(path.read_bytes().splitlines(), 1)]
    for path, number, line in numbered:
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(("bad line", f"{where}: not valid JSON ({error}); write one object a line"))
            continue
        name = values.get("file_name") if isinstance(values, dict) else None
        if not isinstance(name, str) or not name:
            problems.append(("bad line", f"{where}: no file_name; name the picture that the line is for"))
            continue
        where = f"{where} ({name})"
        file = os.path.normpath(os.path.relpath(path.parent / name, root))
        if Path(name).is_absolute() or file.startswith(".."):
            problems.append(("outside", f"{where}: leads out of the folder; copy the picture into it"))
        elif file in lines:
            problems.append(("duplicate", f"{where}: line {lines[file]} has this picture too; delete one line"))
        else:
            lines[file] = number
            top = Path(file).parts[0]  # the folder with this list, or `test/`, ... under a list for all
            split = top if path.parent != root or top in HELD_OUT else "train"
            row = Row(where, file, values.get("caption"), values.get("label"), partial(Image.open, root / file))
            splits[split].append(row)
    for file in pictures_in(root):
        if str(file.relative_to(root)) not in lines:
            problems.append(("no line", f"{file}: {METADATA} has no line for it; add one or delete the file"))
    return splits, problems


def pictures_in(root: Path) -> list[Path]:
    return [f for f in sorted(root.rglob("*")) if f.suffix.lower() in PICTURES and not f.name.startswith(".")]


def captioned_rows(root: Path, captions: Mapping[str, str]) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    """The same with `captions` by file name, a store's. Without metadata a picture's class is the folder it lies in."""
    if (root / METADATA).is_file() or any(root.glob(f"*/{METADATA}")):
        splits, problems = folder_rows(root)
    else:
        splits, problems = defaultdict(list), []
        for file in pictures_in(root):
            *folders, _ = name = file.relative_to(root).parts
            split = folders.pop(0) if folders and folders[0] in ("train", *HELD_OUT) else "train"
            row = Row(str(file), "/".join(name), None, folders[-1] if folders else None, partial(Image.open, file))
            splits[split].append(row)
    lacking = "the store has no caption of this picture; python -m textok_mini.captions makes it"
    rows = [row for rows in splits.values() for row in rows]
    problems += [("no caption", f"{row.where}: {lacking}") for row in rows if row.id not in captions]
    for name, rows in splits.items():
        splits[name] = [row._replace(caption=captions[row.id]) for row in rows if row.id in captions]
    return splits, problems


def check_folder(
    root: Path, config: DataConfig, split: str, image_size: int, captions: Mapping[str, str] | None = None
) -> dict:
    """The good rows of one split of a folder, as `CaptionedImages` takes them; with `captions` by file name in place
    of its own. Raises DataError."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    listing = [[str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = [str(root), listing, captions and digest(captions)]
    find = partial(folder_rows, root) if captions is None else partial(captioned_rows, root, captions)
    verdict = judge(str(root), key, find, config, image_size)
    names = names_of(row[2] for rows in verdict["splits"].values() for row in rows)
    columns = columns_of(verdict, split, names, str(root))
    pictures = {"image": [str(root / file) for file in columns["ids"]]}
    return columns | {"table": datasets.Dataset.from_dict(pictures, datasets.Features({"image": AS_STORED}))}


def load_from_hub(name: str) -> datasets.DatasetDict:
    """All splits; asks once whether the hub answers, because `datasets` alone would retry for 40 s."""
    try:
        if not constants.HF_HUB_OFFLINE and not hub_reachable():
            raise ConnectionError(f"{constants.ENDPOINT} cannot be reached")
        return datasets.load_dataset(name)
    except Exception as error:  # the hub's and the network's own kinds of errors, which change by version
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        message = f"data set {name!r} is no folder here and cannot be had from the hub ({reason})"
        hint = "check its name and the network, or set HF_HUB_OFFLINE=1 if it was downloaded before"
        if "gated" in str(error).lower():
            hint = f"accept its terms at {constants.ENDPOINT}/datasets/{name}, then `hf auth login`"
        raise DataError(f"{message}; {hint}") from error


def hub_pictures(table: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """The column of pictures alone, called `image`, undecoded. Raises DataError if there is none."""
    source, image = config.source, config.image_column
    if image not in table.column_names:
        there = ", ".join(table.column_names)
        raise DataError(f"{source} has no column {image!r}: set data.image_column to one of {there}")
    if not isinstance(table.features[image], datasets.Image):
        raise DataError(f"{source}: column {image!r} holds no pictures but {table.features[image]}")
    return table.select_columns([image]).rename_columns({image: "image"}).cast_column("image", AS_STORED)


def stored(pictures: datasets.Dataset, row: int) -> Image.Image:
    return decode(pictures[row]["image"])


def check_hub(config: DataConfig, split: str, image_size: int, captions: Mapping[str, str] | None = None) -> dict:
    """The good rows of one split of a hub data set, by the column names of `config`; with `captions` by SPLIT/ROW in
    place of its own. Raises DataError."""
    source, image, text, label = config.source, config.image_column, config.caption_column, config.label_column
    tables = load_from_hub(source)
    undivided = set(tables) == {"train"}
    held_out = ["train"] if undivided else [name for name in ("test", *VALIDATION) if name in tables]
    known_split(split, [*tables, *(["test"] if held_out else [])], source)
    table = tables[home := held_out[0] if split == "test" else split]
    pictures = hub_pictures(table, config)
    if captions is None and text not in table.column_names:
        there = ", ".join(table.column_names)
        raise DataError(f"{source} has no column {text!r}: set data.caption_column to one of {there}, or captions_from")
    told = table[text] if captions is None else [captions.get(f"{home}/{i}") for i in range(len(table))]
    names = getattr(table.features.get(label), "names", None)  # of a ClassLabel, whose values are numbers

    def find() -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
        labels = table[label] if label in table.column_names else [None] * len(table)
        if names:
            labels = [None if number in (None, -1) else names[number] for number in labels]
        pairs = enumerate(zip(told, labels, strict=True))
        rows = [Row(f"{source} {home} row {i}", str(i), *pair, partial(stored, pictures, i)) for i, pair in pairs]
        return {name: [] for name in tables} | {home: rows}, []

    key = [source, home, table._fingerprint, image, text, label, captions and digest(captions)]  # all that rows follow
    verdict = judge(f"{source} {home}", key, find, config, image_size)
    names = names or names_of(v for t in tables.values() if label in t.column_names for v in t.unique(label))
    columns = columns_of(verdict, split, names, source)
    return columns | {"table": pictures.select([int(row) for row in columns["ids"]])}
