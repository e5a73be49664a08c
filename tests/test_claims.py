"""The ledger: every figure recomputed here from the images' own, by other means; verdicts at their edges."""

import json
import re
import shutil

import nbformat
import numpy as np
import pytest
import yaml
from scipy import stats

from textok_mini import claims, grid
from textok_mini.claims import CLAIMS, OF, Found, factor, find, lasting, ledger, slope, verdict
from textok_mini.paths import project_root

REFERENCE = project_root() / "reference"
ROWS = [row for claim in CLAIMS.values() for row in claim["rows"]]


def made(values, margin=0.0):
    return Found("a", "-", list(values), "LPIPS", margin, "grid: a, b")


def per_seed(name, arm, key):
    found = {}
    for path in (REFERENCE / name).glob(f"{arm.partition(':')[0]}-seed*/metrics.npz"):
        with np.load(path) as stored:
            found[path.parent.name.rpartition("seed")[2]] = np.mean(stored[key], dtype=float)
    return found


# --- verdicts ---


@pytest.mark.parametrize(
    ("values", "margin", "said"),
    [
        ([1.0, 1.1, 0.9], 0, "holds"),
        ([-1.0, -1.1, -0.9], 0, "does not hold"),
        ([1.0, 1.1, 0.9], 1.0, "inconclusive"),
        ([1.0, -1.1, 0.9], 0, "inconclusive"),
        ([1.9, 1.95, 2.0], 1.7, "holds"),
        ([1.4, 1.45, 1.5], 1.7, "does not hold"),
        ([1.0], 0, "not run yet"),  # one seed tells nothing of seeds
        ([], 0, "not run yet"),
    ],
)
def test_a_verdict_follows_from_interval_and_margin(values, margin, said):
    assert made(values, margin).verdict == said
    if len(values) > 1:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert said == ("holds" if low > margin else "does not hold" if high < margin else "inconclusive")


def test_a_claim_is_as_good_as_its_worst_comparison():
    good, bad, unsure, none = made([1, 1.1, 0.9]), made([-1, -1.1, -0.9]), made([1, -1, 0.5]), made([])
    assert verdict([good, good]) == "holds"
    assert verdict([good, unsure]) == "inconclusive"
    assert verdict([good, none, unsure]) == "not run yet"
    assert verdict([none, unsure, bad, good]) == "does not hold"
    assert verdict([]) == "not run yet"


# --- what is computed from a seed's means ---


def test_the_slope_is_that_of_a_line_through_the_gains():
    gains, twin = np.array([0.40, 0.31, 0.33, 0.20, 0.12]), np.array([0.6, 0.5, 0.45, 0.4, 0.3])
    assert slope(*((1 - gains) * twin), *twin) == pytest.approx(-stats.linregress(range(5), gains).slope)


def test_the_factor_finds_the_twins_tokens():
    twin = [0.5, 0.4, 0.3, 0.2, 0.1]  # of 1, 2, 4, 8, 16 tokens
    assert factor(0.3, *twin) == pytest.approx(4)
    assert factor(0.25, *twin) == pytest.approx(2**2.5)  # halfway over log2 N
    assert factor(0.05, *twin) == pytest.approx(16)  # better than any twin: no more than the last is claimed
    assert factor(0.3, 0.5, 0.4, 0.42, 0.2, 0.1) == pytest.approx(2**2.5)  # where the curve rises it is not read


def test_a_lead_lasts_by_three_quarters():
    assert lasting(0.4, 0.5, 0.3, 0.375) == pytest.approx(0)
    assert lasting(0.4, 0.5, 0.3, 0.40) > 0 > lasting(0.4, 0.5, 0.3, 0.35)


@pytest.mark.parametrize(
    ("short_leads", "long_leads", "said"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.1, 0.9], "holds"),
        ([1.0, 1.0, 1.0], [0.5, 0.6, 0.55], "does not hold"),
        ([1.0, 1.0, 1.0], [0.7, 0.8, 0.75], "inconclusive"),
        ([-0.4, -0.4, -0.4], [-0.25, -0.25, -0.25], "does not hold"),  # of which more than three quarters "remain"
        ([-1.0, 1.0, 3.0], [5.0, 5.0, 5.0], "inconclusive"),  # for the short lead is not shown
    ],
)
def test_a_lead_that_is_not_shown_cannot_last(short_leads, long_leads, said):
    kept = [lasting(0, short, 0, long) for short, long in zip(short_leads, long_leads, strict=True)]
    assert verdict([made(short_leads), made(kept)]) == said


def test_multiply_adds_of_dit_xl_as_published():
    # "DiT's GFLOPs" of XL/2 at 512 px are 524.6 with 1,024 tokens (Peebles & Xie, table 4).
    c = claims.replace(claims.load_config("imagenet512-32").dit, num_latent_tokens=1024)
    with claims.torch.device("meta"):
        x = claims.torch.zeros(1, 1024, 8), claims.torch.zeros(1), claims.torch.zeros(1, dtype=claims.torch.long)
        counted = claims.multiply_adds(claims.DiT(c).eval(), *x)
    assert counted / 1e9 == pytest.approx(524.6, rel=0.002)
    assert claims.steps_saved() == pytest.approx(524.6 / 14.6, rel=0.005)


