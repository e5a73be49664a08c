"""Training from a notebook: as processes of their own, whose logs a cell follows.

A kernel that trains itself can neither fork onto several devices nor be interrupted without losing the run; a
process `python -m textok_mini.train ...` can, and the cell that follows it may be run again at any time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from IPython.display import DisplayHandle, Markdown

from textok_mini.training import TrainingError


def start(
    commands: Mapping[str, Sequence[str]], preset: str, folder: str | Path, threads: int | None = None
) -> dict[str, tuple[subprocess.Popen, Path]]:
    """Start one training a name, `commands[name]` its overrides, into `folder/name`. They share the cores."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    threads = threads or max(1, (os.cpu_count() or 1) // len(commands))
    started = {}
    for name, overrides in commands.items():
        command = [
            sys.executable,
            "-m",
            "textok_mini.train",
            preset,
            *overrides,
            f"output_dir={folder / name}",
        ]
        with (folder / f"{name}.err").open("w") as errors:
            process = subprocess.Popen(
                command, stdout=errors, stderr=errors, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
            )
        started[name] = (process, folder / name)
    return started


def follow(
    started: Mapping[str, tuple[subprocess.Popen, Path]],
    draw: Callable[[dict[str, list[dict]]], object] | None = None,
    every: float = 5.0,
) -> None:
    """Wait for all of them, meanwhile showing where they are, and what `draw(logs)` returns, in one place.

    Raises TrainingError with the last line of a run that failed; the others are then ended (they can resume)."""
    line, picture, drawn = DisplayHandle(), DisplayHandle(), False
    line.display(Markdown("starting ..."))
    begun = time.perf_counter()
    try:
        while True:
            running = [process.poll() is None for process, _ in started.values()]
            logs = {name: read_log(folder) for name, (_, folder) in started.items()}
            steps = ", ".join(f"{name} step {log[-1]['step'] if log else 0}" for name, log in logs.items())
            line.update(Markdown(f"{time.perf_counter() - begun:.0f} s: {steps}"))
            if draw and all(logs.values()):
                (picture.update if drawn else picture.display)(draw(logs))
                drawn = True
            for name, (process, folder) in started.items():
                if process.poll():
                    said = folder.with_name(f"{name}.err").read_text(encoding="utf-8").strip().splitlines()
                    raise TrainingError(f"training {name} failed: {said[-1] if said else process.returncode}")
            if not any(running):
                return
            time.sleep(every)
    finally:
        for process, _ in started.values():
            if process.poll() is None:
                process.terminate()
                process.wait()  # until its run's folder is free again


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """A run's log so far, a dict a line; a line that is only half written is left out."""
    path = folder / name
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is unfinished
    return [json.loads(line) for line in lines]
