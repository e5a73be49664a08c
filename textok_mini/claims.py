"""The ledger: the paper's twelve claims, its figures, the kit's own, and verdicts computed from them.

    python -m textok_mini.claims [results=FOLDER] [page=runs/claims.html]     # make claims; make claims RESULTS=FOLDER

Trains nothing. It reads grids (`reference/`, or a folder of the same form) whose settings, metrics and expectations
were written before their runs; `claims.yaml` says which arms decide what. The unit is the training seed. A comparison
*holds* where its whole interval lies above the margin, *does not hold* where all of it lies below, else it is
*inconclusive*; a claim holds where all of its comparisons do, and does not where one does not. `page`: the same, drawn.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from textok_mini.command import Help, command
from textok_mini.config import ConfigError
from textok_mini.cost import multiply_adds
from textok_mini.dit import DiT
from textok_mini.grid import per_seed, read_grid
from textok_mini.intervals import Interval, seeds_interval
from textok_mini.paths import project_root, resolve, write_text
from textok_mini.settings import load_config

CLAIMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NAMES = {"lpips": "LPIPS", "psnr": "dB", "kernel_efficientnet_lite0": "kernel distance"}


def gain(ours: float, theirs: float) -> float:
    """The part that is saved, as in the paper's "rFID -37.2%"."""
    return 1 - ours / theirs


def slope(*means: float) -> float:
    """What each doubling from N = 1 takes from the gain: means of the arms with text, then of those without."""
    ours, theirs = np.split(np.array(means), 2)
    return -float(np.polyfit(np.arange(len(ours)), gain(ours, theirs), 1)[0])


def factor(ours: float, *twin: float) -> float:
    """The twin's number of tokens with the same value, read off its curve over N = 1, 2, 4, ...; at most its last N."""
    falling = np.minimum.accumulate(twin)  # a curve can be read backwards only where it falls
    return float(2 ** np.interp(-ours, -falling, np.arange(len(twin))))


def lasting(ours: float, theirs: float, ours_later: float, theirs_later: float) -> float:
    """How far a later lead is above three quarters of the earlier one; where there was none, above none."""
    return (theirs_later - ours_later) - max(0, 0.75 * (theirs - ours))


OF = {  # how a row's arms are compared, and in what: {} is the metric
    "less": (lambda ours, theirs: theirs - ours, "{} less"),
    "gain": (gain, "of {} saved"),
    "more": (lambda a, b, c, d: gain(a, b) - gain(c, d), "of {} saved"),
    "slope": (slope, "of {} a doubling"),
    "factor": (factor, "times"),
    "lasting": (lasting, "{}"),
    "counted": (lambda: steps_saved(), "times"),
}


@dataclass(frozen=True)
class Found:
    """One comparison: a value for each seed, and what follows."""

    what: str
    paper: str
    values: list[float]
    unit: str
    margin: float
    runs: str

    @property
    def interval(self) -> Interval | None:
        if len(self.values) == 1 and not self.runs:  # counted, not measured
            return Interval(*self.values * 3)
        return seeds_interval(self.values) if len(self.values) > 1 else None

    @property
    def verdict(self) -> str:
        if (found := self.interval) is None:
            return "not run yet"
        return "holds" if found.low > self.margin else "does not hold" if found.high < self.margin else "inconclusive"

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table says of it: comparison, the paper, here, verdict, runs."""
        ours = f"{self.interval:+.3f} {self.unit}" if self.interval else "-"
        runs = f"{self.runs} ({len(self.values)} seeds)" if self.runs else "none: follows from the shape"
        return self.what, self.paper, ours, self.verdict, runs


def find(row: Mapping[str, Any], folder: Path) -> Found:
    """Computes a row of claims.yaml from the runs that are finished."""
    of, unit = OF[row.get("of", "less")]
    metric, arms, name = row.get("metric", "test/right/lpips"), row.get("arms", []), row.get("grid", "")
    unit = unit.format(NAMES[metric.rpartition("/")[2]])
    runs = f"{name}: {', '.join(arms)}" if name else ""
    found = Found(row["what"], row["paper"], [], unit, row.get("margin", 0), runs)
    if not name:
        return replace(found, values=[of()])
    if not (folder / name / "grid.yaml").is_file():
        return found
    grid, means = read_grid(folder / name), []
    for arm, _, other in (arm.partition("@") for arm in arms):
        means.append(per_seed(folder / name, grid, arm, other or metric))
    # "both-2": the factor is over the number of tokens in the arm's name.
    over = float(arms[0].rpartition("-")[2]) if of is factor else 1.0
    seeds = [seed for seed in grid["seeds"] if all(seed in mean for mean in means)]
    return replace(found, values=[of(*(mean[seed] for mean in means)) / over for seed in seeds])


def find_all(folder: Path) -> dict[str, list[Found]]:
    """Every claim's comparisons, by its name."""
    return {name: [find(row, folder) for row in claim["rows"]] for name, claim in CLAIMS.items()}


def verdict(found: Sequence[Found]) -> str:
    """Of a whole claim."""
    said = {one.verdict for one in found}
    worst = next((v for v in ("does not hold", "not run yet", "inconclusive") if v in said), "holds")
    return worst if found else "not run yet"


def steps_saved() -> float:
    """Multiply-adds of a step of DiT-XL with 1,024 tokens over those with 32: they follow from the shape alone."""
    counts = []
    for tokens in (1024, 32):
        c = replace(load_config("imagenet512-32").dit, num_latent_tokens=tokens)
        with torch.device("meta"):
            x = torch.zeros(1, tokens, c.latent_dim), torch.zeros(1), torch.zeros(1, dtype=torch.long)
            counts.append(multiply_adds(DiT(c).eval(), *x))
    return counts[0] / counts[1]


def ledger(folder: Path) -> str:
    """Markdown: a line for each claim, then one for each of its comparisons, and what decides."""
    claims, lines = find_all(folder), ["| | claim | decided by | verdict |", "|---|---|---|---|"]
    for name, found in claims.items():
        lines.append(f"| {name} | {CLAIMS[name]['says']} | {CLAIMS[name]['rule']} | **{verdict(found)}** |")
    rows = [(name, *one.cells) for name, found in claims.items() for one in found]
    lines += ["", "| | comparison | the paper | here, 95% over seeds | | runs |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"- {name}: {claim['note']}" for name, claim in CLAIMS.items() if "note" in claim]
    return "\n".join([*lines, "", *notes])


@command(__doc__, least=0)
def main(arguments: list[str]) -> None:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if given.keys() - {"results", "page"} or not all(given.values()):
        raise Help
    folder = resolve(given.get("results", project_root() / "reference"))
    if not folder.is_dir():
        raise ConfigError(f"results={folder}: there is no such folder")
    print(ledger(folder))
    if "page" in given:
        from textok_mini.report import page  # which imports this module

        write_text(Path(given["page"]), page(folder))
        print(f"the same, drawn: {given['page']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
