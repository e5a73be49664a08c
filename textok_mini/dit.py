"""DiT (Peebles & Xie, 2023) over latent tokens: a transformer that is told the time and the class by its norms.

    model = DiT(preset("imagenet256-32").dit)
    model(x, t, labels)          # x (B, N, d) noisy latents, t (B,) in [0, 1,000) -> (B, N, 2 d): noise and variance

Patch size 1 over a 1D sequence: a latent token is a token. A block is adaLN-Zero: its two norms have no weights of
their own but a scale and a shift computed from time and class, and what a branch adds is scaled too, by 0 at the start,
so that the whole stack starts as the identity.
"""

import math

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from textok_mini.config import DiTConfig
from textok_mini.vit import Attention

FREQUENCIES = 256


class DiT(nn.Module, PyTorchModelHubMixin, library_name="textok_mini", license="mit"):
    """Noisy latents, times and labels to the noise (and where `learn_variance`, how far the variance is between its
    bounds). Label `num_classes` is "no class": in training `class_dropout` of the labels become it, for CFG."""

    def __init__(self, dit: DiTConfig):
        super().__init__()
        self.config = c = dit
        self.token_in = nn.Linear(c.latent_dim, c.width)
        self.positions = nn.Parameter(0.02 * torch.randn(c.num_latent_tokens, c.width))
        self.time_in = nn.Sequential(nn.Linear(FREQUENCIES, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.classes = nn.Embedding(c.num_classes + 1, c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        self.token_out = nn.Linear(c.width, c.latent_dim * (2 if c.learn_variance else 1))
        self.initialise()

    def initialise(self) -> None:
        """As the original: Xavier matrices, small embeddings, and zeros wherever a branch or the output ends."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for weight in (self.classes.weight, self.time_in[0].weight, self.time_in[2].weight):
            nn.init.normal_(weight, std=0.02)
        for linear in (self.modulation[1], self.token_out, *(block.modulation[1] for block in self.blocks)):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x (B, N, d), t (B,) and labels (B,), whole numbers up to `num_classes`, to (B, N, d or 2 d)."""
        c = self.config
        if x.shape[1:] != (c.num_latent_tokens, c.latent_dim):
            raise ValueError(f"latents must be (B, {c.num_latent_tokens}, {c.latent_dim}), not {(*x.shape,)}")
        told = self.time_in(frequencies(t).to(x.dtype)) + self.classes(labels)
        x = self.token_in(x) + self.positions
        for block in self.blocks:
            x = block(x, told)
        shift, scale = self.modulation(told).chunk(2, dim=1)
        return self.token_out(modulated(x, shift, scale))

    def dropped(self, labels: Tensor, lots: Tensor) -> Tensor:
        """Labels (B,), where `lots` (B,), uniform in [0, 1), is below `class_dropout` "no class"."""
        return labels.where(lots >= self.config.class_dropout, self.config.num_classes)


class Block(nn.Module):
    """adaLN-Zero: (B, N, width) and what is told, (B, width), to (B, N, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width=width, heads=heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulated(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm of every token of x (B, N, width), then x (1 + scale) + shift, the same for all tokens of a picture."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def frequencies(t: Tensor) -> Tensor:
    """Times (B,) as cosines and sines (B, 256) of wavelengths from 2 pi to 2 pi 10,000."""
    rates = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES // 2, device=t.device) / (FREQUENCIES // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
