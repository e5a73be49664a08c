"""The critic of the GAN: StyleGAN2's residual discriminator, as MAGVIT has it ("StyleGAN, about 24M", paper).

    Discriminator(DiscriminatorConfig(image_size=256))(images)  # (B, 3, 256, 256) in [-1, 1] to logits (B,)

A stem, one residual block a halving of the picture until 4 x 4 are left, a convolution, two linear layers. The layout
follows google-research/magvit (`stylegan_discriminator_2d.py`), which like StyleGAN's residual form filters before it
halves, and unlike StyleGAN has neither equalised learning rates nor statistics of the minibatch: each picture is judged
alone, so the number of processes changes nothing. Every layer has second derivatives on every device, for R1.
"""

import itertools

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from textok_mini.config import DiscriminatorConfig


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to logits (B,): above 0 for pictures that it takes for real ones."""

    def __init__(self, discriminator: DiscriminatorConfig):
        super().__init__()
        self.config = c = discriminator
        widths = [c.channels, *c.widths]
        self.stem = nn.Conv2d(3, c.channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * 4 * 4, widths[-1])
        self.out = nn.Linear(widths[-1], 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        c = self.config
        if images.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(f"images must be (B, 3, {c.image_size}, {c.image_size}), not {(*images.shape,)}")
        x = leaky(self.stem(images))
        for block in self.blocks:
            x = block(x)
        x = rearrange(leaky(self.last(x)), "b c h w -> b (c h w)")
        return self.out(leaky(self.hidden(x))).flatten()


class ResBlock(nn.Module):
    """(B, C, H, W) to (B, C', H/2, W/2): two convolutions beside a linear skip, their sum over the root of two."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = leaky(self.second(halve(leaky(self.first(x)))))
        return (self.skip(halve(x)) + branch) * 0.5**0.5


def halve(x: Tensor) -> Tensor:
    """Every second pixel after a blur of (1, 3, 3, 1) / 8 each way: without it small details flicker (Zhang, 2019)."""
    return Halve.apply(x, False)


class Halve(torch.autograd.Function):
    """A linear map's gradient is its transpose, whose gradient is the map again. Said so, R1 costs two more filters a
    block; torch's own second derivative of a convolution by channels takes them one by one, thousands in all."""

    @staticmethod
    def forward(ctx, x: Tensor, transposed: bool) -> Tensor:
        ctx.transposed, (b, c, h, w) = transposed, x.shape
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
        kernel, how = torch.outer(taps, taps).expand(c, 1, 4, 4), dict(stride=2, padding=1, groups=c)
        return conv2d_input((b, c, 2 * h, 2 * w), kernel, x, **how) if transposed else F.conv2d(x, kernel, **how)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return Halve.apply(gradient, not ctx.transposed), None


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
