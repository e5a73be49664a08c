"""A training step of the full-size generator (DiT-XL over a preset's latent tokens) on this machine.

python benchmarks/full_size_dit.py imagenet256-32 [pictures]

Latents are random; loss, backward pass, AdamW and EMA are those of training.
"""

import sys
import time
from itertools import pairwise

import torch
from _paired import peak_here, where
from torch.optim.swa_utils import AveragedModel

from textok_mini.device import best
from textok_mini.diffusion import Diffusion
from textok_mini.dit import DiT
from textok_mini.schedule import adamw, warmed_up_ema
from textok_mini.settings import load_config


def main(name: str = "imagenet256-32", pictures: str = "8") -> None:
    config, count, device = load_config(name), int(pictures), best()
    with device:
        model = DiT(config.dit)
    process, ticks = Diffusion(), [time.perf_counter()]
    ema, optimizer = AveragedModel(model, multi_avg_fn=warmed_up_ema(0.9999)), adamw(model, config.generator)
    shape = (count, config.dit.num_latent_tokens, config.dit.latent_dim)
    for _ in range(4):
        x, noise, labels = torch.randn(shape, device=device), torch.randn(shape, device=device), torch.arange(count)
        labels = labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = process.loss(
                lambda x, t, y=labels: model(x, t, y), x, process.times(torch.rand(count)).to(device), noise
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        loss.item()
        ticks.append(time.perf_counter())
    steps = [b - a for a, b in pairwise(ticks[1:])]  # the first warms up
    count_m = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{name}: DiT of {count_m:.1f}M parameters, {count} pictures of {shape[1]} tokens, {where()}")
    print(f"  {min(steps):.2f} s a step; peak {peak_here():.1f} GiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
