"""TexTok beside its twins: the same pictures through each, with right captions and with wrong ones.

    arms = ARMS                                             # what to override for each, all else equal
    metrics = evaluate("runs/textok", rows)                 # {"right": {"psnr": (N,), ...}, "wrong object": ...}
    paired_bootstrap(metrics["right"]["psnr"], twin["right"]["psnr"])

An arm's metrics are per image, so that any two can be paired.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from textok_mini.config import Config
from textok_mini.data import CaptionedImages, stored_captions
from textok_mini.device import best
from textok_mini.evaluation import MEASURES, metrics_of_all
from textok_mini.images import to_float
from textok_mini.intervals import paired_bootstrap
from textok_mini.losses import Trunk
from textok_mini.recipe import text_encoder
from textok_mini.run import load_run
from textok_mini.scenes import CHANGES, LEVELS, caption
from textok_mini.text import CachedText, FrozenTextEncoder
from textok_mini.tokenizer import TexTok

# Captions wrong in one respect, told to the detokenizer alone (the latent tokens are right) or to both halves.
WRONG = tuple(f"wrong {change}, {half}" for change in CHANGES for half in ("detokenizer", "both"))

AT_ONCE = 2_000  # pictures in memory, under every condition

# The twin without text; and the twin with learned tokens in place of text, about as many as a batch of TexTok's has
# (20 on average, 26 in the longest caption), so that its sequences are as long and its steps as dear.
ARMS = {
    "textok": [],
    "twin": ["tokenizer.text_in=none"],
    "registers": ["tokenizer.text_in=none", "tokenizer.num_registers=22"],
}


def other_captions(rows: CaptionedImages, what: str, level: str = "normal", seed: int = 0) -> list[str]:
    """What the rows' captions are replaced by, the same for every arm: `wrong object`, `wrong place` or `wrong
    background` (wrong in that one respect, see `scenes.wrong`; at `level`), `wrong picture` (another picture's; for any
    data), `no caption` (an empty text), `short`, `normal`, `long` (the scene's exact caption at that level), or `of
    STORE` (those of a caption store: machine-made)."""
    count = range(len(rows))
    if what == "no caption":
        return [""] * len(rows)
    if what == "wrong picture":
        return rows.captions[1:] + rows.captions[:1]
    if what.startswith("of "):
        return stored_captions(what.removeprefix("of "), rows.ids, rows.world)
    if what in LEVELS:
        return [caption(rows.scene(i), what) for i in count]
    change = what.removeprefix("wrong ")
    return [caption(rows.wrong(i, change, np.random.default_rng((seed, i))), level) for i in count]


@torch.no_grad()
def reconstruct(
    model: TexTok,
    rows: CaptionedImages,
    encoder: FrozenTextEncoder | CachedText | None = None,
    tokenizer_captions: Sequence[str] | None = None,
    detokenizer_captions: Sequence[str] | None = None,
    batch_size: int = 125,
) -> Tensor:
    """Every row through the model, on its device: (N, 3, H, W) on the CPU, clipped to [-1, 1]. Captions are the rows'
    own unless given."""
    told, shown = tokenizer_captions or rows.captions, detokenizer_captions or rows.captions
    pictures, device = [], next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = slice(start, min(start + batch_size, len(rows)))
        images = to_float(rows.images(list(range(batch.start, batch.stop))).to(device))
        one = encoder(told[batch]).to(device) if encoder else None
        two = one if told is shown else encoder(shown[batch]).to(device) if encoder else None
        pictures.append(model.decode(model.encode(images, one), two).clamp(-1, 1).cpu())
    return torch.cat(pictures)


def evaluate(
    folder: str | Path,
    rows: CaptionedImages,
    conditions: Sequence[str] = (),
    snapshot: int | None = None,
    names: Sequence[str] = MEASURES,
) -> dict[str, dict[str, np.ndarray]]:
    """Per-image metrics of a run on `rows`: with the `right` captions, and under each of `conditions`: a name of
    `other_captions`, told to both halves, or to one as in `wrong place, detokenizer`. LPIPS is on `grading_trunk`'s."""
    model, config = load_run(folder, snapshot)
    split = {} if config.tokenizer.text_in == "none" else {c: c.partition(", ")[::2] for c in conditions}
    lies = {what for what, _ in split.values()}
    said = {what: other_captions(rows, what, config.data.captions) for what in lies}
    device, parts, trunk = best(), [], grading_trunk(config)
    model, encoder = model.to(device), text_encoder(config, sum(said.values(), rows.captions), device)
    told = {"right": (None, None)}
    for condition, (what, half) in split.items():
        told[condition] = tuple(None if half == other else said[what] for other in ("detokenizer", "tokenizer"))
    for start in range(0, len(rows), AT_ONCE):
        some = rows.take(range(len(rows))[start : start + AT_ONCE])
        lines = {name: [lie and lie[start : start + AT_ONCE] for lie in pair] for name, pair in told.items()}
        pictures = {name: reconstruct(model, some, encoder, *pair) for name, pair in lines.items()}
        parts.append(metrics_of_all(pictures, to_float(some.images(list(range(len(some))))), trunk, names=names))
    return {name: {key: np.concatenate([part[name][key] for part in parts]) for key in parts[0][name]} for name in told}


def grading_trunk(config: Config) -> Trunk:
    """LPIPS's on VGG16, or AlexNet's for a run that was trained on VGG16's: a figure flatters who was trained on it."""
    return "alex" if config.training.perceptual == "lpips-vgg" else "vgg"


def differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean of a - b and its 95% interval over images, for each metric; plain values, ready for JSON."""
    return {name: vars(paired_bootstrap(a[name], b[name])) for name in a}
