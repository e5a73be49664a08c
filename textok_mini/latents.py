"""Latent tokens of a data set, encoded once, for a generator to learn from.

    python -m textok_mini.latents tokenizer=runs/textok latents=runs/latents

    rows = Latents("runs/latents")                        # normalised: mean 0 and deviation 1, channel by channel
    images = tokenizer.decode(rows.space.denormalise(sampled), text)

A tokenizer's latents have any mean and size, and a diffusion takes them for unit noise: left out, or done on one way
only, this is the field's classic mistake. `LatentSpace.normalise` is the one place where they are normalised,
`denormalise` the one where they come back. A killed run goes on with the next file; several processes share the files
by `shard=0/8`.
"""

import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from textok_mini.captions import class_captions
from textok_mini.command import command
from textok_mini.config import Config, DataConfig, require
from textok_mini.data import SIDED, load_data
from textok_mini.device import best
from textok_mini.hub import revision
from textok_mini.images import to_float
from textok_mini.own_data import DataError
from textok_mini.paths import beside, resolve, write_text
from textok_mini.recipe import text_encoder
from textok_mini.run import load_run, read_config
from textok_mini.settings import apply_overrides, from_dict, merge, to_dict
from textok_mini.tokenizer import TexTok

ROWS_A_FILE = 16_384


@dataclass(frozen=True)
class Settings:
    tokenizer: str = ""  # a run's folder
    latents: str = ""  # the folder to fill
    data: DataConfig = field(default_factory=DataConfig)  # the tokenizer's own, but for what is given
    split: str = "train"
    captions: int = 30  # of each class, held out: what a generator's pictures of it are decoded with; 0 is none
    batch_size: int = 64
    shard: str = "0/1"

    def __post_init__(self):
        for name in ("tokenizer", "latents"):
            require(getattr(self, name) != "", name, f"a folder, as in {name}=runs/{name}")
        require(self.batch_size > 0, "batch_size", "above 0")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        require(part is not None and int(part[1]) < int(part[2]), "shard", "I/N with I below N, as in 0/8")


