"""What the processor is told before long work: settings of torch and of the allocator, not of the model."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

SHORT = 256  # tokens


def best() -> torch.device:
    """Where to compute: the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """In it a GPU's fp32 matrix products take TF32 (10 bits of mantissa), as in the original DiT's sampler."""
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def tune_cpu(tokens: int, exact: bool = False) -> None:
    """Make fp32 training on a CPU faster, for sequences of about `tokens`; does nothing on an accelerator.

    Measured by `benchmarks/cpu_settings.py` at the laptop's size: a gain with AVX-512, none without. Affects the whole
    process, so commands call it and the library's functions don't.

    1. Matrix products go to oneDNN instead of MKL, which on AMD uses only half of AVX-512. The setting is named
       bf16, but where the processor has no bf16 matrix unit (AMX) oneDNN computes in fp32, exactly as before; where
       it has one, products are rounded to bf16 and summed in fp32. `exact` leaves this out.
    2. Short sequences attend by plain matrix products: the fused kernel is made for long ones.
    3. Freed memory is kept rather than handed back to the kernel and zeroed again at each step (glibc only).
    """
    if torch.accelerator.is_available():
        return
    if not exact:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.cuda.enable_flash_sdp(tokens > SHORT)  # in spite of its name it rules the CPU's kernel too
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 30))  # M_MMAP_THRESHOLD
            libc.mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD
