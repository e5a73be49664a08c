"""A training step of a full-size preset, all of it (T5, tokenizer, LPIPS, discriminator, EMA), on this machine.

python benchmarks/full_size_step.py imagenet256-32 [training.batch_size=2 ...]

T5 has its right shape and random weights, and another's vocabulary: its cost is right, its meaning none. The GAN is on
from the first step, R1 at every second one.
"""

import multiprocessing
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import transformers as hf
from _paired import peak_here, where

from textok_mini import settings, training
from textok_mini.text import encoder_path

SHAPES = {2_048: dict(d_ff=5_120, num_heads=32), 4_096: dict(d_ff=10_240, num_heads=64)}  # T5 v1.1-XL and -XXL
ticks = []  # when each step was logged


def save_t5(width: int, folder: str) -> None:
    common = dict(d_kv=64, num_layers=24, vocab_size=32_128, feed_forward_proj="gated-gelu", dropout_rate=0)
    torch.set_default_dtype(torch.bfloat16)
    hf.T5EncoderModel(hf.T5Config(d_model=width, **SHAPES[width], **common)).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(encoder_path("minilm")).save_pretrained(folder)


class Clocked(training.Run):
    def log(self, line: dict) -> None:
        ticks.append(time.perf_counter())
        super().log(line)


def main(name: str, *overrides: str) -> None:
    training.Run = Clocked
    with tempfile.TemporaryDirectory() as folder:
        t5 = Path(folder, "t5")
        width = settings.load_config(name).tokenizer.text_dim
        maker = multiprocessing.get_context("spawn").Process(target=save_t5, args=(width, str(t5)))  # own memory
        maker.start()
        maker.join()
        small = ["data=openmoji-scenes", "data.scenes=64", f"text.encoder={t5}", "training.steps=4"]
        small += ["training.batch_size=2", "training.log_every=1", "training.sample_every=0", "training.r1_every=2"]
        small += ["training.adversarial_start=0", "training.adversarial_warmup=0", "training.lecam_start=0"]
        config = settings.load_config(name, [*small, *overrides])
        training.train(config, Path(folder, "run"))
    steps = [b - a for a, b in pairwise(ticks)]  # the first warms up
    with_r1, without = steps[0::2], steps[1::2]
    print(f"{name}, {config.training.batch_size} pictures a step, {where()}")
    print(f"  {min(without):.2f} s a step, {min(with_r1):.2f} s with R1; peak {peak_here():.1f} GiB")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["imagenet256-32"]))