class LatentSpace:
    """Where a generator works: a tokenizer's latents, each channel of mean 0 and deviation 1 over the training rows.

    Reads a folder's `latents.json`; needs none of its other files. Raises DataError if it is not there."""

    def __init__(self, folder: str | Path):
        self.folder = resolve(folder)
        try:
            self.meta = json.loads((self.folder / "latents.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: no latents, or not all; `python -m textok_mini.latents` makes them") from error
        self.mean, self.deviation = (torch.tensor(self.meta[name]) for name in ("mean", "deviation"))

    def normalise(self, z: Tensor) -> Tensor:
        """From what the tokenizer gives, (B, N, d), to what a generator learns."""
        return (z - self.mean.to(z.device)) / self.deviation.to(z.device)

    def denormalise(self, x: Tensor) -> Tensor:
        """From what a generator draws, (B, N, d), to what the detokenizer takes."""
        return x * self.deviation.to(x.device) + self.mean.to(x.device)

    def tokenizer(self, run: str | Path = "") -> tuple[TexTok, Config]:
        """The tokenizer that the latents are of, from where it was, or from `run`. Raises DataError for another one."""
        run = resolve(run or self.meta["tokenizer"])
        model, config = load_run(run)
        if revision(str(run)) != self.meta["revision"]:
            raise DataError(f"{self.folder}: these latents are another tokenizer's than {run}; make its own")
        return model, config


class Latents(Dataset):
    """The rows of a folder of latents, `latents` normalised: several at once are {"latents": (B, N, d), "label": (B,),
    "caption": [...], "id": [...]}. Raises DataError for unfinished latents."""

    def __init__(self, folder: str | Path):
        self.space = LatentSpace(folder)
        table = pq.read_table(self.space.folder / "rows.parquet").to_pydict()
        self.ids, self.captions, self.labels = table["id"], table["caption"], torch.tensor(table["label"])
        files = sorted(self.space.folder.glob("latents-*.npy"))
        self.files = [np.load(file, mmap_mode="r") for file in files]  # a file is read where it is asked for
        self.shape = self.files[0].shape[1:]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, rows: list[int]) -> dict:
        z = torch.from_numpy(np.stack([self.files[row // ROWS_A_FILE][row % ROWS_A_FILE] for row in rows]))
        told = {name: [getattr(self, f"{name}s")[row] for row in rows] for name in ("caption", "id")}
        return {"latents": self.space.normalise(z), "label": self.labels[rows], **told}


def encode(c: Settings) -> None:
    """Fills the folder. Raises ConfigError, DataError, OSError."""
    folder, run = resolve(c.latents), resolve(c.tokenizer)
    model, config = load_run(run)
    data = c.data if c.data != DataConfig() else config.data
    rows, device = load_data(data, c.split, config.tokenizer.image_size), best()
    model, text = model.to(device), text_encoder(config, rows.captions, device)
    # A mirrored picture is a row of its own, where the caption allows one.
    wanted = [(row, False) for row in range(len(rows))]
    wanted += [(row, True) for row, told in enumerate(rows.captions) if data.mirror and not SIDED.search(told)]
    meta = {"tokenizer": c.tokenizer, "revision": revision(str(run)), "split": c.split, "rows": len(wanted)}
    meta |= {"data": to_dict(data), "label_names": rows.label_names}
    claim(folder, meta)
    if c.captions:
        lists = class_captions(load_data(data, "test", config.tokenizer.image_size), rows, c.captions, seed=0)
        write_text(folder / "captions.json", json.dumps(lists, indent=1))
    (first, of), files = map(int, c.shard.split("/")), math.ceil(len(wanted) / ROWS_A_FILE)
    paths = [folder / f"latents-{number:05d}.npy" for number in range(files)]
    for path, start in list(zip(paths, range(0, len(wanted), ROWS_A_FILE), strict=True))[first::of]:
        if path.exists():
            continue
        mine, found = wanted[start : start + ROWS_A_FILE], []
        for i in tqdm(range(0, len(mine), c.batch_size), desc=path.stem, unit="batch", mininterval=2):
            chosen, mirror = map(list, zip(*mine[i : i + c.batch_size], strict=True))
            images = to_float(rows.images(chosen).to(device))
            images = torch.where(torch.tensor(mirror, device=device)[:, None, None, None], images.flip(-1), images)
            told = text([rows.captions[row] for row in chosen]).to(device) if text else None
            with torch.no_grad():
                found.append(model.encode(images, told).float().cpu())
        with beside(path) as part, part.open("wb") as file:
            np.save(file, torch.cat(found).numpy())
    if all(path.exists() for path in paths):
        table = {"id": [rows.ids[row] for row, _ in wanted], "caption": [rows.captions[row] for row, _ in wanted]}
        table["label"] = [int(rows.labels[row]) for row, _ in wanted]
        meta["present"] = sorted({*table["label"]} - {-1})
        finish(folder, meta, paths, table | {"mirrored": [mirror for _, mirror in wanted]})


def claim(folder: Path, meta: dict) -> None:
    """What the folder's files are of, written before the first of them. Raises DataError if it holds others."""
    path = folder / "of.json"
    if path.exists() and (there := json.loads(path.read_text(encoding="utf-8"))) != meta:
        differ = ", ".join(name for name in meta if there.get(name) != meta[name])
        raise DataError(f"{folder}: holds latents of another {differ}; choose another folder, or delete this one")
    write_text(path, json.dumps(meta, indent=2))


def finish(folder: Path, meta: dict, paths: list[Path], table: dict) -> None:
    """The rows' table, and last the moments of each channel, over all rows and tokens."""
    total, squares, count = 0.0, 0.0, 0
    for path in paths:
        z = np.load(path, mmap_mode="r").astype(np.float64).reshape(-1, np.load(path, mmap_mode="r").shape[-1])
        total, squares, count = total + z.sum(0), squares + (z**2).sum(0), count + len(z)
    mean = total / count
    moments = {"mean": mean.tolist(), "deviation": np.sqrt(squares / count - mean**2).tolist()}
    with beside(folder / "rows.parquet") as part:
        pq.write_table(pa.table(table), part)
    write_text(folder / "latents.json", json.dumps(meta | moments, indent=2))


@command(__doc__)
def main(arguments: list[str]) -> None:
    given = apply_overrides({}, arguments, short={"data": "data.source"})
    run = given.get("tokenizer")
    theirs = {"data": to_dict(read_config(resolve(run)).data)} if run else {}
    encode(from_dict(Settings, merge(theirs, given)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
