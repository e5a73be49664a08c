"""Several ways of doing one thing, timed in turn (A B C A B C ...), so that a busy machine slows all alike."""

import multiprocessing
import resource
import statistics
from collections.abc import Callable, Mapping

import torch

from textok_mini.cost import seconds
from textok_mini.device import best

GIB = 1 << 30


def in_turn(arms: Mapping[str, Callable], rounds: int = 15, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each round of each arm."""
    spent = {name: [] for name in arms}
    for i in range(rounds + warmup):
        for name, call in arms.items():
            took = seconds(call)
            if i >= warmup:
                spent[name].append(took)
    return spent


def table(spent: Mapping[str, list[float]], base: str, pictures: int = 1, unit: str = "ms a picture") -> None:
    """Each arm's median, and its ratio to `base`, round by round: the median with the least and the most."""
    print(f"{'':44} {unit:>12}   times {base!r} [least, most] of {len(spent[base])} rounds")
    for name, times in spent.items():
        ratios = [a / b for a, b in zip(times, spent[base], strict=True)]
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:44} {1e3 * statistics.median(times) / pictures:12.2f}   {spread if name != base else '1'}")


def peak_gib(make: Callable[..., Callable], *arguments) -> float:
    """Peak memory of a process that makes a call and does it twice."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_twice, args=(queue, make, *arguments))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def _twice(queue, make: Callable, *arguments) -> None:
    call = make(*arguments)
    call(), call()
    queue.put(peak_here())


def where() -> str:
    """The GPU's name, or what else computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else str(best())


def peak_here() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
