"""What each step takes: its rows, its chances, its learning rate; and the optimiser and EMA that go with it.

Nothing random has a state: the order of rows follows from (seed, epoch), the chances of a step from (seed, step). So a
run that goes on from a checkpoint repeats exactly, on any number of processes.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textok_mini.config import Config, TrainingConfig


class BatchOrder:
    """The rows of each step from `start` on, as lists of indices: a permutation an epoch, from (seed, epoch).

    The order of global batches is the same for any number of processes; rank r takes every world-th row from r.
    """

    def __init__(self, rows: int, t: TrainingConfig, start: int = 0, rank: int = 0, world: int = 1):
        self.rows, self.t, self.start, self.rank, self.world = rows, t, start, rank, world

    def __len__(self) -> int:
        return self.t.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, size = self.rows // self.t.batch_size, self.t.batch_size
        order, of_epoch = None, -1
        for step in range(self.start, self.t.steps):
            epoch, index = divmod(step, per_epoch)
            if epoch != of_epoch:
                order, of_epoch = np.random.default_rng((self.t.seed, epoch)).permutation(self.rows), epoch
            yield order[index * size : (index + 1) * size][self.rank :: self.world].tolist()


def adamw(model: nn.Module, t: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on biases, norms, learned tokens and positions."""
    matrices = [p for m in model.modules() if isinstance(m, nn.Linear) for p in [m.weight]]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=t.learning_rate, betas=(t.beta1, t.beta2), fused=True)


def learning_rate(step: int, t: TrainingConfig) -> float:
    """Linear warm-up to the peak, then a cosine to `final_learning_rate` times the peak at the last step."""
    if step <= t.warmup_steps:
        return t.learning_rate * step / t.warmup_steps
    done = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return t.learning_rate * (t.final_learning_rate + (1 - t.final_learning_rate) * cosine)


def warmed_up_ema(decay: float) -> Any:
    """EMA whose decay grows as (1 + n) / (10 + n) up to `decay`, so that short runs forget their first weights."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = float(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def generator_of(t: TrainingConfig, *which: int) -> torch.Generator:
    """The chances of a step (and of one kind of them): they follow from the seed and have no state of their own."""
    seed = np.random.SeedSequence((t.seed, *which)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def step_noise(config: Config, step: int) -> Tensor:
    """The latents' noise of a step, (batch_size, N, d), from (seed, step): the same for any number of processes.

    For `noisy` latents its deviation grows from 0 to 1 over the run: a rate that is limited from the start keeps a
    tokenizer without text from learning to use its latents at all (measured: together with small latent tokens it
    shortens the plateau)."""
    generator, c = generator_of(config.training, step), config.tokenizer
    noise = torch.randn(config.training.batch_size, c.num_latent_tokens, c.latent_dim, generator=generator)
    return noise * (min(1.0, step / config.training.steps) if c.latent == "noisy" else 1.0)
