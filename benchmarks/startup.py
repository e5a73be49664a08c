"""How long a command takes until it can begin: each one's imports, in a process of its own, beside torch's alone.

python benchmarks/startup.py [rounds]
"""

import subprocess
import sys
from functools import partial

from _paired import in_turn, table

MODULES = ("training", "latents", "sample", "evaluation", "claims")


def load(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def main(rounds: str = "5") -> None:
    arms = {name: partial(load, name) for name in ("torch", *(f"textok_mini.{name}" for name in MODULES))}
    table(in_turn(arms, rounds=int(rounds), warmup=1), "torch", unit="ms a start")


if __name__ == "__main__":
    main(*sys.argv[1:])
