"""Notebooks as people and CI meet them: what is committed, and a papermill `smoke` copy of each under nbval."""

import ast
import inspect
import json
import math
import re
import subprocess
import sys

import nbformat
import numpy as np
import papermill
import pytest
import yaml

from textok_mini import notebooks
from textok_mini.comparison import evaluate
from textok_mini.config import ConfigError
from textok_mini.data import load_data
from textok_mini.paths import project_root
from textok_mini.settings import load_config, to_dict

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS


def defined_in_library() -> set[str]:
    names = set()
    for path in (ROOT / "textok_mini").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_is_executed_clean_and_defines_nothing_that_the_library_has(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert [cell.execution_count for cell in code] == sorted(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert "widgets" not in book.metadata and book.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 1e6
    assert max(len([line for line in cell.source.splitlines() if line.strip()]) for cell in code) <= 25
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not defined & defined_in_library()
    # A committed notebook is the laptop run: what it shows was made with the parameters that it has.
    assert not [folder for folder in ("/root/", "/home/", str(ROOT)) if folder in path.read_text()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_that_a_notebook_prints_is_the_librarys_of_today(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in code for node in ast.parse(cell.source).body]
    exec("\n".join(ast.unparse(n) for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))), names := {})
    for cell in code:
        shown = "".join(output.get("text", "") for output in cell.outputs)
        for name in re.findall(r"inspect\.getsource\(([\w.]+)\)", cell.source):
            if name.partition(".")[0] in names:  # else it is a cell's own variable
                assert inspect.getsource(eval(name, names)) in shown, name


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "parameters").glob("*.yaml")), ids=lambda p: p.stem)
def test_parameter_files_have_just_the_notebooks_parameters(path):
    given = set(yaml.safe_load(path.read_text()))
    for notebook in NOTEBOOKS:
        assert given == set(papermill.inspect_notebook(str(notebook))) - {"output_dir"}


def test_what_a_notebook_says_is_the_laptop_run():
    """Started cell by cell it does what `make` does, and its committed outputs are of the settings it shows."""
    laptop = yaml.safe_load((ROOT / "notebooks" / "parameters" / "laptop.yaml").read_text())
    for notebook in NOTEBOOKS:
        shown = papermill.inspect_notebook(str(notebook))
        assert {k: ast.literal_eval(v["default"]) for k, v in shown.items() if k != "output_dir"} == laptop


@pytest.fixture(scope="module")
def smoke_copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    assert notebooks.main(["00_quickstart", "preset=smoke", f"output_dir={folder}"]) == 0
    return folder


def test_smoke_run_writes_results_and_a_page_that_stands_alone(smoke_copy):
    results = json.loads((smoke_copy / "results.json").read_text())
    assert results["config"] == to_dict(load_config("smoke")) and len(results["summary"]) == 5
    for split in ("test", "zero-shot"):
        for name, difference in results["differences"][split].items():
            ours, theirs = (results["per_image"][split][arm][name] for arm in ("textok", "twin"))
            by_hand = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(ours)
            assert difference["mean"] == pytest.approx(by_hand, abs=1e-3)
            assert difference["low"] <= difference["mean"] <= difference["high"]
            assert all(map(math.isfinite, difference.values()))
    page = (smoke_copy / "00_quickstart.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"https?://", page)
    assert page.count("data:image/png;base64") >= 7


def test_the_report_is_what_each_arm_scores_alone(smoke_copy):
    results, config, lie = json.loads((smoke_copy / "results.json").read_text()), load_config("smoke"), "wrong place"
    rows = load_data(config.data, "test", config.tokenizer.image_size).first(32)
    for arm in ("twin", "textok"):
        alone = evaluate(smoke_copy / arm, rows, [f"{lie}, detokenizer"])
        for name, values in alone["right"].items():
            np.testing.assert_allclose(results["per_image"]["test"][arm][name], values, atol=2e-4)
    cost = (alone[f"{lie}, detokenizer"]["psnr"] - alone["right"]["psnr"]).mean()
    assert results["wrong"]["textok"][f"{lie}, detokenizer"]["psnr"]["mean"] == pytest.approx(cost, abs=1e-5)
    assert not results["wrong"]["twin"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_smoke_copy_passes_nbval(path, tmp_path):
    """Papermill writes the copy with `smoke` parameters, nbval is the first to run it: every cell once, no error."""
    copy = tmp_path / path.name
    parameters = yaml.safe_load((ROOT / "notebooks" / "parameters" / "smoke.yaml").read_text())
    parameters |= {"output_dir": str(tmp_path)}
    papermill.execute_notebook(str(path), str(copy), parameters, prepare_only=True, kernel_name="python3")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300"]
    command += ["-p", "no:python", "-p", "no:cacheprovider", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    cells = sum(cell.cell_type == "code" for cell in nbformat.read(copy, as_version=4).cells)
    assert f"{cells} passed" in done.stdout and (tmp_path / "results.json").is_file()


def test_a_kept_copy_has_the_outputs_and_nothing_of_the_run(smoke_copy, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(notebooks, "project_root", lambda: tmp_path)
    executed = nbformat.read(smoke_copy / "00_quickstart.ipynb", as_version=4)
    kept = nbformat.read(notebooks.keep(smoke_copy / "00_quickstart.ipynb"), as_version=4)
    source = nbformat.read(ROOT / "notebooks" / "00_quickstart.ipynb", as_version=4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in source.cells]
    assert len(kept.cells) == len(executed.cells) - 1 and "papermill" not in json.dumps(kept)
    assert sum(len(cell.outputs) for cell in kept.cells if cell.cell_type == "code") >= 15
    assert not any("\r" in str(output) for cell in kept.cells for output in cell.get("outputs", []))


def test_an_unknown_notebook_preset_or_parameter_is_one_line(tmp_path, capsys):
    for arguments, message in (
        (["00_quickstrat"], "did you mean 00_quickstart?"),
        (["00_quickstart", "preset=smok"], "did you mean smoke?"),
        (["00_quickstart", "preset=smoke", "sede=3"], "did you mean seed?"),
        (["00_quickstart", "smoke"], "is not KEY=VALUE"),
    ):
        assert notebooks.main([*arguments, f"output_dir={tmp_path}"]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said


def test_other_parameters_go_to_a_folder_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.setattr(notebooks, "project_root", lambda: tmp_path)
    folders = []

    def stop(name, output_dir, parameters):
        folders.append(output_dir)
        raise ConfigError("enough")

    monkeypatch.setattr(notebooks, "run_notebook", stop)
    for settings in ([], ["seed=1"], ["seed=2"], ["data=pictures"], ["seed=1"], ["preset=smoke"]):
        assert notebooks.main(["00_quickstart", *settings]) == 2
    assert folders[0] == tmp_path / "runs" / "quickstart-laptop" and folders[5].name == "quickstart-smoke"
    assert len(set(folders)) == 5 and folders[1] == folders[4]


def test_a_failing_cell_is_told_and_kept(tmp_path, capsys):
    arguments = ["00_quickstart", "preset=smoke", "overrides=[training.stps=1]", f"output_dir={tmp_path}"]
    assert notebooks.main(arguments) == 1
    assert "did you mean training.steps?" in capsys.readouterr().err.strip().splitlines()[-1]
    assert "ConfigError" in (tmp_path / "00_quickstart.ipynb").read_text()
    with pytest.raises(ConfigError):
        notebooks.run_notebook("00_quickstart", tmp_path, {"nonsense": 1})
