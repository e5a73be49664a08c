"""Anyone's own pictures: a folder in `datasets`' imagefolder form, or a hub data set; each row is checked.

A folder holds pictures and a `metadata.jsonl` of one line a picture, {"file_name": "a.png", "caption": "...",
"label": "cat"}; the label is optional. It may consist of such folders, one a split (`train/`, `test/`). Where
there is no test split, a tenth of the rows is kept for it. `datasets` checks nothing when it loads, so every
row is checked here, once: the verdict is kept until a file, its time or a setting changes.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from textok_mini.config import DataConfig
from textok_mini.paths import data_dir

CHECKS = 1  # raise it whenever a row would be judged otherwise: kept verdicts are found by it
HELD_OUT_SHARE = 0.1  # of rows, where there is no test split
MOST_WORDS = 1_000
METADATA = "metadata.jsonl"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
HUB_PATIENCE = 5.0  # seconds until a hub that does not answer counts as out of reach


class DataError(ValueError):
    """Data that cannot be used: one line that names the file and the row, and says what to do."""


@dataclass(frozen=True)
class Row:
    """One row as it was found, not yet believed: `where` is how an error names it."""

    where: str
    id: str
    caption: Any
    label: Any
    open: Callable[[], Image.Image]


Problem = tuple[str, str]  # its kind, for counting, and its line


@dataclass(frozen=True)
class Found:
    """The good rows of one split: `table` has the column `image`; the lists have an entry for each row."""

    table: datasets.Dataset
    ids: list[str]
    captions: list[str]
    labels: list[int]
    label_names: list[str]
    skipped: dict[str, int]


def digest(value: Any) -> str:
    """The same ten letters for the same plain values, on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def is_for_test(key: str) -> bool:
    """Whether a row is held out: by a hash of its name, so that new rows never move old ones."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < HELD_OUT_SHARE * 2**32


def known_split(split: str, splits: Iterable[str], source: str) -> None:
    if split not in splits:
        raise DataError(f"{source} has no split {split!r}; there are: {', '.join(splits)}")


def open_picture(stored: dict) -> Image.Image:
    """A picture as `datasets` stores it: {"bytes": ..., "path": ...}."""
    return Image.open(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"])


def fit(picture: Image.Image, image_size: int) -> np.ndarray:
    """uint8 (image_size, image_size, 3): turned as its EXIF says, over white, shorter side resized (bicubic,
    antialiased), centre cut out."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # PIL would clip 16 bits to 8 instead of scaling them
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    width, height = (max(image_size, round(side * image_size / min(picture.size))) for side in picture.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + image_size, top + image_size)))


# --- Checking -----------------------------------------------------------------------------------------------


def problem_of(row: Row, image_size: int) -> Problem | None:
    """What is wrong with a row, if anything; decodes its whole picture."""
    if not isinstance(row.caption, str) or not row.caption.strip():
        return "no caption", f"{row.where}: no caption; give it a text of at least one word"
    if (words := len(row.caption.split())) > MOST_WORDS:
        return (
            "long caption",
            f"{row.where}: its caption has {words:,} words; at most {MOST_WORDS:,} are allowed",
        )
    if isinstance(row.label, bool) or not isinstance(row.label, (int, str, type(None))):
        return "bad label", f"{row.where}: label {row.label!r} must be a text or a whole number"
    try:
        with row.open() as picture:
            shorter = min(ImageOps.exif_transpose(picture).size)  # decodes it, to its last byte
    except FileNotFoundError:
        return "no picture", f"{row.where}: there is no such file; add the picture or delete the line"
    except Exception as error:  # PIL has a dozen kinds for a broken picture; the row is bad whichever it is
        reason = " ".join(str(error).split()) or type(error).__name__
        return "unreadable picture", f"{row.where}: the picture cannot be read ({reason}); replace it"
    if shorter < image_size:
        return "tiny picture", (
            f"{row.where}: the picture's shorter side has {shorter} pixels, image_size is {image_size}; "
            "use a larger picture or a smaller image_size"
        )
    return None


