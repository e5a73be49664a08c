"""The GAN's side of training: a discriminator that learns beside the tokenizer, and what the tokenizer hears of it.

    gan = GAN(config, accelerator)
    loss, part = gan.charge(reconstruction, step)         # added to the tokenizer's loss
    parts = gan.learn(images, reconstruction, step)       # one step of the discriminator, after the tokenizer's

The start of a GAN is where reconstructions are most often ruined: a discriminator with random weights has a gradient
like any other, and a tokenizer that follows it forgets what it knew. So the discriminator learns alone for
`adversarial_warmup` steps before `adversarial_start`, and its weight then grows from 0 over as many.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from textok_mini.config import Config
from textok_mini.discriminator import Discriminator
from textok_mini.losses import LeCAM, adversarial, discriminator_loss, r1


class GAN:
    """Discriminator, its optimiser (MAGVIT's Adam(0, 0.99) whatever the tokenizer's: with momentum the two chase one
    another) and LeCAM's means; all of its state is `state_dict()`. Processes keep equal discriminators by averaging
    gradients, not by DDP, which second derivatives and several passes a step would confuse."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.t, self.accelerator, self.lecam = config.training, accelerator, LeCAM()
        self.r1 = torch.zeros((), device=accelerator.device)  # the last one, for the log
        with torch.random.fork_rng(devices=[]):  # whether there is a GAN changes no weight of the tokenizer
            torch.manual_seed(self.t.seed)
            self.discriminator = Discriminator(config.discriminator).to(accelerator.device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), betas=(0.0, 0.99), fused=True)

    def weight(self, step: int) -> float:
        """The adversarial loss's weight at a step: 0 up to the start, then a ramp."""
        done = (step - self.t.adversarial_start) / max(1, self.t.adversarial_warmup)
        return self.t.adversarial_weight * min(1.0, max(0.0, done))

    def charge(self, reconstruction: Tensor, step: int) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What the tokenizer is charged (0.0 before the start), and the unweighted part for the log."""
        if not (weight := self.weight(step)):
            return 0.0, {}
        self.discriminator.requires_grad_(False)
        part = adversarial(self.discriminator(reconstruction))
        self.discriminator.requires_grad_(True)
        return weight * part, {"adversarial": part.detach()}

    def learn(self, images: Tensor, reconstruction: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """One step of the discriminator, the tokenizer's rate being `rate`; returns its losses by name, unweighted."""
        t, steps = self.t, step - (self.t.adversarial_start - self.t.adversarial_warmup)
        if steps <= 0:
            return {}
        real, fake = self.discriminator(torch.cat([images, reconstruction.detach()])).chunk(2)
        self.lecam.update(*(self.accelerator.reduce(logits.detach().mean(), "mean") for logits in (real, fake)))
        parts = {"discriminator": discriminator_loss(real, fake)}
        total = parts["discriminator"]
        if t.lecam_weight and steps > t.lecam_start:
            parts["lecam"] = self.lecam.loss(real, fake)
            total = total + t.lecam_weight * parts["lecam"]
        if t.r1_weight and steps % t.r1_every == 0:
            penalty = r1(self.discriminator, images)
            self.r1.copy_(self.accelerator.reduce(penalty.detach(), "mean"))
            total = total + t.r1_weight * t.r1_every * penalty  # lazy: as much as at every step, but seldom
        self.optimizer.zero_grad()
        total.backward()
        for p in self.discriminator.parameters():
            p.grad.copy_(self.accelerator.reduce(p.grad, "mean"))
        norm = torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), t.gradient_clip or math.inf)
        if torch.isfinite(norm):  # one bad batch of the discriminator's is left out; the tokenizer's stops the run
            for group in self.optimizer.param_groups:
                group["lr"] = rate * t.discriminator_rate
            self.optimizer.step()
        parts |= {"r1": self.r1, "real_logit": real.mean(), "fake_logit": fake.mean()}
        return {name: part.detach().clone() for name, part in parts.items()}

    def state_dict(self) -> dict:
        modules = {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}
        return modules | {"lecam": self.lecam.state, "r1": self.r1}

    def load_state_dict(self, state: dict) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lecam.state.copy_(state["lecam"])
        self.r1.copy_(state["r1"])
