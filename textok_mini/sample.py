"""Pictures from a trained generator.

    python -m textok_mini.sample dit=runs/dit output=runs/pictures                    # 50 of each class
    python -m textok_mini.sample dit=runs/dit output=runs/one prompts=prompts.txt     # a DiT that is told a text
    python -m textok_mini.sample dit=runs/dit output=runs/big shard=0/8               # one of eight processes

A class's pictures get their words at decoding: captions of its own that no training has seen, from `captions` (a JSON
file, {class: [caption, ...]}), or those that the latents' folder keeps. The output is PNGs and a metadata.jsonl, as
`load_data` reads them. The same command goes on where a killed one stopped; `npz=true` packs all into one file in ADM's
form. A picture follows from seed and number: but for rounding it is the same in any batch, on any number of processes.

    painter = Painter("reference/gallery/text")
    images = painter.paint(["a cat top left on a red background"])  # (1, 3, H, W) in [-1, 1]
"""

import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from textok_mini.captions import assert_disjoint
from textok_mini.command import command
from textok_mini.config import Config, ConfigError, require
from textok_mini.device import best
from textok_mini.dit import DiT
from textok_mini.generator import PROCESSES, Condition, sample_latents
from textok_mini.hub import revision
from textok_mini.images import pixels
from textok_mini.latents import LatentSpace, claim
from textok_mini.own_data import METADATA, DataError
from textok_mini.paths import beside, resolve, write_text
from textok_mini.recipe import text_encoder
from textok_mini.run import read_config
from textok_mini.settings import apply_overrides, from_dict


@dataclass(frozen=True)
class Settings:
    dit: str = ""  # a run's folder
    output: str = ""  # the folder to fill
    tokenizer: str = ""  # where it is now, if it was moved
    each: int = 50  # pictures of each class, or of each prompt
    captions: str = ""  # a JSON file of the classes' captions; else the latents' own
    prompts: str = ""  # a text file, a prompt a line; else those captions
    guidance: float = 1.5  # 1 is none
    guide_from: float = 0.0  # times of the process, 0 to 1,000, at which it guides
    guide_to: float = 1_000.0
    steps: int = 0  # 0: the process's own, 250 or 50
    seed: int = 0
    batch_size: int = 100
    npz: bool = False
    shard: str = "0/1"

    def __post_init__(self):
        for name in ("dit", "output"):
            require(getattr(self, name) != "", name, f"a folder, as in {name}=runs/{name}")
        for name in ("each", "batch_size"):
            require(getattr(self, name) > 0, name, "above 0")
        require(self.steps >= 0 and self.seed >= 0, "steps and seed", "at least 0")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        require(part is not None and int(part[1]) < int(part[2]), "shard", "I/N with I below N, as in 0/8")

    @property
    def drawing(self) -> dict[str, Any]:
        """How latents are drawn, as `Painter.latents` takes it."""
        return dict(guidance=self.guidance, span=(self.guide_from, self.guide_to), steps=self.steps, seed=self.seed)


def load_dit(folder: str | Path) -> tuple[DiT, Config]:
    """A finished run's EMA weights in eval mode, and its config."""
    config = read_config(resolve(folder))
    model = DiT(config.dit)
    model.load_state_dict(load_file(resolve(folder) / "model.safetensors"))
    return model.eval(), config


