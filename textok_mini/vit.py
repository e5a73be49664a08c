"""The transformer that everything here is made of: pre-norm blocks over a sequence of tokens.

A block is `x + attention(norm(x))`, then `x + mlp(norm(x))` (ViT, Dosovitskiy et al., 2021). Two things are
particular to sequences in which only some outputs are read: a key mask hides padding, and `keep` lets the last
block compute just the first `keep` tokens, which is the same result for less work.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention: (B, S, width) to (B, Q, width), Q = `keep` or S."""

    def __init__(self, *, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        # Queries of the kept tokens only; keys and values of all.
        weight_q, weight_kv = self.qkv.weight.tensor_split([x.shape[-1]])
        bias_q, bias_kv = self.qkv.bias.tensor_split([x.shape[-1]])
        if keep is None:
            q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.heads)
        else:
            q = rearrange(F.linear(x[:, :keep], weight_q, bias_q), "b q (h d) -> b h q d", h=self.heads)
            k, v = rearrange(F.linear(x, weight_kv, bias_kv), "b s (two h d) -> two b h s d", two=2, h=self.heads)
        # True is "may be looked at"; one row of keys serves all heads and queries.
        key_mask = None if mask is None else rearrange(mask, "b s -> b 1 1 s")
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        return self.out(rearrange(attended, "b h q d -> b q (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block: (B, S, width) to (B, Q, width), Q = `keep` or S."""

    def __init__(self, *, width: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width=width, heads=heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        x = x[:, :keep] + self.attention(self.norm1(x), mask, keep)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of blocks and a last norm.

    `forward(x, mask, keep)`: x (B, S, width); mask (B, S), True for tokens that may be attended to, or None for
    all; `keep`, how many of the first tokens to return, or None for all. Returns (B, keep or S, width).
    """

    def __init__(self, *, width: int, layers: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}")
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, mlp_ratio=mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.norm(self.blocks[-1](x, mask, keep))


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases (timm's and MAE's choice for ViT), for `module.apply`.

    qkv is three matrices in one, so each third gets its own bound."""
    if isinstance(module, Attention):
        for third in module.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(third)
        nn.init.zeros_(module.qkv.bias)
        nn.init.xavier_uniform_(module.out.weight)
        module.out.weight.data *= float(__import__("os").environ.get("RES", "1"))
        nn.init.zeros_(module.out.bias)
    elif isinstance(module, Block):
        for linear in (module.mlp[0], module.mlp[2]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        module.mlp[2].weight.data *= float(__import__("os").environ.get("RES", "1"))


def position_table(tokens: int, width: int) -> nn.Parameter:
    """Learned tokens or positions, (tokens, width), deviation 0.02 as in ViT and MAE."""
    return nn.Parameter(float(__import__("os").environ.get("PSTD", "0.02")) * torch.randn(tokens, width))
