"""What a computation costs: operations, seconds, and memory for its backward pass.

    with torch.device("meta"):                   # counting needs no numbers, and no memory
        model = DiT(config)
        multiply_adds(model, x, t, labels)
    seconds(model, x, t, labels)                 # on the device that it is on
    peak = matmul_rate(2_048)                    # what this machine's matrix products reach, measured on the spot

A multiply-add is one operation here, as in the tables of the DiT paper ("GFLOPs" there); torch's counter says two.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from textok_mini.device import best


def multiply_adds(compute: Callable, *inputs: Any, **named: Any) -> int:
    """Of all matrix products, convolutions and attentions in `compute(...)`, its backward pass included if it has one.

    Attention is computed by plain products meanwhile: of fused kernels torch counts only some."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        compute(*inputs, **named)
    return counter.get_total_flops() // 2


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for its backward pass beside the weights, each storage counted once."""
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held, or a later one could take the place, and the key, of one gone
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in kept.values())


def seconds(compute: Callable, *inputs: Any) -> float:
    """Of one call, until an accelerator has done what it was asked."""
    waits = torch.accelerator.is_available()
    if waits:
        torch.accelerator.synchronize()
    begun = time.perf_counter()
    compute(*inputs)
    if waits:
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def matmul_rate(side: int = 2_048, rounds: int = 5) -> float:
    """Multiply-adds a second of a square fp32 matrix product, the best of some rounds."""
    a, b = torch.randn(2, side, side, device=best())
    seconds(lambda: a @ b)
    return side**3 / min(seconds(lambda: a @ b) for _ in range(rounds))
