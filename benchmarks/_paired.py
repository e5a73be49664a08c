"""Two ways of doing one thing, timed in turn (A B A B ...), so that a busy machine slows both alike."""

import statistics
import time
from collections.abc import Callable


def paired(a: Callable[[], object], b: Callable[[], object], rounds: int = 15, warmup: int = 2) -> tuple[list, list]:
    """Seconds of each round of `a` and of `b`."""
    seconds = ([], [])
    for i in range(rounds + warmup):
        for f, kept in zip((a, b), seconds, strict=True):
            begun = time.perf_counter()
            f()
            if i >= warmup:
                kept.append(time.perf_counter() - begun)
    return seconds


def show(names: tuple[str, str], seconds: tuple[list, list], images: int) -> None:
    """Images a second of both and the ratio of their times, medians with the spread of the middle half."""
    for name, times in zip(names, seconds, strict=True):
        print(f"{name:<42} {images / statistics.median(times):8.1f} images a second")
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{'time of the first / time of the second':<42} {middle:8.3f}  [{low:.3f}, {high:.3f}]")
