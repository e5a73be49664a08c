"""The paper's recipe: what a step of a tokenizer's training is. The loop around it is `training.train`.

recipe = TokenizerRecipe(config, accelerator)
for piece in recipe.pieces(batch, step):                 # a batch, cut where memory is short
    loss, parts = recipe.loss(recipe.model, piece, step) # l2, LPIPS, KL, and what the discriminator says
parts |= recipe.after(step, rate)                        # the discriminator's own step
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from textok_mini.config import Config
from textok_mini.data import load_data, mirrored
from textok_mini.gan import GAN
from textok_mini.images import save_image_grid, to_float
from textok_mini.losses import perceptual_loss, tokenizer_loss
from textok_mini.neighbours import tokenizer_of
from textok_mini.paths import resolve
from textok_mini.run import TrainingError
from textok_mini.schedule import generator_of, step_noise
from textok_mini.text import CachedText, FrozenTextEncoder
from textok_mini.tokenizer import TexTok


class TokenizerRecipe:
    """`rows` to train on, the `model`, and by name in `parts` whatever else has a state."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.t, self.accelerator, c = config, config.training, accelerator, config.tokenizer
        with accelerator.main_process_first():  # one process prepares data and text, the others find them
            self.rows = load_data(config.data, "train", c.image_size)
            self.text = text_encoder(config, self.rows.captions, accelerator.device)
        torch.manual_seed(self.t.seed)
        self.model = tokenizer_of(c).to(accelerator.device)
        if c.proxy:
            try:
                self.model.proxy.load_state_dict(load_file(resolve(c.proxy) / "model.safetensors"))
            except (RuntimeError, OSError):
                wanted = "a run of the same shape with tokenizer.layout=grid and tokenizer.latent=vq"
                raise TrainingError(f"tokenizer.proxy={c.proxy} must be {wanted}") from None
        if c.latent == "words":
            words = FrozenTextEncoder(config.text.encoder).word_embeddings(c.codebook_size)
            if words.shape[1] != c.latent_dim:
                raise TrainingError(f"tokenizer.latent_dim must be {words.shape[1]}, as {config.text.encoder}'s words")
            self.model.bottleneck.codebook.data.copy_(words)
        for half in (self.model.encoder, self.model.decoder):
            half.checkpointing = self.t.recompute
        self.perceptual, self.weights = perceptual_loss(self.t.perceptual), {"l2": self.t.l2_weight}
        self.weights |= {self.perceptual.name: self.t.perceptual_weight} if self.perceptual else {}
        self.weights |= {"kl": self.t.kl_weight} if c.latent == "kl" else {}
        self.weights |= {"codes": 1.0} if c.latent in ("vq", "words") else {}
        self.gan = GAN(config, accelerator) if self.t.adversarial_weight else None
        self.parts: dict[str, Any] = {"gan": self.gan} if self.gan else {}
        self.drawn: list[tuple[Tensor, Tensor]] = []  # this step's originals and reconstructions, for the discriminator
        self.cut = 0.0
        if self.t.sample_every and accelerator.is_main_process:
            rows = load_data(config.data, "test", c.image_size).first(8)
            images = to_float(rows.images(list(range(len(rows)))).to(accelerator.device))
            self.samples = images, self.text(rows.captions).to(images.device) if self.text else None

    def pieces(self, batch: dict, step: int) -> list[tuple]:
        """This process's part of a batch as `accumulate` tuples of images, text tokens and noise."""
        device, count = self.accelerator.device, self.t.accumulate
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        images = to_float(batch["image"].to(device))
        if self.config.data.mirror:
            lots = torch.rand(self.t.batch_size, generator=generator_of(self.t, step, 1))
            images = mirrored(images, batch["caption"], lots[mine])
        before = getattr(self.text, "cut", 0)
        tokens = self.text(batch["caption"]).to(device) if self.text else None
        self.cut, self.drawn = (getattr(self.text, "cut", 0) - before) / len(images), []
        noise = step_noise(self.config, step)[mine].to(device)
        words = tokens.chunk(count) if tokens else [None] * count
        return list(zip(images.chunk(count), words, noise.chunk(count), strict=True))

    def loss(self, stepped: nn.Module, piece: tuple, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tokenizer is charged for a piece, and the unweighted parts by name."""
        images, tokens, noise = piece
        # From the start, codes keep a small tokenizer from ever telling pictures apart (measured); noise does too.
        self.model.bottleneck.hardness = min(1.0, 2 * step / self.t.steps)
        if self.config.tokenizer.proxy:
            self.model.stage = 1 if step <= self.t.steps // 2 else 2
        with self.accelerator.autocast():
            reconstruction, own = stepped(images, tokens, noise)
        if reconstruction is None:  # the first of TiTok's two stages, which draws nothing
            return own, {"codes": own.detach()}
        loss, parts = tokenizer_loss(reconstruction, images, self.weights, self.perceptual, own)
        if self.gan:
            self.drawn.append((images, reconstruction.detach()))
            charged, heard = self.gan.charge(reconstruction, step)
            loss, parts = loss + charged, parts | heard
        return loss, parts

    def after(self, step: int, rate: float) -> dict[str, Tensor]:
        """The discriminator's step, after the tokenizer's; its losses, and the share of captions that were cut."""
        parts = {}
        if isinstance(self.text, FrozenTextEncoder):
            parts["captions_cut"] = torch.tensor(self.cut, device=self.accelerator.device)
        if self.gan and self.drawn:
            images, reconstructions = map(torch.cat, zip(*self.drawn, strict=True))
            parts |= self.gan.learn(images, reconstructions, step, rate)
        return parts

    @torch.no_grad()
    def draw(self, model: TexTok, path: Path) -> None:
        """Originals over reconstructions of the first test rows, the same ones every time."""
        images, text = self.samples
        path.parent.mkdir(exist_ok=True)
        save_image_grid([images, model(images, text)[0]], path)


def text_encoder(config: Config, captions: list[str] | None, device: torch.device, of: str = "tokenizer") -> Any:
    """The way to text tokens for the tokenizer or the `dit`, or None for a tokenizer that reads no text. `captions`:
    what is to be cached, if the config wants a cache."""
    c = getattr(config, of)
    if of == "tokenizer" and c.text_in == "none":
        return None
    encoder = FrozenTextEncoder(config.text.encoder, c.max_text_tokens, getattr(torch, config.text.dtype), device)
    if encoder.width != c.text_dim:
        todo = f"set {of}.text_dim={encoder.width}"
        raise TrainingError(f"{of}.text_dim={c.text_dim}, but {config.text.encoder} gives {encoder.width}: {todo}")
    if captions is None or not config.text.cache:
        encoder.model.eval()  # now, by the main process first: what is wrong with its weights is said before any work
        return encoder
    cached = CachedText(encoder, captions)
    if cached.cut:
        print(f"{cached.cut:,} of {len(cached.spans):,} captions were cut at {c.max_text_tokens} tokens", flush=True)
    return cached