def judge(
    source: str, splits: dict[str, list[Row]], problems: list[Problem], image_size: int, skip: bool
) -> dict:
    """Checks every row: {"splits": {split: [[id, caption, label], ...]}, "skipped": {kind: count}}.

    Raises DataError for the first bad row, unless `skip`, which leaves bad rows out and says how many."""
    rows = [row for split in splits.values() for row in split]
    print(f"checking {len(rows):,} rows of {source}, once ...", flush=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # decoding lets other threads run
        check = partial(problem_of, image_size=image_size)
        found = list(tqdm(pool.map(check, rows), "checking", len(rows), unit=" rows", disable=None))
    bad = {row.where for row, problem in zip(rows, found, strict=True) if problem}
    problems = problems + [problem for problem in found if problem]
    if problems and not skip:
        more = f" ({len(problems) - 1} more like this)" if problems[1:] else ""
        raise DataError(f"{problems[0][1]}; data.skip_bad_rows=true leaves bad rows out{more}")
    skipped = dict(Counter(kind for kind, _ in problems).most_common())
    if skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        print(f"{source}: skipped {len(problems)} bad rows: {counts}")
    good = {
        split: [[row.id, " ".join(row.caption.split()), row.label] for row in rows if row.where not in bad]
        for split, rows in splits.items()
    }
    return {"splits": good, "skipped": skipped}


def verdict(key: list, make: Callable[[], dict]) -> dict:
    """The kept verdict under `key`, or a new one."""
    path = data_dir() / "verified" / f"{digest([CHECKS, *key])}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    os.replace(unfinished, path)
    return result


def held_apart(rows: list[list], split: str) -> list[list]:
    """The part for `split` ("train" or "test") of rows that came without a test split."""
    return [row for row in rows if is_for_test(row[0]) == (split == "test")]


def columns_of(rows: list[list], split: str, source: str) -> tuple[list, list, list]:
    """Ids, captions and labels; no rows are an error."""
    if not rows:
        raise DataError(f"{source}: split {split!r} is empty; add pictures, or make a folder for each split")
    ids, captions, labels = zip(*rows, strict=True)
    return list(ids), list(captions), list(labels)


def names_of(labels: Iterable[Any]) -> list[str]:
    """All labels as text, whole numbers in their order before words in theirs."""
    names = {str(label) for label in labels if label is not None}
    return sorted(
        names, key=lambda name: (0, int(name), "") if re.fullmatch(r"-?[0-9]+", name) else (1, 0, name)
    )


def indices(labels: Iterable[Any], names: list[str]) -> list[int]:
    order = {name: index for index, name in enumerate(names)}
    return [-1 if label is None else order[str(label)] for label in labels]


# --- A folder -----------------------------------------------------------------------------------------------


def folder_rows(root: Path) -> tuple[dict[str, list[Row]], list[Problem]]:
    """All rows by split, and what is wrong with the list itself."""
    lists = [root / METADATA] if (root / METADATA).is_file() else sorted(root.glob(f"*/{METADATA}"))
    if not lists:
        example = '{"file_name": "a.png", "caption": "a red apple"}'
        raise DataError(f"{root} has no {METADATA}: write one, a line a picture, like {example}")
    splits: dict[str, list[Row]] = {}
    problems: list[Problem] = []
    lines: dict[str, str] = {}  # of a picture: where its line is
    for path in lists:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
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
            file = os.path.normpath(os.path.relpath(path.parent / name, root))
            opener = partial(Image.open, root / file)
            row = Row(f"{where} ({name})", file, values.get("caption"), values.get("label"), opener)
            if Path(name).is_absolute() or file.startswith(".."):
                message = f"{row.where}: leads out of the folder; copy the picture into it"
                problems.append(("outside", message))
            elif file in lines:
                message = f"{row.where}: {lines[file]} has this picture too; delete one line"
                problems.append(("duplicate", message))
            else:
                lines[file] = f"line {number}"
                splits.setdefault(split_of(Path(file), path.parent != root), []).append(row)
    for file in sorted(root.rglob("*")):
        is_picture = file.suffix.lower() in PICTURES and not file.name.startswith(".")
        if is_picture and str(file.relative_to(root)) not in lines:
            problems.append(("no line", f"{file}: {METADATA} has no line for it; add one or delete the file"))
    return splits, problems


def split_of(file: Path, split_folders: bool) -> str:
    """A picture's split: the folder with its own list, or `train/`, `test/`, ... under a list for all."""
    first = file.parts[0]
    return first if split_folders or first in ("test", "validation", "zero-shot") else "train"


def check_folder(root: Path, config: DataConfig, split: str, image_size: int) -> Found:
    """The good rows of one split of a folder. Raises DataError."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    listing = [[str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    def make() -> dict:
        return judge(str(root), *folder_rows(root), image_size, config.skip_bad_rows)

    result = verdict([str(root), listing, image_size, config.skip_bad_rows], make)
    splits = result["splits"]
    label_names = names_of(row[2] for rows in splits.values() for row in rows)
    if not set(splits) - {"train"}:
        splits = {name: held_apart(splits.get("train", []), name) for name in ("train", "test")}
    known_split(split, splits, str(root))
    ids, captions, labels = columns_of(splits[split], split, str(root))
    pictures = [{"path": str(root / file), "bytes": None} for file in ids]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": pictures}, features)
    return Found(table, ids, captions, indices(labels, label_names), label_names, result["skipped"])


# --- A hub data set -----------------------------------------------------------------------------------------


def load_from_hub(name: str) -> datasets.DatasetDict:
    """All splits; asks once whether the hub answers, because `datasets` alone would retry for 40 s."""
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(name, timeout=HUB_PATIENCE)
        return datasets.load_dataset(name)
    except Exception as error:  # the hub's and the network's own kinds of errors, which change by version
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(
            f"data set {name!r} is no folder here and cannot be had from the hub ({reason}); check its name "
            "and the network, or set HF_HUB_OFFLINE=1 if it was downloaded before"
        ) from error


def check_hub(config: DataConfig, split: str, image_size: int) -> Found:
    """The good rows of one split of a hub data set, by the column names of `config`. Raises DataError."""
    source, image, text, label = (
        config.source,
        config.image_column,
        config.caption_column,
        config.label_column,
    )
    tables = load_from_hub(source)
    undivided = set(tables) == {"train"}
    known_split(split, ("train", "test") if undivided else tables, source)
    home = "train" if undivided else split
    table = tables[home]
    for key, column in (("image_column", image), ("caption_column", text)):
        if column not in table.column_names:
            there = ", ".join(table.column_names)
            raise DataError(f"{source} has no column {column!r}: set data.{key} to one of {there}")
    if not isinstance(table.features[image], datasets.Image):
        raise DataError(f"{source}: column {image!r} holds no pictures but {table.features[image]}")
    pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    if image != "image":
        pictures = pictures.rename_column(image, "image")

    def make() -> dict:
        labels = table[label] if label in table.column_names else [None] * len(table)
        rows = [
            Row(
                f"{source} {home} row {i}",
                str(i),
                caption,
                value,
                lambda i=i: open_picture(pictures[i]["image"]),
            )
            for i, (caption, value) in enumerate(zip(table[text], labels, strict=True))
        ]
        return judge(f"{source} {home}", {home: rows}, [], image_size, config.skip_bad_rows)

    key = [source, home, table._fingerprint, image, text, label, image_size, config.skip_bad_rows]
    result = verdict(key, make)
    rows = held_apart(result["splits"][home], split) if undivided else result["splits"][home]
    ids, captions, labels = columns_of(rows, split, source)
    if isinstance(table.features.get(label), datasets.ClassLabel):  # its numbers are indices already
        label_names = table.features[label].names
        labels = [-1 if value is None else value for value in labels]
    else:
        label_names = names_of(v for t in tables.values() if label in t.column_names for v in t.unique(label))
        labels = indices(labels, label_names)
    return Found(
        pictures.select([int(i) for i in ids]), ids, captions, labels, label_names, result["skipped"]
    )
