"""TexTok beside its twins: the same pictures through each, with right captions and with wrong ones.

    arms = ARMS                                             # what to override for each, all else equal
    metrics = evaluate("runs/textok", rows)                 # {"right": {"psnr": (N,), ...}, "wrong object": ...}
    paired_bootstrap(metrics["right"]["psnr"], twin["right"]["psnr"])

An arm's metrics are per image, so that any two can be paired. A caption is wrong in one respect only (an object, a
place, the background), told to the detokenizer alone or to both halves.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from textok_mini.config import Config, from_dict
from textok_mini.data import CaptionedImages
from textok_mini.evaluation import distances, image_metrics, paired_bootstrap, to_uint8
from textok_mini.scenes import CHANGES, caption
from textok_mini.text import CachedText, FrozenTextEncoder
from textok_mini.tokenizer import TexTok
from textok_mini.training import text_encoder, to_float

# The twin without text; and the twin that has as many learned tokens as TexTok has text tokens on average, so
# that its sequences are as long and its steps as dear.
ARMS = {
    "textok": [],
    "twin": ["tokenizer.text_in=none"],
    "registers": ["tokenizer.text_in=none", "tokenizer.num_registers=22"],
}


def load_run(folder: str | Path, snapshot: int | None = None) -> tuple[TexTok, Config]:
    """A finished run's EMA weights (or those of a snapshot's step) in eval mode, and its config."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run: train one with python -m textok_mini.train")
    config = from_dict(Config, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = TexTok(config.tokenizer)
    name = "model.safetensors" if snapshot is None else f"snapshots/step-{snapshot:07d}.safetensors"
    model.load_state_dict(load_file(folder / name))
    return model.eval(), config


def wrong_captions(rows: CaptionedImages, change: str, level: str = "normal", seed: int = 0) -> list[str]:
    """A caption for each row that is wrong in one respect (`scenes.CHANGES`), the same ones for every arm.

    Only scenes know what is in them; for other data `change` must be `picture`: another picture's caption."""
    if change == "picture":
        return rows.captions[1:] + rows.captions[:1]
    return [caption(rows.wrong(i, change, np.random.default_rng((seed, i))), level) for i in range(len(rows))]


@torch.no_grad()
def reconstruct(
    model: TexTok,
    rows: CaptionedImages,
    encoder: FrozenTextEncoder | CachedText | None = None,
    tokenizer_captions: Sequence[str] | None = None,
    detokenizer_captions: Sequence[str] | None = None,
    batch_size: int = 125,
) -> Tensor:
    """Every row through the model: (N, 3, H, W), clipped to [-1, 1]. Captions are the rows' own unless given."""
    told, shown = tokenizer_captions or rows.captions, detokenizer_captions or rows.captions
    pictures = []
    for start in range(0, len(rows), batch_size):
        batch = slice(start, min(start + batch_size, len(rows)))
        images = to_float(rows.images(list(range(batch.start, batch.stop))))
        one = encoder(told[batch]) if encoder else None
        two = one if told is shown else encoder(shown[batch]) if encoder else None
        pictures.append(model.decode(model.encode(images, one), two).clamp(-1, 1))
    return torch.cat(pictures)


def evaluate(
    folder: str | Path, rows: CaptionedImages, wrong: bool = False, snapshot: int | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Per-image metrics of a run on `rows`: `right`, and with `wrong` also `wrong CHANGE, detokenizer` and
    `wrong CHANGE, both`. LPIPS is on VGG16's trunk. Raises ValueError for a run that was trained on that trunk."""
    model, config = load_run(folder, snapshot)
    if config.training.perceptual == "lpips-vgg":
        raise ValueError(f"{folder} was trained on LPIPS-VGG: it cannot be graded on it too")
    originals = to_float(rows.images(list(range(len(rows)))))
    encoder = text_encoder(config, rows.captions, "cpu")
    captions = {"right": (None, None)}
    if wrong and encoder:
        for change in CHANGES if rows.world else ("picture",):
            lie = wrong_captions(rows, change, config.data.captions)
            captions |= {f"wrong {change}, detokenizer": (None, lie), f"wrong {change}, both": (lie, lie)}
    return {name: image_metrics(reconstruct(model, rows, encoder, *c), originals) for name, c in captions.items()}


def set_distances(reconstructions: Tensor, rows: CaptionedImages) -> dict[str, float]:
    """`evaluation.distances` of a set of reconstructions to their originals."""
    return distances(rows.images(list(range(len(rows)))), to_uint8(reconstructions))


def differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean of a - b and its 95% interval over images, for each metric; plain values, ready for JSON."""
    return {name: vars(paired_bootstrap(a[name], b[name])) for name in a}
