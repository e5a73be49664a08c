"""Captions for pictures that have none, by a vision-language model, into a store that no kill can spoil.

    python -m textok_mini.captions data=path/to/pictures store=runs/captions model=Qwen/Qwen3-VL-2B-Instruct
    python -m textok_mini.captions ... captions=3 temperature=0.7 shard=0/8  # the first of eight machines

The same command again goes on where it stopped. Caption 0 of a picture is greedy, more are sampled. A picture that
cannot be read or captioned becomes a row with its error; `retry=true` tries those again. `data` is a folder of
pictures, or `openmoji-scenes`; all settings are in `Settings`.
"""

import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import transformers as hf
from PIL import Image
from tqdm import tqdm

from textok_mini.caption_store import CaptionStore, storable
from textok_mini.captioner import MODEL, PROMPT, Captioner, VLLMCaptioner, licence, trim
from textok_mini.command import command, first_line
from textok_mini.config import ConfigError, DataConfig, require
from textok_mini.data import MADE, CaptionedImages, load_data
from textok_mini.hub import from_hub, revision
from textok_mini.own_data import (
    HUB_ID,
    PICTURES,
    DataError,
    digest,
    fit,
    hub_pictures,
    known_split,
    load_from_hub,
    pictures_in,
    stored,
    upright,
)
from textok_mini.paths import resolve
from textok_mini.settings import apply_overrides, from_dict

ENGINES = {"transformers": Captioner, "vllm": VLLMCaptioner}
INSTALL = {"ray": "pip install -e '.[ray]'", "vllm": "pip install vllm, in an environment of its own"}
NARROW = 100  # times as long as wide: models refuse such a picture
IN_A_ROW = 16  # pictures that fail: it is not the pictures


@dataclass(frozen=True)
class Settings:
    store: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    split: str = ""  # of scenes, or a folder of the folder; all of them
    image_size: int = 0  # cut to a square as in training; 0: 64 for scenes, whole pictures for a folder
    longest_side: int = 1024  # pixels to which larger whole pictures are shrunk: what a model reads and costs
    model: str = MODEL
    revision: str = ""  # branch, tag or commit of a hub's model; its main branch
    prompt: str = PROMPT
    words: int = 75
    captions: int = 1  # of each picture; may grow later
    temperature: float = 0.7  # of all captions of a picture but the first
    seed: int = 0
    batch_size: int = 16  # vLLM is kept busy by some hundreds
    save_seconds: float = 30  # the most that a kill can cost
    retry: bool = False  # rows with an error
    shard: str = "0/1"
    workers: int = 0  # on Ray; 0 is without it
    engine: Literal["transformers", "vllm"] = "transformers"

    def __post_init__(self):
        require(self.store != "", "store", "a folder, as in store=runs/captions")
        for name in ("words", "captions", "batch_size", "temperature", "longest_side"):
            require(getattr(self, name) > 0, name, "above 0")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        require(part is not None and int(part[1]) < int(part[2]), "shard", "I/N with I below N, as in 0/8")


class Found(NamedTuple):
    """A picture to caption: what opens it, and how many bytes its file has (None for a made scene)."""

    open: Callable[[], Image.Image]
    bytes: int | None


def identity(c: Settings) -> dict:
    """All that captions depend on; runs that differ in any of it don't share a store."""
    network, folder = from_hub(hf.AutoConfig, c.model, "captioner", revision=c.revision or None), Path(c.model)
    kept = ("words", "temperature", "engine", "image_size", "longest_side", "seed")
    prompt = "" if network.model_type == "vision-encoder-decoder" else storable(c.prompt)  # it reads none
    settings = {name: getattr(c, name) for name in kept} | {"prompt": prompt, "prompt_hash": digest(prompt)}
    settings |= {"model": folder.name if folder.is_dir() else c.model}
    settings |= {"revision": revision(c.model, c.revision or None)}
    settings |= {"licence": licence(c.model), "data": Path(c.data.source).name}
    world = ("world_seed", "objects", "min_objects", "max_objects")
    return settings | ({name: getattr(c.data, name) for name in world} if c.data.source in MADE else {})


