"""Where the time of a preset's training step goes, by torch's profiler: the operations that take most of it.

python benchmarks/profile_step.py laptop [pictures] [lines]

Forward and backward pass, LPIPS on AlexNet, optimiser and EMA, with captions of 15 to 26 tokens (or as many as fit).
"""

import sys

import torch
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile

from textok_mini.device import best, tune_cpu
from textok_mini.losses import LPIPS, tokenizer_loss
from textok_mini.schedule import adamw, warmed_up_ema
from textok_mini.settings import preset
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok


def main(name: str = "laptop", pictures: str = "32", lines: str = "20") -> None:
    config, count, device = preset(name), int(pictures), best()
    c = config.tokenizer
    tune_cpu(c.num_patches + c.num_latent_tokens + 26)
    model, perceptual = TexTok(c).to(device), LPIPS("alex")
    optimizer, ema = adamw(model, config.training), AveragedModel(model, multi_avg_fn=warmed_up_ema(0.99))
    images = torch.rand(count, 3, c.image_size, c.image_size, device=device) * 2 - 1
    mask = (torch.arange(26) < torch.randint(15, 27, (count, 1))).to(device)
    text = TextTokens(torch.randn(count, 26, c.text_dim, device=device), mask)

    def step() -> None:
        tokenizer_loss(model(images, text)[0], images, {"l2": 1.0, "lpips": 0.1}, perceptual)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        for _ in range(3):
            step()
    own = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, own))
    whole = sum(getattr(row, own) for row in rows)
    print(f"{name}, {count} pictures, {device}: {whole / 3e3:.1f} ms a step")
    for row in rows[: int(lines)]:
        print(f"  {getattr(row, own) / whole:6.1%}  {row.count // 3:5} times  {row.key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
