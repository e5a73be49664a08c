"""Training from a notebook: as processes of their own, whose logs a cell follows.

A kernel that trains itself can neither fork onto several devices nor be interrupted without losing the run; a
process `python -m textok_mini.train ...` can, and the cell that follows it may be run again at any time.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from IPython.display import DisplayHandle, Markdown

from textok_mini.run import TrainingError, read_log


def start(overrides: Sequence[str], preset: str, folder: Path, threads: int) -> subprocess.Popen:
    """Start one training into `folder`, on all GPUs where there are several; what it prints goes to `folder.err`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    command = [sys.executable, *many, "-m", "textok_mini.train", preset, *overrides, f"output_dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with folder.with_name(f"{folder.name}.err").open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=environment)


def follow(
    commands: Mapping[str, Sequence[str]],
    preset: str,
    folder: str | Path,
    draw: Callable[[dict[str, list[dict]]], object] | None = None,
    every: float = 5.0,
) -> None:
    """One training a name, `commands[name]` its overrides, into `folder/name`; `draw(logs)` is shown meanwhile.

    All run side by side and share the cores, or as many as OMP_NUM_THREADS says.
    Raises TrainingError with the last line of a run that failed; the others are then ended (they can resume)."""
    cores = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    threads, folders = max(1, cores // len(commands)), {n: Path(folder) / n for n in commands}
    running, begun = {}, time.perf_counter()
    line, picture, drawn = DisplayHandle(), DisplayHandle(), False
    line.display(Markdown("starting ..."))
    try:
        for name, overrides in commands.items():
            running[name] = start(overrides, preset, folders[name], threads)
        while running:
            with suppress(subprocess.TimeoutExpired):  # until the next look, or the end of a run
                next(iter(running.values())).wait(every)
            logs = {name: log for name in commands if (log := read_log(folders[name]))}
            steps = ", ".join(f"{name} step {log[-1]['step']}" for name, log in logs.items())
            line.update(Markdown(f"{time.perf_counter() - begun:.0f} s: {steps}"))
            if draw and logs:
                (picture.update if drawn else picture.display)(draw(logs))
                drawn = True
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if code := running.pop(name).returncode:
                    said = folders[name].with_name(f"{name}.err").read_text(encoding="utf-8").strip().splitlines()
                    raise TrainingError(f"training {name} failed: {said[-1] if said else code}")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()  # until its run's folder is free again
