"""What padding costs: a training step with captions of 20 tokens in 128 slots against the same in 20 slots.

python benchmarks/text_padding.py
"""

import dataclasses

import torch
from _paired import paired, show

from textok_mini.device import tune_cpu
from textok_mini.settings import preset
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok

config = dataclasses.replace(preset("laptop").tokenizer, max_text_tokens=128)
tune_cpu(config.num_patches + 128)
model, batch = TexTok(config), 64
images = torch.rand(batch, 3, config.image_size, config.image_size) * 2 - 1
short = TextTokens(torch.randn(batch, 20, config.text_dim), torch.ones(batch, 20, dtype=torch.bool))
padded = short.pad_to(128)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)


def step(text: TextTokens) -> None:
    (model(images, text)[0] - images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


show(("20 tokens in 128 slots", "20 tokens in 20 slots"), paired(lambda: step(padded), lambda: step(short)), batch)