class Job:
    """A command's pictures, store and captioner: `run` and, on Ray, a call caption a bucket of the store."""

    def __init__(self, c: Settings):
        self.c, self.pictures, self.names, self.failed = c, find_pictures(c), {}, 0
        self.store = CaptionStore.open(c.store, identity(c), len(self.pictures))
        for name in self.pictures:
            self.names.setdefault(self.store.bucket_of(name), []).append(name)

    @cached_property
    def captioner(self) -> Captioner:
        c, commit = self.c, None if Path(self.c.model).is_dir() else self.store.settings["revision"]
        return ENGINES[c.engine](c.model, c.prompt, c.words, c.temperature, c.seed, commit)

    def pending(self, bucket: int) -> list[tuple[str, int]]:
        there = {
            (row["file_name"], row["number"], row["bytes"])
            for row in self.store.rows(bucket)
            if not (self.c.retry and row["error"])
        }
        keys = [(name, number) for name in self.names.get(bucket, []) for number in range(self.c.captions)]
        return [key for key in keys if (*key, self.pictures[key[0]].bytes) not in there]

    def __call__(self, row: dict) -> dict:
        return {"captions": sum(self.run(row["bucket"]))}

    def run(self, bucket: int) -> Iterator[int]:
        """Captions what the bucket lacks; yields how many captions each batch gave."""
        pending, rows, saved, size = self.pending(bucket), [], time.monotonic(), self.c.batch_size
        pixels = dict.fromkeys((name for name, _ in pending), 0)
        for name in pixels:
            with suppress(Exception), self.pictures[name].open() as picture:
                pixels[name] = picture.width * picture.height
        pending.sort(key=lambda key: (pixels[key[0]], key))  # a batch is padded to its largest picture
        try:
            for batch in [pending[i : i + size] for i in range(0, len(pending), size)]:
                rows += self.rows(batch)
                if time.monotonic() - saved >= self.c.save_seconds:
                    self.store.add(bucket, rows)
                    rows, saved = [], time.monotonic()
                yield len(batch)
        finally:
            self.store.add(bucket, rows)

    def rows(self, keys: list[tuple[str, int]]) -> Iterator[dict]:
        """A row for each (file name, number) of a batch."""
        begun, found, errors = time.monotonic(), {}, {}
        for name in {name for name, _ in keys}:
            try:
                found[name] = self.read(name)
            except Exception as error:  # PIL has a dozen kinds for a broken picture
                errors |= {key: f"the picture cannot be read ({error})" for key in keys if key[0] == name}
        texts = self.write([key for key in keys if key not in errors], found)
        errors |= {key: f"the captioner fails ({text})" for key, text in texts.items() if isinstance(text, Exception)}
        common = {name: self.store.settings[name] for name in ("model", "revision", "prompt_hash", "seed", "licence")}
        common |= {"seconds": (time.monotonic() - begun) / len(keys)}
        common |= {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        how = {"engine": self.c.engine, "dtype": str(self.captioner.dtype), "words": self.c.words}
        for key in keys:
            caption = None if key in errors else trim(texts[key], self.c.words)
            row = {"file_name": key[0], "number": key[1], "bytes": self.pictures[key[0]].bytes, "caption": caption}
            row |= {"error": " ".join(errors[key].split()) if key in errors else None}
            settings = json.dumps(how | {"temperature": self.c.temperature * (key[1] > 0)})
            yield common | row | {"words": len((caption or "").split()), "settings": settings}

    def write(self, keys: list[tuple[str, int]], pictures: dict[str, Image.Image]) -> dict[tuple, str | Exception]:
        """What the captioner says of each. A batch that fails (memory, a picture that the model refuses) is halved
        until the one at fault stands alone. Raises what it says of many in a row."""
        if not keys:
            return {}
        try:
            texts = self.captioner.generate([pictures[name] for name, _ in keys], *zip(*keys, strict=True))
            self.failed = 0
            return dict(zip(keys, texts, strict=True))
        except Exception as error:
            if half := len(keys) // 2:
                return self.write(keys[:half], pictures) | self.write(keys[half:], pictures)
            self.failed += 1
            if self.failed == IN_A_ROW:
                raise
            return {keys[0]: error}

    def read(self, name: str) -> Image.Image:
        """Upright RGB; cut to `image_size`, or where that is 0 shrunk to `longest_side`."""
        with self.pictures[name].open() as picture:
            if self.c.image_size:
                return Image.fromarray(fit(picture, self.c.image_size))
            if max(picture.size) > NARROW * min(picture.size):
                raise ValueError(f"{picture.width} x {picture.height} pixels, too narrow")
            picture = upright(picture)
            picture.thumbnail((self.c.longest_side, self.c.longest_side), Image.Resampling.BICUBIC)
            return picture


def find_pictures(c: Settings) -> dict[str, Found]:
    """Every picture by its name: a scene's id, a path in the folder, or SPLIT/ROW of a hub's data set."""
    if c.data.source in MADE:
        splits = [c.split] if c.split else MADE[c.data.source]
        sets = [load_data(replace(c.data, captions_from=""), split, c.image_size or 64) for split in splits]
        return {name: Found(partial(drawn, rows, i), None) for rows in sets for i, name in enumerate(rows.ids)}
    root, kinds = Path(c.data.source), ", ".join(sorted(PICTURES))
    if re.fullmatch(HUB_ID, c.data.source) and not root.is_dir():
        tables, found = load_from_hub(c.data.source), {}
        known_split(c.split or next(iter(tables)), tables, c.data.source)
        for split in [c.split] if c.split else tables:
            rows = hub_pictures(tables[split], c.data)
            found |= {f"{split}/{i}": Found(partial(stored, rows, i), None) for i in range(len(rows))}
        return found
    if not (files := pictures_in(root / c.split)):
        others = f"{' or '.join(MADE)}, or a hub's OWNER/NAME"
        raise DataError(f"{root / c.split} holds no pictures: data is a folder of {kinds}, or {others}")
    names = [file.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode() for file in files]
    found = [Found(partial(Image.open, file), file.stat().st_size) for file in files]
    return dict(zip(names, found, strict=True))


def drawn(rows: CaptionedImages, row: int) -> Image.Image:
    return Image.fromarray(rows.images([row])[0].permute(1, 2, 0).numpy())


def caption(c: Settings) -> None:
    """Captions what the store lacks of the shard. Raises ConfigError, DataError, OSError, ImportError."""
    model, source = (str(resolve(path)) if resolve(path).is_dir() else path for path in (c.model, c.data.source))
    c = replace(c, store=str(resolve(c.store)), model=model, data=replace(c.data, source=source))
    job, (first, of) = Job(c), map(int, c.shard.split("/"))
    require(of <= job.store.buckets, "shard", f"one of at most {job.store.buckets}, the buckets of this store")
    lacking = {b: count for b in range(first, job.store.buckets, of) if (count := len(job.pending(b)))}
    done = by_ray(c, list(lacking)) if c.workers and lacking else (n for bucket in lacking for n in job.run(bucket))
    with tqdm(total=sum(lacking.values()), desc=job.store.folder.name, unit="caption", mininterval=2) as bar:
        for count in done:
            bar.update(count)
    tables = [job.store.table(bucket) for bucket in range(first, job.store.buckets, of)]
    if errors := sum(len(table) - table["error"].null_count for table in tables):
        print(f"{errors:,} captions could not be had: the store's column `error` says why, retry=true tries again")


def by_ray(c: Settings, buckets: list[int]) -> Iterator[int]:
    """`workers` captioners on Ray's machines, a GPU each where there are any."""
    ray, data, here = map(importlib.import_module, ("ray", "ray.data", "textok_mini.captions"))  # here: not __main__
    ray.init(ignore_reinit_error=True)
    needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 0.5}  # 1 would starve the reader
    items = data.from_items([{"bucket": bucket} for bucket in buckets], override_num_blocks=len(buckets))
    pool = data.ActorPoolStrategy(size=c.workers)
    for row in items.map(here.Job, fn_constructor_args=[here.Settings(**vars(c))], compute=pool, **needs).iter_rows():
        yield row["captions"]


