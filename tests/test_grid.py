"""Grids: nothing is trained twice, and every figure of a report is recomputed here from the images' own."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from textok_mini import data, grid
from textok_mini.config import Config, ConfigError
from textok_mini.paths import project_root, weights_dir
from textok_mini.settings import from_dict, load_config, of_training

GRID = {
    "preset": "smoke",
    "common": ["data.scenes=32", "training.steps=4", "training.sample_every=0"],
    "seeds": [1, 2],
    "arms": {
        "textok": [],
        "twin": ["tokenizer.text_in=none"],
        "twin-8": ["tokenizer.text_in=none", "training.steps=8"],
    },
    "comparisons": {"equal steps": ["textok", "twin"], "more": ["textok", "twin-8"]},
    "wrong": ["textok"],
}


KIT = project_root()  # asked now: a fixture below puts another folder in its place
GRIDS = sorted((KIT / "reference").glob("*/grid.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home, weights = tmp_path_factory.mktemp("home"), weights_dir()
    (home / "data").mkdir()
    (home / "data" / "weights").symlink_to(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTOK_MINI_HOME", str(home))
        patch.setattr(data, "HELD_OUT_SCENES", 12)
        (home / "small").mkdir()
        (home / "small" / "grid.yaml").write_text(yaml.safe_dump(GRID))
        grid.run(home / "small")
        yield home / "small"


def mean(folder, arm, seed, key):
    with np.load(folder / f"{arm}-seed{seed}" / "metrics.npz") as stored:
        return stored[key].astype(float).mean()


def test_a_finished_grid_trains_nothing(folder, monkeypatch):
    monkeypatch.setattr(grid, "train", lambda *_: pytest.fail("trained again"))
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    grid.run(folder)
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert {path.name for path in (folder / "twin-seed1").iterdir()} == {*grid.KEPT, "results.json", "metrics.npz"}


def test_report_is_what_the_images_say(folder):
    lines = grid.report(folder).splitlines()
    [row] = [line for line in lines if line.startswith("| equal steps") and "| zero-shot | lpips |" in line]
    differences = [
        mean(folder, "textok", s, "zero-shot/right/lpips") - mean(folder, "twin", s, "zero-shot/right/lpips")
        for s in (1, 2)
    ]
    low, high = stats.t.interval(0.95, 1, np.mean(differences), stats.sem(differences))
    assert f"{np.mean(differences):+.3f} [{low:+.3f}, {high:+.3f}]" in row
    [row] = [line for line in lines if line.startswith("| wrong place, both")]
    costs = [mean(folder, "textok", s, f"test/{c}/psnr") for s in (1, 2) for c in ("wrong place, both", "right")]
    assert f"{np.mean([costs[0] - costs[1], costs[2] - costs[3]]):+.3f}" in row


def test_readme_tables_change_only_between_their_marks(folder):
    text = "before\n<!-- grid: small -->\nold\n<!-- end -->\nafter\n<!-- config: smoke -->\n<!-- end -->\n"
    once = grid.up_to_date(text, folder.parent)
    assert once.startswith(f"before\n<!-- grid: small -->\n{grid.report(folder)}\n<!-- end -->\nafter\n")
    assert "| tokenizer.latent_dim | 8 | paper |" in once
    assert grid.up_to_date(once, folder.parent) == once


def test_the_kits_own_readme_is_up_to_date():
    """No figure in the README is typed: each table is its grid's report, to the letter."""
    text = (KIT / "README.md").read_text(encoding="utf-8")
    others = sum(text.count(f"<!-- {kind}: ") for kind in ("config", "output", "claims"))
    assert text.count("<!-- grid: ") == text.count("<!-- end -->") - others == len(GRIDS)
    assert grid.up_to_date(text, KIT) == text


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.parent.name)
def test_every_kept_run_is_one_that_its_grid_asks_for(path):
    """No result of other settings can hide in a table, and none that was asked for is left out unseen."""
    asked = grid.read_grid(path.parent)
    wanted = {name: load_config(asked["preset"], overrides) for name, _, overrides in grid.cells(asked)}
    kept = {folder.name for folder in path.parent.iterdir() if (folder / "metrics.npz").is_file()}
    for name in kept:
        there = json.loads((path.parent / name / "config.json").read_text(encoding="utf-8"))
        assert of_training(from_dict(Config, there)) == of_training(wanted[name]), name
    said = grid.report(path.parent).partition("Not run yet: ")[2]
    assert {name for name in said.rstrip(".").split(", ") if name} == wanted.keys() - kept


