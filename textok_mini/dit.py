"""DiT (Peebles & Xie, 2023) over latent tokens: a transformer that is told time and class by its norms, or reads text.

    model = DiT(load_config("imagenet256-32").dit)
    model(x, t, labels)          # x (B, N, d) noisy latents, t (B,) in [0, 1,000) -> (B, N, 2 d): noise and variance

Patch size 1 over a 1D sequence: a latent token is a token. A block is adaLN-Zero: its two norms have no weights of
their own but a scale and a shift computed from time and class, and what a branch adds is scaled too, by 0 at the start,
so that the whole stack starts as the identity. Text is read by cross-attention, as in PixArt (Chen et al., 2023). (Text
tokens behind the latent ones in the sequence learnt no better, and made it five times as long at the paper's size.)
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from textok_mini.config import DiTConfig
from textok_mini.text import TextTokens
from textok_mini.vit import Attention

FREQUENCIES = 256


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
        self.blocks = nn.ModuleList(Block(c.width, c.heads, reads=c.condition == "text") for _ in range(c.layers))
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
        ends = [self.modulation[1], self.token_out, *(block.modulation[1] for block in self.blocks)]
        for linear in ends + [block.reading.out for block in self.blocks if block.reading]:
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | TextTokens) -> Tensor:
        """x (B, N, d), t (B,), and labels (B,) or text tokens, to (B, N, 2 d)."""
        c = self.config
        if x.shape[1:] != (c.num_latent_tokens, c.latent_dim):
            raise ValueError(f"latents must be (B, {c.num_latent_tokens}, {c.latent_dim}), not {(*x.shape,)}")
        told, text = self.time_in(frequencies(t).to(x.dtype)), None
        if c.condition == "class":
            told = told + self.classes(condition)
        else:
            words = self.text_in(condition.embeddings) + self.text_positions[: condition.mask.shape[1]]
            text = TextTokens(words, condition.mask)
        x = self.token_in(x) + self.positions
        for block in self.blocks:
            x = block(x, told, text)
        shift, scale = self.modulation(told).chunk(2, dim=1)
        return self.token_out(modulated(x, shift, scale))


class Block(nn.Module):
    """adaLN-Zero: (B, N, width), what is told, (B, width), and text if it reads any, to (B, N, width)."""

    def __init__(self, width: int, heads: int, reads: bool = False):
        super().__init__()
        self.attention = Attention(width=width, heads=heads)
        self.reading = CrossAttention(width, heads) if reads else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor, text: TextTokens | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulated(x, shift1, scale1))
        if self.reading:
            x = x + self.reading(x, text)
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class CrossAttention(nn.Module):
    """Tokens (B, N, width) look at text tokens of the same width; adds nothing at the start."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: TextTokens) -> Tensor:
        q = rearrange(self.query(self.norm(x)), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.key_value(text.embeddings), "b t (two h d) -> two b h t d", two=2, h=self.heads)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=rearrange(text.mask, "b t -> b 1 1 t"))
        return self.out(rearrange(read, "b h n d -> b n (h d)"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm of every token of x (B, N, width), then x (1 + scale) + shift, the same for all tokens of a picture."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def frequencies(t: Tensor) -> Tensor:
    """Times (B,) as cosines and sines (B, 256) of wavelengths from 2 pi to 2 pi 10,000."""
    rates = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES // 2, device=t.device) / (FREQUENCIES // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
