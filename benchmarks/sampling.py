"""What a generated picture costs by its number of latent tokens: DiT's steps, and the detokenizer's one.

python benchmarks/sampling.py [imagenet256-32] [pictures]

Random weights: a cost asks nothing of them. Rounds go through all N in turn; medians, and the spread of the rounds.
"""

import dataclasses
import statistics
import sys

import torch
from _paired import in_turn

from textok_mini.device import best, tune_cpu
from textok_mini.dit import DiT
from textok_mini.settings import preset
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok

ROUNDS, COUNTS = 5, (4, 8, 16, 32, 64, 128, 256)


@torch.no_grad()
def main(name: str = "laptop", pictures: str = "16") -> None:
    config, count, device, arms = preset(name), int(pictures), best(), {}
    tune_cpu(max(COUNTS))
    for n in COUNTS:
        with device:
            dit = DiT(dataclasses.replace(config.dit, num_latent_tokens=n)).eval()
            tokenizer = TexTok(dataclasses.replace(config.tokenizer, num_latent_tokens=n)).eval()
        x, t = torch.randn(count, n, config.dit.latent_dim, device=device), torch.full((count,), 500, device=device)
        labels = torch.zeros(count, dtype=torch.long, device=device)
        words = torch.randn(count, 20, config.tokenizer.text_dim, device=device)
        text = TextTokens(words, torch.ones(count, 20, dtype=torch.bool, device=device))
        arms[n, "step"] = lambda d=dit, a=(x, t, labels): d(*a)
        arms[n, "decoding"] = lambda d=tokenizer, a=(x, text): d.decode(*a)
    spent = in_turn(arms, ROUNDS, warmup=1)
    spent = {way: [1e3 * s / count for s in took] for way, took in spent.items()}
    print(f"{name}, {count} pictures at once, {device}; ms a picture, median [least, most] of {ROUNDS} rounds")
    print("   N   DiT, a step                 250 steps, guided   detokenizer, once")
    for n in COUNTS:
        step, once = spent[n, "step"], spent[n, "decoding"]
        median = statistics.median(step)
        print(
            f"{n:4}   {median:8.3f} [{min(step):.3f}, {max(step):.3f}]   {500 * median:12.1f}   "
            f"{statistics.median(once):12.3f} [{min(once):.3f}, {max(once):.3f}]"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