def test_an_arm_waits_for_its_proxy_and_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTOK_MINI_HOME", str(tmp_path))
    order = []

    def trained(config, folder):
        if (folder / "model.safetensors").exists():  # as `train`: finished, nothing to do
            return
        order.append(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(grid, "train", trained)
    monkeypatch.setattr(grid, "measure", lambda *_: {"test/right/lpips": np.zeros(2)})
    monkeypatch.setattr(grid, "keep", lambda run, kept, metrics, config: kept.mkdir())
    vq = ["tokenizer.text_in=none", "tokenizer.latent=vq", "tokenizer.num_latent_tokens=16"]
    arms = {"two": [*vq, "tokenizer.proxy=runs/grids/pair/one-seed{seed}"], "one": [*vq, "tokenizer.layout=grid"]}
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "grid.yaml").write_text(yaml.safe_dump(GRID | {"arms": arms, "comparisons": {}, "wrong": []}))
    grid.run(tmp_path / "pair")
    assert all(order.index(f"one-seed{seed}") < order.index(f"two-seed{seed}") for seed in (1, 2))
    assert sorted(order) == ["one-seed1", "one-seed2", "two-seed1", "two-seed2"]
    arms["two"][-1] = "tokenizer.proxy=runs/nowhere"
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "grid.yaml").write_text(yaml.safe_dump(GRID | {"arms": arms, "comparisons": {}, "wrong": []}))
    with pytest.raises(ConfigError, match=r"two-seed1: tokenizer\.proxy=runs/nowhere is no finished run"):
        grid.run(tmp_path / "none")


def test_bad_grids_are_one_clear_line(tmp_path):
    for changes, message in (
        ({"sedes": [1]}, "wants the keys"),
        ({"wrong": ["tetxok"]}, "no arm tetxok"),
        ({"comparisons": {"a": ["textok", "none"]}}, "no arm none"),
    ):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID | changes))
        with pytest.raises(ConfigError, match=message):
            grid.read_grid(tmp_path)
    with pytest.raises(ConfigError):
        grid.read_grid(tmp_path / "none")


def test_generators_are_compared_by_what_they_draw(folder, monkeypatch):
    """`arm:generator` stands for that generator's own results, by seed, over the arm's own tokenizer."""
    asked = []

    def drawn(preset, c, settings, samples):
        asked.append((*Path(c.output_dir).parts[-2:], settings[-2:], samples))
        value = len(asked) + (10 if "twin" in c.tokenizer else 0)
        return {"distances": {"kernel_efficientnet_lite0": value}, "shown": {"generated": {"class": value / 100}}}

    monkeypatch.setattr(grid, "generate", drawn)
    there = folder.parent / "generated"
    there.mkdir()
    two = {arm: GRID["arms"][arm] for arm in ("textok", "twin")}
    small = GRID | {"arms": two, "wrong": [], "comparisons": {"drawn": ["textok:class", "twin:class"]}}
    small |= {"generators": {"class": ["generator.steps=3"]}, "samples": {"each": 2}}
    (there / "grid.yaml").write_text(yaml.safe_dump(small))
    grid.run(there)
    assert asked[0] == ("textok-seed1", "class", ["seed=1", "generator.steps=3"], ["each=2"]) and len(asked) == 4
    found, one, two = grid.compare(there, "textok:class", "twin:class", "kernel_efficientnet_lite0")
    assert (one, two, found.mean) == (2.0, 13.0, -11.0)  # of 1 and 3, and of 12 and 14
    assert "| drawn: textok:class - twin:class | generated | shows its class | 0.020 | 0.130 | -0.110" in grid.report(
        there
    )
    (there / "grid.yaml").write_text(yaml.safe_dump(small | {"comparisons": {"drawn": ["textok:text", "twin:class"]}}))
    with pytest.raises(ConfigError, match="no arm textok:text"):
        grid.report(there)
