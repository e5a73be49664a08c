"""Many runs, one table: arms x seeds, each trained once, with intervals over seeds.

    python -m textok_mini.grid run reference/headline        # trains what is missing; start it twice for two cores
    python -m textok_mini.grid report reference/headline     # prints the table, from the results alone
    python -m textok_mini.grid readme                        # writes the tables into README.md

A grid is a folder with a `grid.yaml`, written and committed before its runs:

    preset: laptop
    common: [data.world_seed=1]
    seeds: [10, 11, 12]
    arms: {textok: [], twin: [tokenizer.text_in=none]}
    comparisons: {equal steps: [textok, twin]}
    wrong: [textok]  # arms that are also told other captions: `conditions`, wrong ones by default
    generators: {class: [generator.steps=2000]}  # DiTs over each run's latents; a comparison names them textok:class
    samples: {each: 50}  # how they draw: settings of `sample`
    pictures: 2000  # of each held-out split that a run is measured on, at most

In an arm's settings `{seed}` is the seed; the `tokenizer.proxy` of one is trained before it. Training happens under
`runs/`; beside the grid.yaml stay the small results, a folder a run: config, logs, `results.json` (on what, with what)
and `metrics.npz` with every image's figures. The unit of an interval is the training seed (Student's t).
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from filelock import FileLock, Timeout

from textok_mini.command import Help, command
from textok_mini.comparison import WRONG, evaluate
from textok_mini.config import Config, ConfigError, table
from textok_mini.data import load_data
from textok_mini.generate import Settings, generate
from textok_mini.intervals import Interval, seeds_interval
from textok_mini.paths import beside, project_root, resolve, write_text
from textok_mini.results import provenance
from textok_mini.run import KEPT, read_log
from textok_mini.settings import load_config
from textok_mini.training import train

GENERATED = {"kernel_efficientnet_lite0": "kernel distance", "class": "shows its class"}


def read_grid(folder: Path) -> dict:
    """The grid.yaml of a folder. Raises ConfigError for a missing file or key, or an arm that does not exist."""
    path = folder / "grid.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    grid = {"common": [], "wrong": [], "conditions": list(WRONG), "generators": {}}
    grid |= {"samples": {"each": 50}, "pictures": 2_000}
    keys = {"preset", "seeds", "arms", "comparisons", *grid}
    grid |= found if isinstance(found, dict) else {}
    if set(grid) != keys:
        raise ConfigError(f"{path}: wants the keys {', '.join(sorted(keys))}, has {', '.join(sorted(grid))}")
    named = {arm for pair in grid["comparisons"].values() for arm in pair} | set(grid["wrong"])
    if unknown := named - set(grid["arms"]) - {f"{arm}:{g}" for arm in grid["arms"] for g in grid["generators"]}:
        raise ConfigError(f"{path}: no arm {', '.join(sorted(unknown))}; there are {', '.join(grid['arms'])}")
    return grid


def cells(grid: dict) -> Iterator[tuple[str, str, list[str]]]:
    """(name, arm, overrides) of every run, seed by seed, so that an unfinished grid has whole seeds."""
    for seed in grid["seeds"]:
        for arm, overrides in grid["arms"].items():
            settings = [override.replace("{seed}", str(seed)) for override in overrides]
            yield f"{arm}-seed{seed}", arm, [*grid["common"], *settings, f"seed={seed}"]


def run(folder: Path) -> None:
    """Train and measure every run that is not in `folder` yet and that no other process is at."""
    grid = read_grid(folder)
    work = project_root() / "runs" / "grids" / folder.name
    configs = {name: load_config(grid["preset"], overrides) for name, _, overrides in cells(grid)}
    for name, arm, overrides in cells(grid):
        kept, config = folder / name, configs[name]
        if (kept / "metrics.npz").exists():
            continue
        (work / name).mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(work / f"{name}.lock", timeout=0):
                if (proxy := config.tokenizer.proxy) and not (resolve(proxy) / "model.safetensors").exists():
                    first = next((other for other in configs if resolve(proxy) == work / other), None)
                    if first is None:
                        raise ConfigError(f"{name}: tokenizer.proxy={proxy} is no finished run, nor one of this grid's")
                    with FileLock(work / f"{first}.lock"):  # whose results may be kept, but not its weights
                        train(configs[first], work / first)
                train(config, work / name)
                told = grid["conditions"] if arm in grid["wrong"] else ()
                metrics = measure(work / name, config, told, grid["pictures"])
                for generator, settings in grid["generators"].items():
                    where = Settings(str(work / name), str(work / name / generator))
                    how = [f"{key}={value}" for key, value in grid["samples"].items()]
                    found = generate(grid["preset"], where, [*overrides, *settings], how)
                    values = found["distances"] | found.get("shown", {}).get("generated", {})
                    metrics |= {f"{generator}/{key}": np.array([value]) for key, value in values.items()}
                keep(work / name, kept, metrics, config)
                print(f"{name}: done", flush=True)
        except Timeout:
            continue  # another process has it


def measure(run_folder: Path, config: Config, conditions: Sequence[str], pictures: int) -> dict[str, np.ndarray]:
    """Every held-out image's metrics: `{"test/right/psnr": (2000,), ...}`, float32."""
    metrics = {}
    for split in ("test", "zero-shot") if config.data.source == "openmoji-scenes" else ("test",):
        rows = load_data(config.data, split, config.tokenizer.image_size).first(pictures)
        told = conditions if split == "test" else ()
        for condition, values in evaluate(run_folder, rows, told, names=("psnr", "lpips")).items():
            metrics |= {f"{split}/{condition}/{name}": v.astype(np.float32) for name, v in values.items()}
    return metrics


