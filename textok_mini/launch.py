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


def start(overrides: Sequence[str], preset: str, folder: Path, threads: int) -> subprocess.Popen:
    """Start one training into `folder`; what it prints goes to `folder.err`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "textok_mini.train", preset, *overrides, f"output_dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with folder.with_name(f"{folder.name}.err").open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=environment)


def follow(
    commands: Mapping[str, Sequence[str]],
    preset: str,
    folder: str | Path,
    draw: Callable[[dict[str, list[dict]]], object] | None = None,
    together: int | None = None,
    every: float = 5.0,
) -> None:
    """One training a name, `commands[name]` its overrides, into `folder/name`; `draw(logs)` is shown meanwhile.

    `together` run at a time and share the cores: all, but on few cores one after the other, so that no core idles
    beside the longest run (with two slow cores a pair of runs took about as long either way).
    Raises TrainingError with the last line of a run that failed; the others are then ended (they can resume)."""
    cores, folders = os.cpu_count() or 1, {name: Path(folder) / name for name in commands}
    together = together or (len(commands) if cores >= 2 * len(commands) else 1)
    waiting, running, begun = list(commands), {}, time.perf_counter()
    line, picture, drawn = DisplayHandle(), DisplayHandle(), False
    line.display(Markdown("starting ..."))
    try:
        while waiting or running:
            while waiting and len(running) < together:
                name = waiting.pop(0)
                running[name] = start(commands[name], preset, folders[name], max(1, cores // together))
            time.sleep(every)
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


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """A run's log so far, a dict a line; a line that is only half written is left out."""
    path = folder / name
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is unfinished
    return [json.loads(line) for line in lines]
