"""What a latent token may hold: the one respect in which most tokenizers differ.

    bottleneck = Bottleneck(config)
    z, own = bottleneck(x, noise)      # what the detokenizer gets, (B, N, d), and what is charged for it

| `latent` | a token is | whose |
|---|---|---|
| plain | any d numbers | an autoencoder's; probably the paper's |
| noisy | d numbers of unit power, with noise in training: a channel of known capacity | the kit's |
| kl | the mean of a Gaussian held near the standard normal | SD-VAE's, TA-TiTok's |
| vq | the nearest of `codebook_size` learned vectors | VQGAN's, TiTok's |
| words | the nearest of the text encoder's own embeddings of its first words | LQAE's, SPAE's |
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from textok_mini.config import TexTokConfig

PATIENCE = 20  # steps that a code may be idle
COMMITMENT = 0.25  # how much the tokenizer is charged for its distance from its code (VQ-VAE's; TiTok's too)


class Bottleneck(nn.Module):
    """(B, N, `channels`) of a tokenizer to latent tokens (B, N, d). Has a codebook for `vq` and `words`."""

    def __init__(self, c: TexTokConfig):
        super().__init__()
        self.latent, self.deviation, d = c.latent, c.latent_noise, c.latent_dim
        self.hardness = 1.0  # how much of the way to its code a token goes; training begins with little
        self.channels = 2 * d if c.latent == "kl" else d
        if c.latent in ("vq", "words"):
            own = torch.Generator().manual_seed(torch.initial_seed() + 1)  # a codebook changes no other weight
            codes = torch.randn(c.codebook_size, d, generator=own)
            # Words are never trained: `textok_mini.recipe` puts them here, and they are saved with the run.
            self.codebook = nn.Parameter(codes, requires_grad=c.latent == "vq")
            self.register_buffer("idle", torch.zeros(c.codebook_size, dtype=torch.int64))  # steps since it was chosen

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent tokens, and the loss of their own: KL divergence, a sum over a picture's latents and a mean over
        pictures; distance from codes; else 0. `noise` (B, N, d), standard normal, is for training."""
        if self.latent == "kl":
            mean, log_variance = self.posterior(x)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).float().sum((1, 2)).mean()
            return mean if noise is None else mean + (log_variance / 2).exp() * noise, kl
        if self.latent == "plain" or x.shape[1] == 0:
            return x, x.new_zeros(())
        # A fixed power, or the tokenizer would outshout the noise and the rate would be unlimited again. Codes of one
        # length compare by direction alone, which keeps more of a codebook in use (TiTok's l2 normalisation).
        x = F.rms_norm(x, x.shape[-1:])
        if self.latent == "noisy":
            return x if noise is None else x + self.deviation * noise, x.new_zeros(())
        index = self.nearest(x)
        if self.training and self.hardness < 1 and self.latent == "vq":
            self.restart(x, index)
        code = self.vectors()[index]
        own = F.mse_loss(code, x.detach()) + COMMITMENT * F.mse_loss(x, code.detach())
        own = own * self.hardness / x.shape[-1]  # of vectors of unit length, as TiTok counts it
        # Straight through: the code's gradient is taken for the token's.
        return x + self.hardness * (code - x).detach(), own

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, (B, N, d) each, where `latent` is `kl`."""
        mean, log_variance = x.chunk(2, dim=-1)
        return mean, log_variance.clamp(-30, 20)  # latent diffusion's bounds

    @torch.no_grad()
    def restart(self, x: Tensor, index: Tensor) -> None:
        """Codes that no token has chosen for a while begin anew as tokens of this batch (Jukebox's), or a small
        tokenizer, whose tokens lie close together at first, would use a few of them for ever (measured)."""
        self.idle += 1
        self.idle[index.flatten()] = 0
        tokens = rearrange(x, "b n d -> (b n) d").to(self.codebook.dtype)
        dead = (self.idle > PATIENCE).nonzero().flatten()[: len(tokens)]
        self.codebook[dead], self.idle[dead] = tokens[: len(dead)], 0
        if torch.distributed.is_initialized():  # every process has met other tokens
            torch.distributed.broadcast(self.codebook, 0)
            torch.distributed.broadcast(self.idle, 0)

    def vectors(self) -> Tensor:
        """The codes (codebook_size, d), each of unit RMS."""
        return F.rms_norm(self.codebook, self.codebook.shape[-1:])

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Indices (B, N) of the codes nearest to tokens of unit RMS (B, N, d)."""
        with torch.autocast(z.device.type, enabled=False):  # bf16 confuses neighbours
            return (rearrange(z, "b n d -> (b n) d").float() @ self.vectors().float().T).argmax(-1).view(z.shape[:2])


def latent_bits(c: TexTokConfig) -> float | None:
    """The most bits that a picture's latent tokens can carry; None where nothing limits them.

    `noisy`: N d ½ log₂(1 + 1/s²), Shannon's capacity of N d Gaussian channels with unit power and noise of deviation s.
    Codes: N log₂ of how many there are."""
    if c.latent in ("vq", "words"):
        return c.num_latent_tokens * math.log2(c.codebook_size)
    if c.latent == "noisy" and c.latent_noise:
        return c.num_latent_tokens * c.latent_dim * 0.5 * math.log2(1 + c.latent_noise**-2)
    return None
