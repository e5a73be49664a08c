"""The transformer that everything here is made of: pre-norm blocks over a sequence of tokens.

A block is `x + attention(norm(x))`, then `x + mlp(norm(x))` (ViT, Dosovitskiy et al., 2021). Two things are
particular to sequences in which only some outputs are read: a key mask hides padding, and `keep` lets the last
block compute just the first `keep` tokens, which is the same result for less work.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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

    def initialise(self, residual_scale: float) -> None:
        """Xavier-uniform matrices and zero biases (MAE's); what a branch adds to `x` starts scaled down."""
        query, key, value = self.attention.qkv.weight.chunk(3)  # three matrices in one, each with its own bound
        for weight in (query, key, value, self.attention.out.weight, self.mlp[0].weight, self.mlp[2].weight):
            nn.init.xavier_uniform_(weight)
        for linear in (self.attention.qkv, self.attention.out, self.mlp[0], self.mlp[2]):
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.attention.out.weight.mul_(residual_scale)
            self.mlp[2].weight.mul_(residual_scale)

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
        self.norm, self.checkpointing = nn.LayerNorm(width), False
        for block in self.blocks:
            block.initialise(residual_scale=(2 * layers) ** -0.5)  # GPT-2's: the stack starts near the identity

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        for block in self.blocks[:-1]:
            # Checkpointing keeps only what goes into a block and computes the rest anew in the backward pass.
            again = self.checkpointing and self.training
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
        return self.norm(self.blocks[-1](x, mask, keep))


def position_table(tokens: int, width: int, deviation: float = 0.2) -> nn.Parameter:
    """Learned tokens or positions, (tokens, width).

    ViT's deviation of 0.02 leaves tokens that nothing else tells apart (the detokenizer's patches) nearly alike, and
    a small model without text then draws the average picture for long (measured; so does a larger residual)."""
    return nn.Parameter(deviation * torch.randn(tokens, width))
