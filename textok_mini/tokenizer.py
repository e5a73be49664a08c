"""TexTok: a tokenizer and a detokenizer that both read the caption ("Method", figure 2 of the paper).

    tokens of the tokenizer:    [N latent | patches of the image | text]  -> keep the N, project to d
    tokens of the detokenizer:  [learned patches | N latent | text]       -> keep the patches, project to pixels

The caption says what is in the picture; the N latent tokens can spend themselves on what words can't say. Each
sequence starts with the tokens whose outputs are read, so that the last block can leave out the others.
`text_in` says which half gets the text; `none` is the twin without text, which then has no text parameter at all.
With `layout: grid` there are no tokens of their own for the latents: those of the patches are read instead.
"""

import torch
from einops import rearrange, repeat
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from textok_mini.bottleneck import Bottleneck
from textok_mini.config import TexTokConfig
from textok_mini.text import TextTokens
from textok_mini.vit import Transformer, position_table


class TexTok(nn.Module, PyTorchModelHubMixin, library_name="textok_mini", license="mit"):
    """An image and its caption to N latent tokens of d channels, and back.

    images: (B, 3, H, W) in [-1, 1]. text: `TextTokens` or None. latents: (B, N, d).
    `from_pretrained(folder or hub id)` reads a run's `config.json` and `model.safetensors`, strictly.
    """

    def __init__(self, tokenizer: TexTokConfig):
        super().__init__()
        self.config, self.bottleneck = tokenizer, Bottleneck(tokenizer)
        c, one = tokenizer, tokenizer.layout == "1d"
        shape = dict(width=c.width, heads=c.heads, mlp_ratio=c.mlp_ratio)
        patch_values = 3 * c.patch_size**2

        # What both twins have comes first: from one seed they then start from the same weights.
        self.patch_in = nn.Linear(patch_values, c.width)
        self.encoder_patch_positions = position_table(c.num_patches, c.width)
        # Small: these ask rather than tell. At 0.2 the twin without text codes nothing but the background for long.
        if one:
            self.latent_tokens = position_table(c.num_latent_tokens, c.width, deviation=0.02)
            self.encoder_latent_positions = position_table(c.num_latent_tokens, c.width, deviation=0.02)
        self.encoder = Transformer(layers=c.encoder_layers, **shape)
        self.latent_out = nn.Linear(c.width, self.bottleneck.channels)

        self.latent_in = nn.Linear(c.latent_dim, c.width)
        if one:
            self.patch_tokens = position_table(c.num_patches, c.width)
        self.decoder_patch_positions = position_table(c.num_patches, c.width)
        if one:
            self.decoder_latent_positions = position_table(c.num_latent_tokens, c.width)
        self.decoder = Transformer(layers=c.decoder_layers, **shape)
        self.patch_out = nn.Linear(c.width, patch_values)

        if c.text_in in ("both", "tokenizer"):
            self.encoder_text_in = nn.Linear(c.text_dim, c.width)
            self.encoder_text_positions = position_table(c.max_text_tokens, c.width)
        if c.text_in in ("both", "detokenizer"):
            self.decoder_text_in = nn.Linear(c.text_dim, c.width)
            self.decoder_text_positions = position_table(c.max_text_tokens, c.width)
        if c.num_registers:
            self.encoder_registers = position_table(c.num_registers, c.width)
            self.decoder_registers = position_table(c.num_registers, c.width)
        if c.num_latent_tokens == 0:  # then nothing is encoded; DDP would wait for these gradients
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(not name.startswith(("patch_in", "encoder", "latent_")))

    def encode(self, images: Tensor, text: TextTokens | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to latent tokens (B, N, d), of whatever kind `latent` is (bottleneck.py).
        Raises ValueError for a wrong size, or text missing where it is read."""
        return self.bottleneck(self.read(images, text))[0]

    def decode(self, latents: Tensor, text: TextTokens | None = None) -> Tensor:
        """Latent tokens (B, N, d) to images (B, 3, H, W), about [-1, 1] but not clipped.

        Raises ValueError for a wrong shape, or text missing where the detokenizer reads it."""
        return unpatchify(self.patch_out(self.drawn(latents, text)), self.config.patch_size)

    def forward(
        self, images: Tensor, text: TextTokens | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, 3, H, W), and the bottleneck's own loss.

        `noise` (B, N, d), standard normal, is for training a `noisy` or `kl` latent: it is passed in, so that the model
        itself draws nothing and a resumed run repeats exactly."""
        z, own = self.bottleneck(self.read(images, text), noise)
        return self.decode(z, text), own

    def read(self, images: Tensor, text: TextTokens | None = None) -> Tensor:
        """The tokenizer's half: images to what goes through the bottleneck, (B, N, channels)."""
        c = self.config
        if images.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(f"images must be (B, 3, {c.image_size}, {c.image_size}), not {(*images.shape,)}")
        if c.num_latent_tokens == 0:  # words only: there is nothing to encode
            return images.new_zeros(len(images), 0, self.bottleneck.channels)
        x = self.patch_in(patchify(images, c.patch_size)) + self.encoder_patch_positions
        if c.layout == "1d":
            latents = self.latent_tokens + self.encoder_latent_positions
            x = torch.cat([repeat(latents, "n width -> b n width", b=len(images)), x], dim=1)
        x, mask = self.with_text(x, text, "encoder")
        return self.latent_out(self.encoder(x, mask, keep=c.num_latent_tokens))

    def drawn(self, latents: Tensor, text: TextTokens | None = None) -> Tensor:
        """The detokenizer's half: latent tokens (B, N, d) to patch tokens (B, patches, width), before pixels."""
        c = self.config
        if latents.shape[1:] != (c.num_latent_tokens, c.latent_dim):
            raise ValueError(f"latents must be (B, {c.num_latent_tokens}, {c.latent_dim}), not {(*latents.shape,)}")
        x = self.latent_in(latents)
        if c.layout == "1d":
            patches = self.patch_tokens + self.decoder_patch_positions
            patches = repeat(patches, "p width -> b p width", b=len(latents))
            x = torch.cat([patches, x + self.decoder_latent_positions], dim=1)
        else:
            x = x + self.decoder_patch_positions
        x, mask = self.with_text(x, text, "decoder")
        return self.decoder(x, mask, keep=c.num_patches)

    def with_text(self, x: Tensor, text: TextTokens | None, half: str) -> tuple[Tensor, Tensor | None]:
        """Append the projected text tokens, if this half (`encoder`, `decoder`) reads any, and the key mask."""
        if self.config.num_registers:
            registers = getattr(self, f"{half}_registers")
            return torch.cat([x, repeat(registers, "r width -> b r width", b=len(x))], dim=1), None
        if not hasattr(self, f"{half}_text_in"):
            return x, None
        if text is None:
            raise ValueError(f"this TexTok reads text (text_in={self.config.text_in}): pass its text tokens")
        tokens, longest = text.embeddings.shape[1], self.config.max_text_tokens
        if tokens > longest:
            raise ValueError(f"{tokens} text tokens, but this TexTok has positions for {longest}")
        used = text.mask.any(dim=0)  # slots that are padding in every row are left out: they would only cost
        positions = getattr(self, f"{half}_text_positions")[:tokens][used]
        y = getattr(self, f"{half}_text_in")(text.embeddings[:, used]) + positions
        # Without padding no mask is needed, and attention takes its faster path.
        mask = None if text.mask[:, used].all() else F.pad(text.mask[:, used], (x.shape[1], 0), value=True)
        return torch.cat([x, y], dim=1), mask

    @classmethod
    def from_pretrained(cls, *args, strict: bool = True, **kwargs) -> "TexTok":
        return super().from_pretrained(*args, strict=strict, **kwargs)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) to (B, patches, 3 * patch_size**2), rows of patches first."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`, for square images."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size)
