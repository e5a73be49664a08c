"""What each choice in a training step gives: the step as it is, and the same with one thing done the other way.

python benchmarks/choices.py laptop [pictures] [rounds] [compiled bfloat16 ...]

A ratio above 1 is what the choice saves; one below 1 is a choice that would pay and is not taken, for the reason in
brackets. Captions have 15 to 26 tokens. (`cpu_settings.py` has those of the whole process, `loading.py` those of data
and text.)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from _paired import in_turn, table, where
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from textok_mini import vit
from textok_mini.device import SHORT, best, tune_cpu
from textok_mini.losses import LPIPS, Reaching, tokenizer_loss
from textok_mini.schedule import adamw, warmed_up_ema
from textok_mini.settings import load_config
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok

BASE, WORDS = "as it is", 26


def reads_all(self, x: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
    for block in self.blocks:
        x = block(x, mask)
    return self.norm(x)[:, :keep]


def three_products(self, x: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
    pairs = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
    kept = (x[:, :keep], x, x)
    q, k, v = (F.linear(y, w, b) for y, (w, b) in zip(kept, pairs, strict=True))
    q, k, v = (rearrange(y, "b s (h d) -> b h s d", h=self.heads) for y in (q, k, v))
    mask = None if mask is None else rearrange(mask, "b s -> b 1 1 s")
    return self.out(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h q d -> b q (h d)"))


@contextmanager
def other_kernel() -> Iterator[None]:
    now = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(not now)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(now)


def made(name: str, count: int, way: str = BASE) -> Callable[[], None]:
    """A training step that does one thing another way."""
    config, device = load_config(name), best()
    c = config.tokenizer
    torch.manual_seed(0)
    with device:  # to draw the random weights of a full size on a CPU takes longer than all else
        model = TexTok(c)
    perceptual = LPIPS("alex")
    stepped = torch.compile(model, dynamic=True) if way == "compiled" else model
    images = torch.rand(count, 3, c.image_size, c.image_size, device=device) * 2 - 1
    mask = torch.arange(WORDS) < torch.randint(15, WORDS + 1, (count, 1))
    words = torch.randn(count, WORDS, c.text_dim)
    if way == "words in all slots":  # what is not trimmed is attended to as if it were words
        words, mask = F.pad(words, (0, 0, 0, c.max_text_tokens - WORDS)), torch.ones(count, c.max_text_tokens) > 0
    text, optimizer = TextTokens(words, mask).to(device), adamw(model, config.training)
    if way.startswith("optimiser"):
        kind = {"foreach": way.endswith("foreach"), "fused": False}
        optimizer = torch.optim.AdamW(model.parameters(), **kind)
    average = get_ema_multi_avg_fn(0.99) if way == "EMA of torch" else warmed_up_ema(0.99)
    ema = AveragedModel(model, multi_avg_fn=average)
    if way == "LPIPS channels last":
        perceptual.network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=way == "bfloat16"):
            reconstruction = stepped(images, text)[0]
        tokenizer_loss(reconstruction, images, {"l2": 1.0, "lpips": 0.1}, perceptual)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)

    def changed(change: Callable) -> Callable[[], None]:
        def run() -> None:
            with change():
                step()

        return run

    changes = {
        "all outputs of the last blocks": lambda: mock.patch.object(vit.Transformer, "forward", reads_all),
        "three products for q, k, v": lambda: mock.patch.object(vit.Attention, "forward", three_products),
        "the other attention kernel": other_kernel,
        "LPIPS with whole kernels": lambda: mock.patch.object(Reaching, "forward", nn.Conv2d.forward),
    }
    return changed(changes[way]) if way in changes else step


WAYS = {
    "all outputs of the last blocks": "",
    "words in all slots": "",
    "three products for q, k, v": "",
    "the other attention kernel": f"fused above {SHORT} tokens, written out below",
    "optimiser, a loop": "",
    "optimiser, foreach": "",
    "EMA of torch": "",
    "LPIPS channels last": "",
    "LPIPS with whole kernels": "",
    "bfloat16": "only where the processor has it; other results than fp32's",
    "compiled": "after minutes of compiling",
}


def main(name: str = "laptop", pictures: str = "32", rounds: str = "10", *some: str) -> None:
    c = load_config(name).tokenizer
    tune_cpu(c.num_patches + c.num_latent_tokens + WORDS)
    arms = {BASE: made(name, int(pictures))}
    for way in some or WAYS:
        arms[f"{way} ({WAYS[way]})" if WAYS[way] else way] = made(name, int(pictures), way)
    print(f"{name}, {pictures} pictures, {where()}, {torch.get_num_threads()} threads")
    table(in_turn(arms, int(rounds), warmup=2), BASE, int(pictures))


if __name__ == "__main__":
    main(*sys.argv[1:])
