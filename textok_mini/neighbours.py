"""The tokenizers that TexTok is compared with, where a setting of `TexTok` is not enough.

| neighbour | here |
|---|---|
| TiTok | `latent: vq`, `text_in: none` |
| TiTok in two stages | the same, and a `proxy`: `TwoStage` |
| TA-TiTok | `latent: vq` or `kl`, `text_in: detokenizer` |
| LQAE, SPAE | `latent: words`, `text_in: none` |
| a ViT over a 2D grid | `layout: grid` |
| SD-VAE, VQGAN | `layout: convolutions`, `latent: kl` or `vq` |

All are trained on the same pictures by the same loop. `tokenizer_of` makes the one that a config asks for.
"""

import warnings
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from textok_mini.bottleneck import Bottleneck
from textok_mini.config import TexTokConfig
from textok_mini.hub import from_hub
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok


def tokenizer_of(c: TexTokConfig) -> nn.Module:
    """`TexTok`, or another with the same `encode`, `decode` and `forward`."""
    if c.layout == "convolutions":
        return ConvolutionalTokenizer(c)
    return TwoStage(c) if c.proxy else TexTok(c)


class ConvolutionalTokenizer(nn.Module):
    """SD-VAE's encoder and decoder (Rombach et al., 2022; diffusers'), and VQGAN's, which differ in the bottleneck.

    A latent token is a place of a square grid of N; it reads no text. Halvings follow from image size and N; `width`
    is that of the innermost level, a quarter of it that of the others; a level has one ResNet block."""

    def __init__(self, c: TexTokConfig):
        super().__init__()
        from diffusers.models.autoencoders.vae import Decoder, Encoder  # seconds to import, and rarely needed

        self.config, self.bottleneck = c, Bottleneck(c)
        halvings = (c.image_size // c.grid_side).bit_length() - 1
        widths = [c.width // 4] * halvings + [c.width]
        shape = dict(block_out_channels=widths, layers_per_block=1, norm_num_groups=min(32, c.width // 4))
        down, up = (tuple(f"{kind}2D" for _ in widths) for kind in ("DownEncoderBlock", "UpDecoderBlock"))
        self.encoder = Encoder(3, self.bottleneck.channels, down, double_z=False, **shape)
        self.decoder = Decoder(c.latent_dim, 3, up, **shape)

    def encode(self, images: Tensor, text: TextTokens | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to latent tokens (B, N, d), rows of the grid first."""
        return self.bottleneck(self.places(images))[0]

    def decode(self, latents: Tensor, text: TextTokens | None = None) -> Tensor:
        return self.decoder(rearrange(latents, "b (h w) d -> b d h w", h=self.config.grid_side))

    def forward(
        self, images: Tensor, text: TextTokens | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        z, own = self.bottleneck(self.places(images), noise)
        return self.decode(z), own

    def places(self, images: Tensor) -> Tensor:
        return rearrange(self.encoder(images), "b d h w -> b (h w) d")


# What diffusers can load: SD-VAE, and aMUSEd's VQGAN, of MaskGIT's kind. TiTok's and TA-TiTok's weights come with code
# of their own and are not here.
PUBLISHED = {
    "sd-vae": ("AutoencoderKL", "stabilityai/sd-vae-ft-mse", {}),
    "vqgan": ("VQModel", "amused/amused-256", {"subfolder": "vqvae"}),
}


@torch.no_grad()
def published(name: str, images: Tensor, path: str = "") -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], clipped, through a neighbour's public weights: those of the hub, or in a folder
    `path`. For their rFID beside ours. Raises ValueError for an unknown name, OSError, in one line, for weights that
    cannot be had."""
    import diffusers

    if name not in PUBLISHED:
        raise ValueError(f"no published {name!r}: there are {', '.join(PUBLISHED)}")
    kind, hub_id, where = PUBLISHED[name]
    with warnings.catch_warnings():  # diffusers hands the hub's client an argument that it no longer knows
        warnings.simplefilter("ignore", UserWarning)
        options = {"use_safetensors": True} | ({} if path else where)
        model = from_hub(getattr(diffusers, kind), path or hub_id, f"published {name}", **options)
    model = model.to(images.device).eval()
    coded = model.encode(images)
    latents = coded.latents if kind == "VQModel" else coded.latent_dist.mean
    return model.decode(latents).sample.clamp(-1, 1)


class TwoStage(TexTok):
    """TiTok's two stages (Yu et al., 2024): first the detokenizer learns to name the codes of a finished 2D tokenizer
    with a codebook, the proxy; then, with the tokenizer held still, it and the proxy's decoder learn pixels.

    The proxy is a run of the same shape with `layout: grid`, `latent: vq`, `text_in: none`. `textok_mini.recipe` puts
    its weights here, and says by `stage` which of the two it is: half of the steps each. Its training comes on top."""

    def __init__(self, c: TexTokConfig):
        super().__init__(c)
        one = dict(layout="grid", latent="vq", text_in="none", num_latent_tokens=c.num_patches, proxy="")
        self.stage, self.proxy = 1, TexTok(replace(c, **one))
        self.patch_out = nn.Linear(c.width, self.proxy.config.codebook_size)
        self.proxy.requires_grad_(False)
        self.proxy.decoder.requires_grad_(True)
        self.proxy.patch_out.requires_grad_(True)

    def names(self, latents: Tensor, text: TextTokens | None) -> Tensor:
        """Logits (B, places, codes) of the proxy's code at each place of its grid."""
        return self.patch_out(self.drawn(latents, text))

    def decode(self, latents: Tensor, text: TextTokens | None = None) -> Tensor:
        # The expected code rather than the likeliest, for the gradient's sake (TiTok's soft lookup).
        expected = self.names(latents, text).softmax(-1) @ self.proxy.bottleneck.vectors()
        return self.proxy.decode(expected)

    def forward(
        self, images: Tensor, text: TextTokens | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        z, own = self.bottleneck(self.read(images, text), noise)
        if self.stage == 2:
            return self.decode(z.detach(), text), own.detach()
        with torch.no_grad():
            codes = self.proxy.bottleneck.nearest(self.proxy.encode(images))
        return None, own + F.cross_entropy(rearrange(self.names(z, text), "b p k -> b k p").float(), codes)
