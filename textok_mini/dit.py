"""DiT (Peebles & Xie, 2023) over latent tokens: a transformer that is told time and class by its norms, or text.

    model = DiT(preset("imagenet256-32").dit)
    model(x, t, labels)          # x (B, N, d) noisy latents, t (B,) in [0, 1,000) -> (B, N, 2 d): noise and variance

Patch size 1 over a 1D sequence: a latent token is a token. A block is adaLN-Zero: its two norms have no weights of
their own but a scale and a shift computed from time and class, and what a branch adds is scaled too, by 0 at the start,
so that the whole stack starts as the identity. Text tokens stand in the sequence behind the latent ones.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_mini.config import DiTConfig
from textok_mini.text import TextTokens
from textok_mini.vit import Attention

FREQUENCIES = 256
FORM = __import__("os").environ.get("FORM", "sequence")


class DiT(nn.Module):
    """Noisy latents, times and conditions to the noise (or a velocity), and how far the variance is between its bounds
    (which flow matching does not read). A condition is labels (B,), where `num_classes` is "no class", or `TextTokens`,
    where "no text" is the tokens of an empty caption."""

    def __init__(self, dit: DiTConfig):
        super().__init__()
        self.config = c = dit
        self.token_in = nn.Linear(c.latent_dim, c.width)
        self.positions = nn.Parameter(0.02 * torch.randn(c.num_latent_tokens, c.width))
        self.time_in = nn.Sequential(nn.Linear(FREQUENCIES, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        if c.condition == "class":
            self.classes = nn.Embedding(c.num_classes + 1, c.width)
        else:
            self.text_in = nn.Linear(c.text_dim, c.width)
            self.text_positions = nn.Parameter(0.02 * torch.randn(c.max_text_tokens, c.width))
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.condition == "text" and FORM == "cross") for _ in range(c.layers)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        self.token_out = nn.Linear(c.width, 2 * c.latent_dim)
        self.initialise()

    def initialise(self) -> None:
        """As the original: Xavier matrices, small embeddings, and zeros wherever a branch or the output ends."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for weight in (self.time_in[0].weight, self.time_in[2].weight):
            nn.init.normal_(weight, std=0.02)
        if self.config.condition == "class":
            nn.init.normal_(self.classes.weight, std=0.02)
        for linear in (self.modulation[1], self.token_out, *(block.modulation[1] for block in self.blocks)):
            nn.init.zeros_(linear.weight)
        for block in self.blocks:
            if hasattr(block, "o"):
                nn.init.zeros_(block.o.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | TextTokens) -> Tensor:
        """x (B, N, d), t (B,), and labels (B,) or text tokens, to (B, N, 2 d)."""
        c = self.config
        if x.shape[1:] != (c.num_latent_tokens, c.latent_dim):
            raise ValueError(f"latents must be (B, {c.num_latent_tokens}, {c.latent_dim}), not {(*x.shape,)}")
        told, mask = self.time_in(frequencies(t).to(x.dtype)), None
        x, y, ymask = self.token_in(x) + self.positions, None, None
        if c.condition == "class":
            told = told + self.classes(condition)
        else:
            words = self.text_in(condition.embeddings) + self.text_positions[: condition.mask.shape[1]]
            if FORM == "sequence":
                x = torch.cat([x, words], dim=1)
                mask = F.pad(condition.mask, (c.num_latent_tokens, 0), value=True)
            else:
                y, ymask = words, condition.mask
        for block in self.blocks:
            x = block(x, told, mask, y, ymask)
        shift, scale = self.modulation(told).chunk(2, dim=1)
        return self.token_out(modulated(x[:, : c.num_latent_tokens], shift, scale))


class Block(nn.Module):
    """adaLN-Zero: (B, S, width) and what is told, (B, width), to (B, S, width)."""

    def __init__(self, width: int, heads: int, cross: bool = False):
        super().__init__()
        self.attention = Attention(width=width, heads=heads)
        if cross:
            self.q, self.kv, self.o, self.heads = (
                nn.Linear(width, width),
                nn.Linear(width, 2 * width),
                nn.Linear(width, width),
                heads,
            )
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor, mask=None, y=None, ymask=None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulated(x, shift1, scale1), mask)
        if y is not None:
            from einops import rearrange

            q = rearrange(self.q(F.layer_norm(x, x.shape[-1:])), "b s (h d) -> b h s d", h=self.heads)
            k, v = rearrange(self.kv(y), "b s (two h d) -> two b h s d", two=2, h=self.heads)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=ymask[:, None, None])
            x = x + self.o(rearrange(a, "b h q d -> b q (h d)"))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm of every token of x (B, S, width), then x (1 + scale) + shift, the same for all tokens of a picture."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def frequencies(t: Tensor) -> Tensor:
    """Times (B,) as cosines and sines (B, 256) of wavelengths from 2 pi to 2 pi 10,000."""
    rates = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES // 2, device=t.device) / (FREQUENCIES // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