# --- the kit's own ledger ---


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("of", "less") in ("less", "gain") and "grid" in row])
def test_differences_from_the_images_own_figures(row):
    found, metric = find(row, REFERENCE), row.get("metric", "test/right/lpips")
    sides = []
    for arm in row["arms"]:
        arm, _, other = arm.partition("@")
        drawn, key = arm.partition(":")[2], other or metric
        sides.append(per_seed(row["grid"], arm, f"{drawn}/{key}" if drawn else key))
    ours, theirs = sides
    both = sorted(ours.keys() & theirs.keys(), key=int)
    less = row.get("of", "less") == "less"
    expected = [theirs[s] - ours[s] if less else (theirs[s] - ours[s]) / theirs[s] for s in both]
    np.testing.assert_allclose(found.values, expected)
    if len(both) > 1:
        low, high = stats.t.interval(0.95, len(both) - 1, np.mean(expected), stats.sem(expected))
        assert (found.interval.low, found.interval.high) == pytest.approx((low, high))


def test_every_claim_has_its_line_and_every_arm_exists():
    assert list(CLAIMS) == ["lead", *(f"C{i}" for i in range(1, 13))]
    text = ledger(REFERENCE)
    assert all(re.search(rf"^\| {name} \| .+ \| \*\*.+\*\* \|$", text, re.M) for name in CLAIMS)
    for row in (row for row in ROWS if "grid" in row):
        settings = grid.read_grid(REFERENCE / row["grid"])
        assert {arm.partition("@")[0].partition(":")[0] for arm in row["arms"]} <= set(settings["arms"]), row["what"]
        assert row.get("of", "less") in OF


def test_an_edited_result_changes_the_ledger_and_the_readme_is_caught(tmp_path):
    copy = tmp_path / "reference"
    shutil.copytree(REFERENCE / "headline", copy / "headline")
    before = [find(row, copy) for row in CLAIMS["lead"]["rows"]]
    path = next(copy.glob("headline/textok-seed1/metrics.npz"))
    with np.load(path) as stored:
        edited = {key: values * (0.5 if key == "test/right/lpips" else 1) for key, values in stored.items()}
    np.savez_compressed(path, **edited)
    after = [find(row, copy) for row in CLAIMS["lead"]["rows"]]
    assert before[0].values[1:] == after[0].values[1:] and before[0].values[0] < after[0].values[0]
    readme = (project_root() / "README.md").read_text(encoding="utf-8")
    shown = f"{before[0].interval:+.3f}"
    assert shown in readme
    forged = readme.replace(shown, shown.replace("+0.0", "+0.1", 1))
    assert grid.up_to_date(forged, project_root()) == readme != forged


@pytest.mark.parametrize("name", ["05_ablations", "09_neighbours"])
def test_a_notebook_shows_the_ledger_of_today(name):
    book = nbformat.read(project_root() / "notebooks" / f"{name}.ipynb", as_version=4)
    shown = [o.data.get("text/markdown", "") for cell in book.cells for o in cell.get("outputs", []) if "data" in o]
    lines = [line for text in shown for line in text.splitlines() if re.match(r"\| (lead|C\d+) \|", line)]
    today = ledger(REFERENCE).splitlines()
    assert lines and not [line for line in lines if line not in today]


def test_a_folder_of_ones_own_results(tmp_path, capsys):
    assert claims.main([f"results={tmp_path / 'nowhere'}"]) == 2 and "no such folder" in capsys.readouterr().err
    assert claims.main(["verdict=holds"]) == 2
    arms = ["textok", "twin", "titok", "textok-vq", "words", "grid", "sd-vae"]
    settings = {"preset": "imagenet256-32", "seeds": [1, 2, 3], "arms": {arm: [] for arm in arms}, "comparisons": {}}
    (tmp_path / "neighbours").mkdir()
    (tmp_path / "neighbours" / "grid.yaml").write_text(yaml.safe_dump(settings))
    for seed in settings["seeds"]:
        for i, arm in enumerate(arms):
            (folder := tmp_path / "neighbours" / f"{arm}-seed{seed}").mkdir()
            np.savez(folder / "metrics.npz", **{"test/right/lpips": np.full(4, 0.1 * (i + 1) + 0.001 * seed)})
    assert claims.main([f"results={tmp_path}"]) == 0
    said = dict(re.findall(r"^\| (C\d+) .*\*\*(.+)\*\* \|$", capsys.readouterr().out, re.M))
    assert said["C10"] == "does not hold" and said["C9"] == said["C11"] == "holds" and said["C1"] == "not run yet"


def test_results_say_on_what_and_with_what():
    for path in REFERENCE.glob("neighbours/*/results.json"):
        found = json.loads(path.read_text())
        assert (
            found.keys() == {"seed", "commit", "versions", "device", "data", "metrics"} and len(found["commit"]) == 40
        )
        with np.load(path.with_name("metrics.npz")) as stored:
            assert found["metrics"] == {key: round(float(values.mean()), 5) for key, values in stored.items()}
