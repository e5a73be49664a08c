"""Does a generated scene show what was asked? A small classifier of real scenes judges, and no network is needed.

    reader = AttributeReader.of(config.data, 32)
    reader.score(images, labels, captions)     # {"class": (N,) of 0 and 1, "object": ..., ...}

Always beside its score on real pictures, and on pictures that the caption alone brings about: words give the background
and the place for free, so a generator that is told a class is judged by the class.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from textok_mini.audit import read_caption
from textok_mini.config import DataConfig
from textok_mini.data import CaptionedImages, load_data
from textok_mini.images import to_float
from textok_mini.own_data import digest
from textok_mini.paths import beside, data_dir
from textok_mini.scenes import BACKGROUNDS, CELLS
from textok_mini.settings import to_dict

ATTRIBUTES = ("class", "object", "place", "background")


def attributes(labels: Sequence[int], captions: Sequence[str]) -> dict[str, list]:
    """What was asked: the class, and of the first-named object its name and place; the background. None: not said."""
    said = [read_caption(caption) for caption in captions]
    first = [objects[0] if objects else (None, None) for objects, _ in said]
    names, places = [name for name, _ in first], [place for _, place in first]
    return dict(zip(ATTRIBUTES, (list(labels), names, places, [ground or None for _, ground in said]), strict=True))


def named(rows: CaptionedImages) -> list[str]:
    return sorted({name for name in attributes(rows.labels.tolist(), rows.captions)["object"] if name})


class AttributeReader(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to logits by attribute, of the first-named object where there are more."""

    def __init__(self, classes: int, names: Sequence[str]):
        super().__init__()
        options = (list(range(classes)), list(names) or [""], list(CELLS), list(BACKGROUNDS))
        self.options = dict(zip(ATTRIBUTES, options, strict=True))
        widths, layers = (3, 32, 64, 128), []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(options)) for name, options in self.options.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.trunk(images)
        return {name: head(x) for name, head in self.heads.items()}

    def targets(self, labels: Sequence[int], captions: Sequence[str]) -> dict[str, Tensor]:
        """Indices by attribute, each (N,); -1 where it is not said or not known."""
        places = {name: {option: i for i, option in enumerate(options)} for name, options in self.options.items()}
        found = attributes(labels, captions)
        return {name: torch.tensor([places[name].get(value, -1) for value in found[name]]) for name in ATTRIBUTES}

    @classmethod
    def learn(cls, rows: CaptionedImages, steps: int = 1_500, seed: int = 0) -> "AttributeReader":
        """Trained on scenes with their true captions; in eval mode."""
        torch.manual_seed(seed)
        reader, rng = cls(len(rows.label_names), named(rows)), np.random.default_rng(seed)
        targets = reader.targets(rows.labels.tolist(), rows.captions)
        optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in trange(steps, desc="reading attributes", disable=None):
            chosen = rng.integers(len(rows), size=128)
            logits = reader(to_float(rows.images(chosen.tolist())))
            # Divided by the batch, not by the targets, of which captions that are no scenes' have none.
            wanted = {name: targets[name][chosen] for name in ATTRIBUTES}
            terms = (F.cross_entropy(logits[n], y, ignore_index=-1, reduction="sum") for n, y in wanted.items())
            loss = sum(terms) / len(chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return reader.eval()

    @classmethod
    def of(cls, data: DataConfig, image_size: int, steps: int = 1_500) -> "AttributeReader":
        """The reader of a world, learnt once and kept under `data/readers/`."""
        path = data_dir() / "readers" / f"{digest([to_dict(data), image_size, steps])}.safetensors"
        rows = load_data(data, "train", image_size)
        if not path.is_file():
            with beside(path) as part:
                save_file(cls.learn(rows, steps).state_dict(), part)
        reader = cls(len(rows.label_names), named(rows))
        reader.load_state_dict(load_file(path))
        return reader.eval()

    @torch.no_grad()
    def score(self, images: Tensor, labels: Sequence[int], captions: Sequence[str]) -> dict[str, np.ndarray]:
        """By attribute, of each image (N, 3, H, W), uint8, 1.0 where it shows what was asked, 0.0 where not, and nan
        where nothing was."""
        wanted, hits = self.targets(labels, captions), {name: [] for name in ATTRIBUTES}
        for start in range(0, len(images), 250):
            for name, logits in self(to_float(images[start : start + 250])).items():
                hits[name].append(logits.argmax(1))
        found = {name: torch.cat(parts) for name, parts in hits.items()}
        return {n: np.where(wanted[n] < 0, np.nan, (found[n] == wanted[n]).float()) for n in ATTRIBUTES}
