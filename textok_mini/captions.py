"""Captions for pictures that have none, by a vision-language model, into a store that no kill can spoil.

    python -m textok_mini.captions data=path/to/pictures store=runs/captions model=Qwen/Qwen3-VL-2B-Instruct
    python -m textok_mini.captions ... captions=3 temperature=0.7 shard=0/8  # the first of eight machines

The same command again goes on where it stopped. Caption 0 of a picture is greedy, more are sampled. A picture that
cannot be read becomes a row with its error. `data` is a folder of pictures, or `openmoji-scenes`; see `Settings`.
"""

import hashlib
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import transformers as hf
from PIL import Image, ImageOps
from tqdm import tqdm

from textok_mini.caption_store import CaptionStore, storable
from textok_mini.captioner import MODEL, PROMPT, Captioner, VLLMCaptioner, licence, trim
from textok_mini.config import ConfigError, DataConfig, apply_overrides, from_dict, require
from textok_mini.data import MADE, CaptionedImages, load_data
from textok_mini.hub import first_line, from_hub
from textok_mini.own_data import PICTURES, DataError, digest, fit, pictures_in
from textok_mini.paths import resolve
from textok_mini.train import complain

ENGINES = {"transformers": Captioner, "vllm": VLLMCaptioner}
INSTALL = {"ray": "pip install -e '.[ray]'", "vllm": "pip install vllm, in an environment of its own"}
SAVE_SECONDS = 30
NARROW = 100  # times as long as wide: models refuse such a picture, and with it its batch


@dataclass(frozen=True)
class Settings:
    store: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    split: str = ""  # of scenes, or a folder of the folder; all of them
    image_size: int = 0  # cut to a square as in training; 0: 64 for scenes, whole pictures for a folder
    model: str = MODEL
    prompt: str = PROMPT
    words: int = 75
    captions: int = 1  # of each picture
    temperature: float = 0.7  # of all captions of a picture but the first
    seed: int = 0
    batch_size: int = 16
    shard: str = "0/1"
    workers: int = 0  # on Ray; 0 is without it
    engine: Literal["transformers", "vllm"] = "transformers"

    def __post_init__(self):
        require(self.store != "", "store", "a folder, as in store=runs/captions")
        for name in ("words", "captions", "batch_size", "temperature"):
            require(getattr(self, name) > 0, name, "above 0")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        require(part is not None and int(part[1]) < int(part[2]), "shard", "I/N with I below N, as in 0/8")


