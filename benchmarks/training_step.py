"""A training step of TexTok against the limit: as many bare ViT blocks over as many tokens, and what each part adds.

python benchmarks/training_step.py imagenet256-32 [pictures] [rounds] [folder]

The limit is a stack of timm's blocks that reads and returns all tokens, nothing else. Forward and backward pass, l2
only, fp32; random weights, words and pictures. Then what a whole step has beside these: optimiser, EMA, LPIPS, the
discriminator's step without and with R1. Peaks are of a process that does only that. `folder` is a checkout of
github.com/pranoyr/TexTok, a public attempt: its two halves then run too, in the preset's shape.
"""

import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _paired import in_turn, peak_gib, table, where
from timm.models.vision_transformer import Block
from torch import nn
from torch.optim.swa_utils import AveragedModel

from textok_mini.config import TexTokConfig
from textok_mini.cost import matmul_rate, multiply_adds
from textok_mini.device import best, tune_cpu
from textok_mini.discriminator import Discriminator
from textok_mini.losses import LPIPS, adversarial, discriminator_loss, l2, r1
from textok_mini.schedule import adamw, warmed_up_ema
from textok_mini.settings import load_config
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok

ARMS = ("timm blocks", "TexTok", "TexTok, 20 words in 20 slots", "TexTok, 20 words in all slots", "twin without text")


def arm(name: str, which: str, pictures: int) -> Callable[[], None]:
    """A call that does the forward and the backward pass of one way."""
    config, device = load_config(name), best()
    c = dataclasses.replace(config.tokenizer, text_in="none" if which.startswith("twin") else "both")
    slots, images = c.max_text_tokens, torch.rand(pictures, 3, c.image_size, c.image_size, device=device) * 2 - 1
    tune_cpu(c.num_patches + c.num_latent_tokens + slots)
    if which == "timm blocks":
        with device:
            blocks = [Block(c.width, c.heads, qkv_bias=True) for _ in range(c.encoder_layers + c.decoder_layers)]
        stack = nn.Sequential(*blocks)
        x = torch.randn(pictures, c.num_patches + c.num_latent_tokens + slots, c.width, device=device)
        return lambda: step(stack, lambda: stack(x).square().mean())
    with device:
        model = TexTok(c)
    words = 20 if "20 words" in which else slots
    real = torch.ones(pictures, words, dtype=torch.bool, device=device)
    text = TextTokens(torch.randn(pictures, words, c.text_dim, device=device), real)
    text = text.pad_to(slots) if which.endswith("in all slots") else text
    if which not in ARMS:
        model = public(c, which).to(device)
        return lambda: step(model, lambda: l2(model[1](model[0](images, text.embeddings), text.embeddings), images))
    return lambda: step(model, lambda: l2(model(images, text)[0], images))


def public(c: TexTokConfig, folder: str) -> nn.ModuleList:
    spec = importlib.util.spec_from_file_location("public", Path(folder, "texttok", "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = dict(img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.width, depth=c.encoder_layers)
    shape |= dict(num_heads=c.heads, num_tokens=c.num_latent_tokens, token_dim=c.latent_dim, text_dim=c.text_dim)
    shape |= dict(max_text_len=c.max_text_tokens)
    return nn.ModuleList([module.TexTokTokenizer(**shape), module.TexTokDetokenizer(**shape)])


def step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    model.zero_grad()
    loss().backward()


def rest(name: str, pictures: int) -> dict[str, Callable[[], object]]:
    """What else a step does, each on its own."""
    config, device, ways = load_config(name), best(), {}
    side = config.tokenizer.image_size
    with device:
        model = TexTok(config.tokenizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer, ema = adamw(model, config.training), AveragedModel(model, multi_avg_fn=warmed_up_ema(0.9999))
    ways["optimiser"] = lambda: (nn.utils.clip_grad_norm_(model.parameters(), 1.0), optimizer.step())
    ways["EMA"] = lambda: ema.update_parameters(model)
    images, fakes = torch.rand(2, pictures, 3, side, side, device=device) * 2 - 1
    for trunk in ("vgg", "alex") if side >= 32 else ("vgg",):
        lpips = LPIPS(trunk)
        ways[f"LPIPS, {trunk}"] = lambda d=lpips: d(fakes.clone().requires_grad_(), images).mean().backward()
    if config.discriminator.image_size != side:  # a preset that trains without one
        return ways
    critic = Discriminator(config.discriminator).to(device)
    ways["adversarial loss"] = lambda: adversarial(critic(fakes.clone().requires_grad_())).backward()
    ways["discriminator's step"] = lambda: step(critic, lambda: discriminator_loss(critic(images), critic(fakes)))
    ways["R1"] = lambda: step(critic, lambda: r1(critic, images))
    return ways


def main(name: str = "imagenet256-32", pictures: str = "1", rounds: str = "5", *folder: str) -> None:
    count, rounds, ways = int(pictures), int(rounds), (*ARMS, *folder)
    c = load_config(name).tokenizer
    tokens = c.num_latent_tokens + c.num_patches + c.max_text_tokens
    print(f"{name}: {c.encoder_layers + c.decoder_layers} blocks of width {c.width}, {tokens} tokens, {where()}")
    # First, for a process's peak on Linux is never below that of the one that started it.
    peaks = {which: peak_gib(arm, name, which, count) for which in (*ARMS[:2], *folder)}
    print("peak, GiB: " + ", ".join(f"{which} {peak:.1f}" for which, peak in peaks.items()))
    calls = {which: arm(name, which, count) for which in ways}
    spent = in_turn(calls, rounds, warmup=1)
    table(spent, "timm blocks", count)
    rate = matmul_rate()
    for which in ARMS[:2]:
        done = multiply_adds(calls[which]) / statistics.median(spent[which])
        print(f"{which}: {done / 1e9:.0f} G multiply-adds a second, {done / rate:.0%} of a bare matrix product's")
    print()
    table({which: spent[which] for which in ARMS[2:4]}, ARMS[2], count)
    print()
    table(in_turn({"TexTok": calls["TexTok"]} | rest(name, count), rounds, warmup=1), "TexTok", count)


if __name__ == "__main__":
    main(*sys.argv[1:])
