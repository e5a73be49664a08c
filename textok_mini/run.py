"""What one run keeps on disk, and how it goes on from there.

    run = Run(folder, {"model": model, "optimizer": optimizer}, main=True)
    start = run.resume(device)   # 0, or the step of the last checkpoint that can be read
    run.log({"step": 1, "loss": 0.5})
    run.checkpoint(step=1)

A run is a folder: `config.json` (the whole config; `TexTok.from_pretrained` reads it too), `log.jsonl` (losses, no
times, so that two runs can be compared byte by byte), `timing.jsonl`, `samples/`, `snapshots/` (EMA weights on the
way), `checkpoint/` (the last two states), and, written last, `model.safetensors` (EMA weights).

    python -m textok_mini.run keep runs/mine reference/mine   # config, logs, and weights in half precision
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from textok_mini.command import Complaint, Help, command, first_line
from textok_mini.config import Config
from textok_mini.neighbours import tokenizer_of
from textok_mini.paths import beside, resolve
from textok_mini.settings import from_dict, of_training
from textok_mini.tokenizer import TexTok

KEPT = ("config.json", "log.jsonl", "timing.jsonl")


class TrainingError(Complaint):
    """Training cannot start or go on; the message is one line that says what to do."""


class Run:
    """What one run keeps on disk: the log, the timing and the checkpoints."""

    def __init__(self, folder: Path, parts: dict[str, Any], main: bool):
        self.folder, self.parts, self.main = folder, parts, main
        self.log_path, self.timing_path = folder / "log.jsonl", folder / "timing.jsonl"
        self.checkpoints = [folder / "checkpoint" / "last.pt", folder / "checkpoint" / "previous.pt"]
        self.seconds, self.since = 0.0, time.perf_counter()

    def resume(self, device: torch.device) -> int:
        """Restore the last checkpoint that can be read, cut the logs back to it, and return its step (0 if none)."""
        state = {"step": 0, "log_bytes": 0, "timing_bytes": 0, "seconds": 0.0}
        for path in filter(Path.exists, self.checkpoints):
            try:
                state = torch.load(path, map_location=device, weights_only=True)
            except Exception as error:  # a damaged file fails in more ways than one
                print(f"{path}: cannot be read ({first_line(error)}), going back to the one before", file=sys.stderr)
                continue
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            break
        self.seconds, self.since = state["seconds"], time.perf_counter()
        if self.main:
            for path, size in ((self.log_path, "log_bytes"), (self.timing_path, "timing_bytes")):
                path.touch()
                os.truncate(path, state[size])
        return state["step"]

    def checkpoint(self, step: int) -> None:
        """Write the state beside and rename it, so that a kill leaves either the old one or the new one."""
        if not self.main:
            return
        last, previous = self.checkpoints
        append(self.timing_path, {"step": step, "seconds": round(self.elapsed(), 3)})
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "seconds": self.elapsed()}
        state |= {"log_bytes": self.log_path.stat().st_size, "timing_bytes": self.timing_path.stat().st_size}
        with beside(last, alone=True) as part:
            torch.save(state, part)
            if last.exists():
                os.replace(last, previous)

    def log(self, line: dict[str, Any]) -> None:
        if self.main:
            append(self.log_path, line)

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.perf_counter() - self.since


def check_folder(config: Config, folder: Path) -> None:
    """Raises TrainingError if `folder` holds a run of another config, naming the settings that differ."""
    path = folder / "config.json"
    if not path.exists():
        return
    # Through `from_dict`: a setting that is younger than the run had its default there.
    there, ours = of_training(from_dict(Config, json.loads(path.read_text(encoding="utf-8")))), of_training(config)
    pairs = [(group, name, value) for group in ours for name, value in ours[group].items()]
    differ = [f"{group}.{name}" for group, name, value in pairs if there.get(group, {}).get(name) != value]
    if differ:
        todo = "choose another output_dir, or delete this one"
        raise TrainingError(f"{path}: another run's config, it differs in {', '.join(differ)}; {todo}")


def load_run(folder: str | Path, snapshot: int | None = None) -> tuple[TexTok, Config]:
    """A finished run's EMA weights (or those of a snapshot's step) in eval mode, and its config."""
    folder, config = Path(folder), read_config(folder)
    model = tokenizer_of(config.tokenizer)
    name = "model.safetensors" if snapshot is None else f"snapshots/step-{snapshot:07d}.safetensors"
    model.load_state_dict(load_file(folder / name))
    return model.eval(), config


def read_config(folder: str | Path) -> Config:
    """A run's. Raises FileNotFoundError where there is none."""
    path = Path(folder) / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "training" not in values:  # the hub's form has the tokenizer's settings alone, and no text encoder's
        raise FileNotFoundError(f"{folder} holds no run: train one with python -m textok_mini.train")
    return from_dict(Config, values)


def save_weights(model: nn.Module, path: Path) -> None:
    with beside(path) as part:
        save_file(model.state_dict(), part)


def keep(run: Path, target: Path) -> None:
    """Copy what a repository has room for: config, logs, and the weights in half precision. Raises OSError."""
    weights = load_file(run / "model.safetensors")
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run / name, target / name)
    with beside(target / "model.safetensors") as part:
        save_file({name: value.half() for name, value in weights.items()}, part)


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """A run's log so far, a dict a line; a line that is only half written is left out."""
    path = folder / name
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is unfinished
    return [json.loads(line) for line in lines]


@command(__doc__)
def main(arguments: list[str]) -> None:
    if len(arguments) != 3 or arguments[0] != "keep":
        raise Help
    keep(*map(resolve, arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