def class_captions(held_out: CaptionedImages, train: CaptionedImages, per_class: int, seed: int) -> dict:
    """{class: [caption, ...]}: of each class `per_class` distinct captions of held-out rows, drawn by `seed`, that no
    training row has, whatever its case and spaces. Raises DataError for a class that has too few."""
    known, lists = set(map(plain, train.captions)), {}
    for label in sorted({*held_out.labels.tolist(), *train.labels.tolist()} - {-1}):
        name, rows = held_out.label_names[label], (held_out.labels == label).nonzero().flatten().tolist()
        texts = {plain(text): text for text in (held_out.captions[row] for row in rows)}
        if len(free := sorted(texts.keys() - known)) < per_class:
            lack = f"class {name!r} has {len(free)} held-out captions that training has not, {per_class} are asked for"
            raise DataError(f"{lack}: ask for fewer, or hold more rows out")
        chosen = np.random.default_rng([seed, label]).choice(len(free), per_class, replace=False)
        lists[name] = [texts[free[i]] for i in chosen]
    return lists


def assert_disjoint(lists: dict[str, list[str]], captions: list[str]) -> None:
    """Raises DataError if a caption of the lists is among `captions`, whatever its case and spaces."""
    if both := {plain(text) for texts in lists.values() for text in texts} & set(map(plain, captions)):
        raise DataError(f"{len(both)} listed captions are training's too, such as {min(both)!r}: draw from other rows")


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


@command(__doc__)
def main(arguments: list[str]) -> None:
    try:
        caption(from_dict(Settings, apply_overrides({}, arguments, short={"data": "data.source"})))
    except ImportError as error:
        raise ConfigError(f"{first_line(error)}: {INSTALL.get(error.name, 'install it')}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
