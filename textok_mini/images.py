"""Pictures as a network has them, floats in [-1, 1], and as files have them, uint8."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from textok_mini.paths import beside


def to_float(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255, clipped and rounded to the nearest: the rounding behind every picture and distance here."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W), in [-1, 1] or uint8, to what draws and stores pictures: (B, H, W, 3) uint8."""
    images = images.detach().cpu()
    return rearrange(images if images.dtype == torch.uint8 else to_uint8(images), "b c h w -> b h w c").numpy()


def save_image_grid(rows: Sequence[Tensor], path: Path, gap: int = 2) -> None:
    """Rows of equally many images as one PNG, written beside and renamed."""
    strips = [np.pad(pixels(row), ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255) for row in rows]
    grid = rearrange(np.stack(strips), "row b h w c -> (row h) (b w) c")
    with beside(path) as part:
        Image.fromarray(grid).save(part, format="PNG")
