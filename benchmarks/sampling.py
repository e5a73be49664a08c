"""What a generated picture costs by its number of latent tokens: DiT's steps, and the detokenizer's one.

python benchmarks/sampling.py [imagenet512-32] [pictures] [most tokens]

Random weights: a cost asks nothing of them. Rounds go through all N in turn; medians, and the spread of the rounds.
On a GPU each N is also timed in fewer bits, and with attention written out as in the original DiT's code of its time.
"""

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from _paired import in_turn, where
from torch.nn.attention import SDPBackend, sdpa_kernel

from textok_mini.cost import multiply_adds
from textok_mini.device import best, tf32, tune_cpu
from textok_mini.dit import DiT
from textok_mini.settings import load_config
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok

ROUNDS, COUNTS = 5, (4, 8, 16, 32, 64, 128, 256, 1024)


@contextlib.contextmanager
def bf16(written_out: bool = False) -> Iterator[None]:
    attention = sdpa_kernel(SDPBackend.MATH) if written_out else contextlib.nullcontext()
    with torch.autocast("cuda", torch.bfloat16), attention:
        yield


def within(way: Callable, call: Callable, *arguments: object) -> Callable[[], None]:
    def run() -> None:
        with way():
            call(*arguments)

    return run


@torch.no_grad()
def main(name: str = "laptop", pictures: str = "16", most: str = "256") -> None:
    config, count, device, arms, done = load_config(name), int(pictures), best(), {}, {}
    tune_cpu(256)
    ways = {"fp32": contextlib.nullcontext}
    if device.type == "cuda":
        ways |= {"TF32": tf32, "bf16": bf16, "bf16, attention written out": lambda: bf16(written_out=True)}
    base = config.dit.num_latent_tokens
    counts = sorted({base} | {n for n in COUNTS if n <= int(most)})
    for n in counts:
        with device:
            dit = DiT(dataclasses.replace(config.dit, num_latent_tokens=n)).eval()
            tokenizer = TexTok(dataclasses.replace(config.tokenizer, num_latent_tokens=n)).eval()
            x, t = torch.randn(count, n, config.dit.latent_dim), torch.full((count,), 500)
            labels = torch.zeros(count, dtype=torch.long)
            words = torch.randn(count, 20, config.tokenizer.text_dim)
            text = TextTokens(words, torch.ones(count, 20, dtype=torch.bool))
        done[n] = multiply_adds(dit, x[:1], t[:1], labels[:1])
        for way, change in ways.items():
            arms[n, way, "step"] = within(change, dit, x, t, labels)
            arms[n, way, "decoding"] = within(change, tokenizer.decode, x, text)
    spent = in_turn(arms, ROUNDS, warmup=1)
    spent = {arm: [1e3 * s / count for s in took] for arm, took in spent.items()}
    print(f"{name}, {count} pictures at once, {where()}; ms a picture, median [least, most] of {ROUNDS} rounds")
    for way in ways:
        print(f"{way}\n   N   DiT, a step                 250 steps, guided   detokenizer, once", end="")
        print(f"         a step, times N = {base}: measured, counted")
        for n in counts:
            step, once = spent[n, way, "step"], spent[n, way, "decoding"]
            median = statistics.median(step)
            print(
                f"{n:4}   {median:8.3f} [{min(step):.3f}, {max(step):.3f}]   {500 * median:12.1f}   "
                f"{statistics.median(once):12.3f} [{min(once):.3f}, {max(once):.3f}]   "
                f"{median / statistics.median(spent[base, way, 'step']):8.2f}, {done[n] / done[base]:.2f}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
