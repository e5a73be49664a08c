"""Where the time of a preset's training step goes, by torch's profiler: the operations that take most of it.

python benchmarks/profile_step.py laptop [pictures] [lines] ["words in all slots"]

Forward and backward pass, LPIPS on AlexNet, optimiser and EMA, with captions of 15 to 26 tokens (or as many as fit);
as it is, or with one thing done another way (the names are those of choices.py): the profile before and after.
"""

import sys

from _paired import where
from choices import BASE, WORDS, made
from torch.profiler import ProfilerActivity, profile

from textok_mini.device import best, tune_cpu
from textok_mini.settings import load_config


def main(name: str = "laptop", pictures: str = "32", lines: str = "20", way: str = BASE) -> None:
    c, device = load_config(name).tokenizer, best()
    tune_cpu(c.num_patches + c.num_latent_tokens + WORDS)
    step = made(name, int(pictures), way)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        for _ in range(3):
            step()
    own = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, own))
    whole = sum(getattr(row, own) for row in rows)
    print(f"{name}, {pictures} pictures, {where()}, {way}: {whole / 3e3:.1f} ms a step")
    for row in rows[: int(lines)]:
        print(f"  {getattr(row, own) / whole:6.1%}  {row.count // 3:5} times  {row.key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