def keep(run_folder: Path, kept: Path, metrics: dict[str, np.ndarray], config: Config) -> None:
    """Copy the small results; metrics.npz, whose being there says "done", comes last and by renaming."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run_folder / name, kept / name)
    means = {key: round(float(values.mean()), 5) for key, values in metrics.items()}
    write_text(kept / "results.json", json.dumps(provenance(config) | {"metrics": means}, indent=1) + "\n")
    with beside(kept / "metrics.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **metrics)


def per_seed(folder: Path, grid: dict, arm: str, key: str) -> dict[int, float]:
    """The mean over images of one metric, for every seed whose run is finished; of what a generator of its latents
    draws for `arm:generator`."""
    (arm, _, generator), means = arm.partition(":"), {}
    key = f"{generator}/{key}" if generator else key
    for seed in grid["seeds"]:
        path = folder / f"{arm}-seed{seed}" / "metrics.npz"
        if path.exists():
            with np.load(path) as stored:
                if key in stored:
                    means[seed] = float(stored[key].astype(np.float64).mean())
    return means


def compare(folder: Path, one: str, two: str, key: str) -> tuple[Interval, float, float] | None:
    """Difference of two arms (interval over the seeds that both have) and each arm's mean; None under two seeds."""
    grid = read_grid(folder)
    a, b = (per_seed(folder, grid, arm, key) for arm in (one, two))
    both = sorted(a.keys() & b.keys())
    if len(both) < 2:
        return None
    one, two = (float(np.mean([means[s] for s in both])) for means in (a, b))
    return seeds_interval([a[s] - b[s] for s in both]), one, two


def seconds(folder: Path, grid: dict, arm: str) -> float:
    """Mean seconds of training of an arm's finished runs (of the tokenizer alone)."""
    logs = [read_log(folder / f"{arm.partition(':')[0]}-seed{seed}", "timing.jsonl") for seed in grid["seeds"]]
    return float(np.mean([log[-1]["seconds"] for log in logs if log]))


def report(folder: Path) -> str:
    """The grid's tables in Markdown: comparisons by split and metric, then what wrong captions cost."""
    grid = read_grid(folder)
    titles = ("comparison", "split", "metric", "first", "second", "difference, 95% over seeds", "seconds")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for label, (one, two) in grid["comparisons"].items():
        drawn = [("generated", name, key) for key, name in GENERATED.items()]
        seen = [(s, metric, f"{s}/right/{metric}") for s in ("test", "zero-shot") for metric in ("psnr", "lpips")]
        for split, metric, key in drawn if ":" in one else seen:
            found = compare(folder, one, two, key)
            if found is None:
                continue
            times = f"{seconds(folder, grid, one):.0f} / {seconds(folder, grid, two):.0f}"
            row = [f"{label}: {one} - {two}", split, metric, f"{found[1]:.3f}", f"{found[2]:.3f}"]
            lines.append("| " + " | ".join([*row, f"{found[0]:+.3f}", times]) + " |")
    for arm in grid["wrong"]:
        # A lie about one thing is the exact normal caption but for that: what it costs is counted from there.
        told = conditions(folder, arm)
        base = "normal" if "normal" in told else "right"
        lines += ["", f"| {arm}: told ... minus told the {base} caption | PSNR, dB | LPIPS |", "|---|---|---|"]
        for condition in (c for c in told if c != base):
            cost = []
            for metric in ("psnr", "lpips"):
                right, wrong = (per_seed(folder, grid, arm, f"test/{c}/{metric}") for c in (base, condition))
                cost.append(f"{seeds_interval([wrong[s] - right[s] for s in right]):+.3f}" if len(right) > 1 else "-")
            lines.append("| " + " | ".join([condition, *cost]) + " |")
    if missing := [name for name, *_ in cells(grid) if not (folder / name / "metrics.npz").exists()]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines)


def conditions(folder: Path, arm: str) -> list[str]:
    """What else than its own captions an arm was told."""
    for path in sorted(folder.glob(f"{arm}-seed*/metrics.npz")):
        with np.load(path) as stored:
            told = {key.removeprefix("test/").rpartition("/")[0] for key in stored if key.startswith("test/")}
            return sorted(told - {"right"})
    return []


def up_to_date(text: str, root: Path) -> str:
    """`text` with its tables anew: between `<!-- grid: FOLDER -->` and `<!-- end -->` stands that grid's report, after
    `<!-- config: PRESET -->` that preset's settings and how well they are known, after `<!-- output: FILE -->` what a
    benchmark printed, after `<!-- claims: FOLDER -->` the ledger."""
    from textok_mini.claims import ledger  # which imports this module

    tables = {"grid": lambda name: report(root / name), "config": lambda name: table(load_config(name))}
    tables["claims"] = lambda name: ledger(root / name)
    tables["output"] = lambda name: f"```\n{(root / name).read_text(encoding='utf-8').rstrip()}\n```"
    pattern = re.compile(r"(<!-- (grid|config|output|claims): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{tables[m[2]](m[3])}\n{m[4]}", text)


@command(__doc__)
def main(arguments: list[str]) -> None:
    match arguments:
        case ["run", folder]:
            run(Path(folder))
        case ["report", folder]:
            print(report(Path(folder)))
        case ["readme"]:
            readme = project_root() / "README.md"
            text = up_to_date(readme.read_text(encoding="utf-8"), project_root())
            write_text(readme, text)
        case _:
            raise Help


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
