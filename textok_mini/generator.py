"""The generator's recipe: what a step of a DiT's training is, and how its pictures are drawn.

    recipe = GeneratorRecipe(config, accelerator)        # `training.train` runs it, as it runs the tokenizer's
    latents = sample_latents(model, process, condition, nothing, keys, scale=2.0)

The DiT learns normalised latents (`latents.py`). Told a class, its pictures get their words at decoding only: the paper
draws them from captions of that class that no training has seen. Told a text, it is the same text at both places.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from textok_mini.config import Config
from textok_mini.device import tf32
from textok_mini.diffusion import Diffusion, Flow, guided, noise_of
from textok_mini.dit import DiT
from textok_mini.images import save_image_grid
from textok_mini.latents import Latents
from textok_mini.recipe import text_encoder
from textok_mini.run import TrainingError
from textok_mini.schedule import generator_of
from textok_mini.text import TextTokens

Condition = Tensor | TextTokens
PROCESSES = {"diffusion": Diffusion, "flow": Flow}
SHOWN = 8  # pictures of a sample on the way


class GeneratorRecipe:
    """`rows` to train on, the `model`, and `parts` with a state: none here."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.t, self.accelerator, c = config, config.generator, accelerator, config.dit
        self.rows, self.process, self.parts = Latents(self.t.latents), PROCESSES[self.t.process](), {}
        if self.rows.shape != (c.num_latent_tokens, c.latent_dim):
            (count, dim), todo = self.rows.shape, "set dit.num_latent_tokens and dit.latent_dim"
            wrong = f"{count} latent tokens of {dim} numbers, but dit has {c.num_latent_tokens} of {c.latent_dim}"
            raise TrainingError(f"{self.t.latents}: {wrong}: {todo}")
        if c.condition == "class" and not 0 <= self.rows.labels.min() <= self.rows.labels.max() < c.num_classes:
            raise TrainingError(f"{self.t.latents}: labels must be 0 to {c.num_classes - 1} (dit.num_classes)")
        self.text = None
        if c.condition == "text":
            with accelerator.main_process_first():
                self.text = text_encoder(config, [*self.rows.captions, ""], accelerator.device, of="dit")
        torch.manual_seed(self.t.seed)
        self.model = DiT(c).to(accelerator.device)
        if self.t.sample_every and accelerator.is_main_process:
            self.tokenizer, theirs = self.rows.space.tokenizer()
            told = text_encoder(theirs, None, torch.device("cpu"))
            self.samples = told(self.rows.captions[:SHOWN]) if told else None

    def told(self, labels: Tensor, captions: Sequence[str], drop: Tensor) -> Condition:
        """The condition of some rows; where `drop` (B,), none."""
        if self.text is None:
            return labels.where(~drop, self.config.dit.num_classes).to(self.accelerator.device)
        return self.text(["" if d else c for c, d in zip(captions, drop, strict=True)]).to(self.accelerator.device)

    def pieces(self, batch: dict, step: int) -> list[tuple]:
        """This process's part of a batch as `accumulate` tuples of latents, condition, times and noise."""
        device, t, c = self.accelerator.device, self.t, self.config.dit
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        lots = torch.rand(2, t.batch_size, generator=generator_of(t, step, 1))[:, mine]
        shape = (t.batch_size, c.num_latent_tokens, c.latent_dim)
        noise = torch.randn(shape, generator=generator_of(t, step))[mine].to(device)
        condition = self.told(batch["label"], batch["caption"], lots[0] < c.dropout)
        times = self.process.times(lots[1]).to(device)
        parts = (batch["latents"].to(device), condition, times, noise)
        return list(zip(*(part.chunk(t.accumulate) for part in parts), strict=True))

    def loss(self, stepped: nn.Module, piece: tuple, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        latents, condition, times, noise = piece
        with self.accelerator.autocast():
            return self.process.loss(lambda x, t: stepped(x, t, condition), latents, times, noise)

    def after(self, step: int, rate: float) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def draw(self, model: DiT, path: Path) -> None:
        """Pictures of the first rows' conditions and captions, from the same noise every time."""
        path.parent.mkdir(exist_ok=True)
        captions, nobody = self.rows.captions[:SHOWN], torch.zeros(SHOWN, dtype=torch.bool)
        condition, nothing = (self.told(self.rows.labels[:SHOWN], captions, drop) for drop in (nobody, ~nobody))
        x = sample_latents(model, self.process, condition, nothing, range(SHOWN), scale=2.0, steps=50)
        save_image_grid([self.tokenizer.decode(self.rows.space.denormalise(x).cpu(), self.samples)], path)


@torch.no_grad()
@tf32()
def sample_latents(
    model: DiT,
    process: Any,
    condition: Condition,
    nothing: Condition,
    pictures: Sequence[int],
    scale: float = 1.0,
    interval: tuple[float, float] = (0, 1_000),
    steps: int = 250,
    seed: int = 0,
) -> Tensor:
    """Normalised latents (B, N, d) of `pictures`' numbers: each follows from seed, number and condition alone. The
    noise at the start is the same for any number of steps."""
    c, device = model.config, next(model.parameters()).device
    shape = (c.num_latent_tokens, c.latent_dim)

    def fresh(step: int) -> Tensor:
        return noise_of(seed, pictures, step, shape).to(device)

    predict = guided(model, condition, nothing, scale, interval)
    return process.sample(predict, fresh(0), fresh, steps)
