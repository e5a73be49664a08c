"""From noise to latents: the original DiT's diffusion, and flow matching, by the same two functions.

    process = Diffusion()                            # or Flow()
    loss, parts = process.loss(predict, x, t, noise) # predict(x_t, t): the model with its labels filled in
    latents = process.sample(predict, noise, draw)   # draw(step): fresh noise of noise's shape

Latents x are of unit variance. All noise is passed in, so that nothing here is random: who calls decides by seed,
picture and step, and a picture is the same in any batch and on any number of processes (`noise_of`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


class Diffusion:
    """Ho et al. (2020) with the learned variance of Nichol & Dhariwal (2021), as facebookresearch/DiT has it: 1,000
    linear steps, the model predicts the noise and how far the log variance lies between its two bounds. (At the very
    first step the original scores latents as pixels of 8 bits; here that step is a Gaussian as the rest.)"""

    few = 250  # steps of a sample

    def __init__(self, steps: int = 1_000, first: float = 1e-4, last: float = 0.02):
        self.steps = steps
        self.kept = np.cumprod(1 - np.linspace(first, last, steps))  # alpha-bar: the share of x in x_t's power

    def times(self, lots: Tensor) -> Tensor:
        """Whole times (B,) in [0, steps) from uniform lots in [0, 1)."""
        return (lots * self.steps).long()

    def noisy(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        kept = self.of(self.kept, t, x)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise  # x_t = sqrt(a) x + sqrt(1 - a) noise

    def loss(self, predict: Predict, x: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the noise, and the variational bound in bits, which teaches the variance only."""
        x_t = self.noisy(x, t, noise)
        guess, between = predict(x_t, t).float().chunk(2, dim=-1)
        error = (guess - noise).square().mean()
        steps = Steps(self, range(self.steps))
        real_mean, real_log = steps.posterior(x, x_t, t)
        mean = steps.posterior(steps.origin(x_t, guess.detach(), t), x_t, t)[0]
        log = steps.log_variance(between, t)
        nats = 0.5 * (log - real_log - 1 + (real_log - log).exp() + (real_mean - mean).square() * (-log).exp())
        bound = nats.mean() / math.log(2)
        return error + bound, {"noise_error": error.detach(), "bound": bound.detach()}

    @torch.no_grad()
    def sample(self, predict: Predict, noise: Tensor, draw: Callable[[int], Tensor], steps: int = 250) -> Tensor:
        """From noise (B, N, d) down `steps` of the times, evenly spaced; `draw(step)` is a step's fresh noise."""
        times = [round(i * (self.steps - 1) / max(1, steps - 1)) for i in range(steps)]
        few, x = Steps(self, times), noise
        for step in reversed(range(steps)):
            index = torch.full((len(x),), step, device=x.device)
            guess, between = predict(x, torch.full_like(index, times[step])).float().chunk(2, dim=-1)
            mean, _ = few.posterior(few.origin(x, guess, index), x, index)
            x = mean + (0.5 * few.log_variance(between, index)).exp() * draw(step) if step else mean
        return x

    @staticmethod
    def of(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        """A table's values at times (B,), to multiply (B, N, d)."""
        return torch.from_numpy(table).to(like.device)[t].to(torch.float32)[:, None, None]


class Steps:
    """Some of a diffusion's times as a diffusion of their own, whose betas follow from the same alpha-bars."""

    def __init__(self, process: Diffusion, times: Sequence[int]):
        self.kept = process.kept[list(times)]
        before = np.append(1.0, self.kept[:-1])
        self.betas = 1 - self.kept / before
        self.low = self.betas * (1 - before) / (1 - self.kept)  # the posterior's variance, 0 at the first step
        self.low[0] = self.low[1] if len(self.low) > 1 else self.betas[0]
        self.of_x = self.betas * np.sqrt(before) / (1 - self.kept)
        self.of_x_t = (1 - before) * np.sqrt(1 - self.betas) / (1 - self.kept)

    def origin(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The x that x_t comes from if this was its noise."""
        kept = Diffusion.of(self.kept, t, x_t)
        return x_t / kept.sqrt() - (1 / kept - 1).sqrt() * noise

    def posterior(self, x: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the step before x_t, x being known."""
        mean = Diffusion.of(self.of_x, t, x) * x + Diffusion.of(self.of_x_t, t, x) * x_t
        return mean, Diffusion.of(np.log(self.low), t, x)

    def log_variance(self, between: Tensor, t: Tensor) -> Tensor:
        """From -1, the posterior's, to 1, beta's."""
        low, high = (Diffusion.of(np.log(table), t, between) for table in (self.low, self.betas))
        share = (between + 1) / 2
        return share * high + (1 - share) * low


class Flow:
    """Flow matching on straight lines (Lipman et al., 2023; Liu et al., 2023): x_t = (1 - t) x + t noise, and the model
    predicts the velocity noise - x. Times are told to the model times 1,000, as it knows them from the diffusion."""

    few = 50  # steps of a sample

    def times(self, lots: Tensor) -> Tensor:
        return lots

    def noisy(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = t[:, None, None]
        return (1 - t) * x + t * noise

    def loss(self, predict: Predict, x: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        guess = predict(self.noisy(x, t, noise), 1_000 * t).float()[..., : x.shape[-1]]
        error = (guess - (noise - x)).square().mean()
        return error, {"velocity_error": error.detach()}

    @torch.no_grad()
    def sample(self, predict: Predict, noise: Tensor, draw: Callable | None = None, steps: int = 50) -> Tensor:
        """Euler's steps from t = 1 to 0; nothing is drawn on the way."""
        x = noise
        for step in reversed(range(steps)):
            t = torch.full((len(x),), (step + 1) / steps, device=x.device)
            x = x - predict(x, 1_000 * t).float()[..., : x.shape[-1]] / steps
        return x


def guided(
    model: Callable, condition: Any, nothing: Any, scale: float, interval: tuple[float, float] = (0, 1_000)
) -> Predict:
    """Classifier-free guidance (Ho & Salimans, 2022): away from what the model says told `nothing`, over all of the
    noise's channels (the original DiT's code guides three), at the times of `interval` (Kynkäänniemi et al., 2024). The
    variance is the condition's own."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        known = model(x, t, condition)
        if scale == 1 or not interval[0] <= float(t[0]) <= interval[1]:
            return known
        plain = model(x, t, nothing)
        d = x.shape[-1]
        return torch.cat([plain[..., :d] + scale * (known[..., :d] - plain[..., :d]), known[..., d:]], dim=-1)

    return predict


def noise_of(seed: int, pictures: Sequence[int], step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal (B, *shape): each picture's follows from seed, its number and the step, and from no batch."""
    drawn = []
    for picture in pictures:
        key = np.random.SeedSequence((seed, picture, step)).generate_state(1, np.uint64)[0]
        drawn.append(torch.randn(shape, generator=torch.Generator().manual_seed(int(key >> 1))))
    return torch.stack(drawn)