class Job:
    """A command's pictures, store and captioner: `run` and, on Ray, a call caption a bucket of the store."""

    def __init__(self, c: Settings):
        network, folder = from_hub(hf.AutoConfig, c.model, "captioner"), Path(c.model)
        prompt = "" if network.model_type == "vision-encoder-decoder" else storable(c.prompt)
        weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))]
        self.about = {"model": folder.name if folder.is_dir() else c.model, "licence": licence(c.model), "seed": c.seed}
        self.about["revision"] = getattr(network, "_commit_hash", None) or digest(weights)
        self.about["prompt_hash"] = digest(prompt)
        settings = {name: getattr(c, name) for name in ("words", "captions", "temperature", "engine", "image_size")}
        world = {name: getattr(c.data, name) for name in ("world_seed", "objects", "min_objects", "max_objects")}
        settings |= {"prompt": prompt, "data": Path(c.data.source).name} | (world if c.data.source in MADE else {})
        self.c, self.pictures, self.names = c, find_pictures(c), {}
        self.store = CaptionStore.open(c.store, self.about | settings, len(self.pictures))
        self.about["licence"] = self.store.settings["licence"]
        for name in self.pictures:
            self.names.setdefault(self.store.bucket_of(name), []).append(name)

    @cached_property
    def captioner(self) -> Captioner:
        c = self.c
        return ENGINES[c.engine](c.model, c.prompt, c.words, c.temperature, c.seed, batch_size=c.batch_size)

    def pending(self, bucket: int) -> list[tuple[str, int]]:
        there = {(row["file_name"], row["number"]) for row in self.store.rows(bucket)}
        names, count = self.names.get(bucket, []), self.c.captions
        return [(name, n) for name in names for n in range(count) if (name, n) not in there]

    def __call__(self, row: dict) -> dict:
        return {"captions": sum(self.run(row["bucket"]))}

    def run(self, bucket: int) -> Iterator[int]:
        """Captions what the bucket lacks; yields how many captions each batch gave."""
        pending, rows, saved, size = self.pending(bucket), [], time.monotonic(), self.c.batch_size
        pixels = dict.fromkeys((name for name, _ in pending), 0)
        for name in pixels:
            with suppress(Exception), self.pictures[name]() as picture:
                pixels[name] = picture.width * picture.height
        pending.sort(key=lambda key: (pixels[key[0]], key))  # a batch is padded to its largest picture
        for batch in [pending[i : i + size] for i in range(0, len(pending), size)]:
            rows += self.rows(batch)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.store.add(bucket, rows)
                rows, saved = [], time.monotonic()
            yield len(batch)
        self.store.add(bucket, rows)

    def rows(self, keys: list[tuple[str, int]]) -> Iterator[dict]:
        how = {"engine": self.c.engine, "dtype": str(self.captioner.dtype), "words": self.c.words}
        begun, found, errors = time.monotonic(), {}, {}
        for name in {name for name, _ in keys}:
            try:
                found[name] = read(self.pictures[name], self.c.image_size)
            except Exception as error:  # PIL has a dozen kinds for a broken picture
                errors[name] = f"the picture cannot be read ({' '.join(str(error).split())})"
        good = [key for key in keys if key[0] in found]
        texts = self.captioner.generate([found[name] for name, _ in good], *zip(*good, strict=True)) if good else []
        captions = {key: trim(text, self.c.words) for key, text in zip(good, texts, strict=True)}
        common = self.about | {"seconds": (time.monotonic() - begun) / len(keys)}
        common["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        for name, number in keys:
            settings, text = how | {"temperature": self.c.temperature * (number > 0)}, captions.get((name, number))
            row = {"file_name": name, "number": number, "caption": text, "error": errors.get(name)}
            yield common | row | {"words": len((text or "").split()), "settings": json.dumps(settings)}


def find_pictures(c: Settings) -> dict[str, Callable]:
    """What opens each picture, by its name: a scene's id, or a path in the folder."""
    if c.data.source in MADE:
        splits = [c.split] if c.split else MADE[c.data.source]
        sets = [load_data(c.data, split, c.image_size or 64) for split in splits]
        return {name: partial(drawn, rows, i) for rows in sets for i, name in enumerate(rows.ids)}
    root, kinds = Path(c.data.source), ", ".join(sorted(PICTURES))
    if not (files := pictures_in(root / c.split)):
        raise DataError(f"{root / c.split} holds no pictures: data is a folder of {kinds}, or {' or '.join(MADE)}")
    names = [file.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode() for file in files]
    return {name: partial(Image.open, file) for name, file in zip(names, files, strict=True)}


def drawn(rows: CaptionedImages, row: int) -> Image.Image:
    return Image.fromarray(rows.images([row])[0].permute(1, 2, 0).numpy())


def read(opened: Callable, image_size: int) -> Image.Image:
    """RGB, turned as its EXIF says, over white; cut to `image_size` unless that is 0."""
    with opened() as picture:
        if image_size:
            return Image.fromarray(fit(picture, image_size))
        if max(picture.size) > NARROW * min(picture.size):
            raise ValueError(f"{picture.width} x {picture.height} pixels, too narrow")
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def caption(c: Settings) -> None:
    """Captions what the store lacks of the shard. Raises DataError, OSError, ImportError."""
    model, source = (str(resolve(path)) if resolve(path).is_dir() else path for path in (c.model, c.data.source))
    c = replace(c, store=str(resolve(c.store)), model=model, data=replace(c.data, source=source))
    job, (first, of) = Job(c), map(int, c.shard.split("/"))
    lacking = {b: count for b in range(first, job.store.buckets, of) if (count := len(job.pending(b)))}
    done = by_ray(c, list(lacking)) if c.workers and lacking else (n for bucket in lacking for n in job.run(bucket))
    with tqdm(total=sum(lacking.values()), desc=job.store.folder.name, unit="caption", mininterval=2) as bar:
        for count in done:
            bar.update(count)


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
    known, drawn = set(map(plain, train.captions)), {}
    for label in sorted({*held_out.labels.tolist(), *train.labels.tolist()} - {-1}):
        name, rows = held_out.label_names[label], (held_out.labels == label).nonzero().flatten().tolist()
        texts = {plain(text): text for text in (held_out.captions[row] for row in rows)}
        if len(free := sorted(texts.keys() - known)) < per_class:
            lack = f"class {name!r} has {len(free)} held-out captions that training has not, {per_class} are asked for"
            raise DataError(f"{lack}: ask for fewer, or hold more rows out")
        chosen = np.random.default_rng([seed, label]).choice(len(free), per_class, replace=False)
        drawn[name] = [texts[free[i]] for i in chosen]
    assert_disjoint(drawn, train.captions)
    return drawn


def assert_disjoint(drawn: dict[str, list[str]], captions: list[str]) -> None:
    """Raises DataError if a drawn caption is among `captions`, whatever its case and spaces."""
    if both := {plain(text) for texts in drawn.values() for text in texts} & set(map(plain, captions)):
        raise DataError(f"{len(both)} drawn captions are training's too, such as {min(both)!r}: draw from other rows")


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def command(kind: type, work: Callable, arguments: list[str]) -> int:
    """`work` with the settings `kind` of KEY=VALUE arguments. 0, or 2 for one clear line about what to change."""
    texts = [f.name for f in fields(kind) if f.type is str]  # taken as typed: YAML reads a colon or a zero as its own
    typed = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in texts and "=" in a)
    rest = [re.sub("^seed=", ".seed=", a) for a in arguments if a.partition("=")[0] not in typed]
    try:  # a bare `seed` is training's
        values = apply_overrides({}, rest)
        work(from_dict(kind, values | values.pop("", {}) | typed))
    except ImportError as error:
        return complain(f"{first_line(error)}: {INSTALL.get(error.name, 'install it')}")
    except (ConfigError, DataError, OSError) as error:
        return complain(first_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(command(Settings, caption, sys.argv[1:]))