class Painter:
    """A trained DiT with all that its pictures need: the tokenizer, the latents' space, and both readers of text.
    Raises ConfigError, DataError, OSError."""

    def __init__(self, dit: str | Path, tokenizer: str | Path = ""):
        self.device, (self.dit, self.config) = best(), load_dit(dit)
        self.space = LatentSpace(self.config.generator.latents)
        self.process = PROCESSES[self.config.generator.process]()
        self.tokenizer, self.theirs = self.space.tokenizer(tokenizer)
        self.dit, self.tokenizer = self.dit.to(self.device), self.tokenizer.to(self.device)
        told_text = self.config.dit.condition == "text"
        self.reader = text_encoder(self.config, None, self.device, of="dit") if told_text else None
        self.narrator = text_encoder(self.theirs, None, self.device)

    def conditions(self, asked: Sequence[int] | Sequence[str]) -> tuple[Condition, Condition]:
        """What the DiT is told of labels or, if it reads, of texts; and what it is told for "nothing"."""
        if self.reader:
            return self.reader(list(asked)).to(self.device), self.reader([""] * len(asked)).to(self.device)
        labels = torch.tensor(asked, device=self.device)
        return labels, torch.full_like(labels, self.config.dit.num_classes)

    def latents(
        self,
        asked: Sequence[int] | Sequence[str],
        numbers: Sequence[int] | None = None,
        guidance: float = 1.5,
        span: tuple[float, float] = (0, 1_000),
        steps: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """Normalised latents (B, N, d) of pictures `numbers` (0, 1, ...), each of a label or a text."""
        numbers = range(len(asked)) if numbers is None else numbers
        told, nothing = self.conditions(asked)
        steps = steps or self.process.few
        return sample_latents(self.dit, self.process, told, nothing, numbers, guidance, span, steps, seed)

    @torch.no_grad()
    def decode(self, latents: Tensor, captions: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of normalised latents, the detokenizer told the captions."""
        text = self.narrator(list(captions)).to(self.device) if self.narrator else None
        return self.tokenizer.decode(self.space.denormalise(latents.to(self.device)), text).clamp(-1, 1).cpu()

    def paint(self, asked: Sequence[int] | Sequence[str], captions: Sequence[str] | None = None, **how: Any) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]: `latents(asked, **how)`, told to the detokenizer as `captions`, which are
        the texts themselves unless given. Raises ValueError for labels without captions."""
        if captions is None and self.reader is None:
            raise ValueError("pictures of labels need captions too: what the detokenizer is told")
        return self.decode(self.latents(asked, **how), asked if captions is None else captions)


def asked(c: Settings, config: Config, space: LatentSpace) -> list[tuple[int, str]]:
    """Of each picture the label (-1 for a prompt's) and the caption: `each` of a prompt, or exactly `each` of a class,
    whose captions are taken in turn. Raises DataError for a class without captions, and captions of training's."""
    if c.prompts:
        if config.dit.condition != "text":
            raise ConfigError("prompts are for a DiT that is told a text, dit.condition=text; this one is told a class")
        lines = resolve(c.prompts).read_text(encoding="utf-8").splitlines()
        return [(-1, line) for line in lines if line.strip() for _ in range(c.each)]
    lists = json.loads(resolve(c.captions or space.folder / "captions.json").read_text(encoding="utf-8"))
    if (rows := space.folder / "rows.parquet").is_file():
        assert_disjoint(lists, pq.read_table(rows, columns=["caption"])["caption"].to_pylist())
    names = space.meta["label_names"]
    present = [names[label] for label in space.meta["present"]]
    if lacking := [name for name in present if not lists.get(name)]:
        raise DataError(f"{c.captions or space.folder}: no captions of class {lacking[0]!r}")
    turns = {name: itertools.cycle(lists[name]) for name in present}
    return [(names.index(name), next(turns[name])) for name in present for _ in range(c.each)]


def sample(c: Settings) -> None:
    """Fills the folder. Raises ConfigError, DataError, OSError."""
    painter, folder = Painter(c.dit, c.tokenizer), resolve(c.output)
    space = painter.space
    labels, captions = map(list, zip(*asked(c, painter.config, space), strict=True))
    kept = {key: value for key, value in asdict(c).items() if key not in ("output", "batch_size", "shard", "npz")}
    claim(folder, kept | {"weights": revision(str(resolve(c.dit))), "tokenizer_weights": space.meta["revision"]})
    (first, of), names = map(int, c.shard.split("/")), [f"{i:06d}.png" for i in range(len(labels))]
    mine = [i for i in range(first, len(names), of) if not (folder / names[i]).exists()]
    for start in tqdm(range(0, len(mine), c.batch_size), desc=folder.name, unit="batch", disable=None):
        numbers = mine[start : start + c.batch_size]
        told = [(captions if painter.reader else labels)[i] for i in numbers]
        x = painter.latents(told, numbers, **c.drawing)
        for i, image in zip(numbers, pixels(painter.decode(x, [captions[i] for i in numbers])), strict=True):
            with beside(folder / names[i]) as part:
                Image.fromarray(image).save(part, format="PNG")
    if all((folder / name).exists() for name in names):
        finish(folder, names, labels, captions, space.meta["label_names"], c.npz)


def finish(
    folder: Path, names: list[str], labels: list[int], captions: list[str], classes: list[str], npz: bool
) -> None:
    """The metadata of `load_data`'s form, and ADM's: `arr_0` uint8 (n, H, W, 3), `arr_1` the labels."""
    said = {label: {"label": classes[label]} for label in set(labels) - {-1}}
    rows = [{"file_name": n, "caption": t, **said.get(i, {})} for n, t, i in zip(names, captions, labels, strict=True)]
    write_text(folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows))
    if npz:
        with beside(folder / "pictures.npz") as part, part.open("wb") as file:
            np.savez(file, np.stack([np.asarray(Image.open(folder / name)) for name in names]), np.array(labels))


@command(__doc__)
def main(arguments: list[str]) -> None:
    sample(from_dict(Settings, apply_overrides({}, arguments, short={})))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
