"""What `cost` counts, against closed forms and what others have published."""

import dataclasses

import pytest
import torch
from torch import nn

from textok_mini import DiT, cost
from textok_mini.settings import load_config


@pytest.mark.parametrize(("tokens", "giga"), [(1_024, 525), (256, 119)])
def test_dit_xl_costs_what_its_paper_says(tokens, giga):
    """DiT-XL/2: 119 "GFLOPs" at 256 px, 525 at 512 px (Peebles & Xie, 2023); first and last layer differ."""
    with torch.device("meta"):
        model = DiT(dataclasses.replace(load_config("imagenet512-32").dit, num_latent_tokens=tokens))
        inputs = torch.randn(1, tokens, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        assert cost.multiply_adds(model, *inputs) / 1e9 == pytest.approx(giga, rel=5e-3)


def test_a_backward_pass_costs_twice_its_forward_pass():
    layer, x = nn.Linear(64, 32), torch.randn(8, 64, requires_grad=True)
    assert cost.multiply_adds(layer, x) == 8 * 64 * 32
    assert cost.multiply_adds(lambda: layer(x).sum().backward()) == 3 * 8 * 64 * 32


def test_attention_is_counted_whatever_kernel_would_compute_it():
    """Two products of S x S x width, and none of the weights' where there are none."""
    q = torch.randn(1, 4, 100, 16)
    assert cost.multiply_adds(nn.functional.scaled_dot_product_attention, q, q, q) == 2 * 100 * 100 * 4 * 16


def test_kept_bytes_are_inputs_of_products_and_no_weights():
    """A product keeps its input, a ReLU its output (which the next product keeps as well)."""
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(8, 64)
    assert cost.kept_bytes(model, lambda: model(x)) == 4 * (8 * 64 + 8 * 32)
