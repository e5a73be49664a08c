"""The project's own promises: one list of dependencies, one range of Pythons, a small library, no pickles."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LIBRARY = sorted((ROOT / "textok_mini").glob("*.py"))
MAKEFILE = (ROOT / "Makefile").read_text()
# `make test` runs these tests: what it was told must not reach the `make` that they start.
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def requirements(*extras: str) -> dict[str, Requirement]:
    """Name to requirement, of the project itself and of some of its extras."""
    lines = PROJECT["dependencies"] + [line for e in extras for line in PROJECT["optional-dependencies"][e]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def imported_modules(files: list[Path]) -> set[str]:
    """Top-level names of the third-party modules imported anywhere in these files, also inside functions."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"textok_mini", "tests"}


def distributions(modules: set[str]) -> dict[str, set[str]]:
    installed = packages_distributions()
    return {module: {canonicalize_name(d) for d in installed.get(module, [])} for module in modules}


# --- one source of dependencies ---


def test_conda_and_make_install_the_same_set_from_the_same_source():
    *_, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[all]"]}
    assert re.findall(r"pip install .*?(-c [^;]*);", MAKEFILE) == ["-c constraints.txt -e '.[all]'"]
    extras = set(PROJECT["optional-dependencies"]) - {"all"}
    (everything,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert everything.name == PROJECT["name"] and everything.extras == extras


def test_every_place_accepts_the_same_pythons():
    accepted = [minor for minor in range(8, 20) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]
    assert accepted == [11, 12, 13] and sys.version_info[1] in accepted
    low, high = re.search(r"\(3, (\d+)\) <= v <= \(3, (\d+)\)", MAKEFILE).groups()
    assert [int(low), int(high)] == [accepted[0], accepted[-1]]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{low}"
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python=3.{low}" in conda


@pytest.mark.parametrize(
    ("folder", "extras"), [("textok_mini", ("small", "notebooks")), ("tests", ("small", "notebooks", "test"))]
)
def test_every_import_is_declared(folder, extras):
    declared = set(requirements(*extras))
    found = distributions(imported_modules(sorted((ROOT / folder).glob("*.py"))))
    missing = {module: names for module, names in found.items() if not names & declared}
    assert not missing, f"imported in {folder}, not declared in pyproject.toml: {missing}"


def test_every_declared_package_is_used():
    sources = "\n".join(file.read_text() for file in LIBRARY)
    mentioned = {m for m in packages_distributions() if re.search(rf"\b{re.escape(m)}\b", sources)}
    used = set().union(*distributions(mentioned).values())
    assert not set(requirements("small")) - used


def test_constraints_pin_every_dependency_and_nothing_of_one_machine():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!_-]+)", line).groups()
        pins[canonicalize_name(name)] = version
    for name, requirement in requirements("small", "notebooks", "test", "ray").items():
        assert pins[name] in requirement.specifier, f"constraints.txt has {name} {pins[name]}, not {requirement}"
        assert {s.operator for s in requirement.specifier} == {">="}, f"{name}: a lower bound only"
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton", "textok"))]


# --- commands ---


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=PLAIN, capture_output=True, text=True)


def test_make_alone_lists_every_target():
    help_text = run(["make"], ROOT).stdout
    targets = re.search(r"\.PHONY: (.*)", MAKEFILE)[1].split()
    assert all(re.search(rf"make {target} +\S", help_text) for target in targets)
    assert {"setup", "quickstart", "test", "lab"} <= set(targets)


def test_a_wrong_python_is_one_clear_line(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\ncase "$1" in -V) echo Python 3.10.4 ;; -c) exit 1 ;; esac\n')
    old.chmod(0o755)
    for python, message in ((old, "is Python 3.10.4, but Python 3.11 to 3.13 is needed"), ("absent", "no absent")):
        made = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
        assert made.returncode and message in made.stderr and made.stderr.count("error:") == 1
        assert not (tmp_path / ".venv").exists()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-2:] == ["make setup", "make test"]


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2412.05796"


# --- house rules ---


def test_the_library_stays_small():
    lines = {file.name: len(file.read_text().splitlines()) for file in LIBRARY}
    assert sum(lines.values()) <= 6_660 and max(lines.values()) <= 350, lines


def test_nothing_loads_a_file_that_can_run_code():
    risky = re.compile(r"joblib\.load|allow_pickle=True|weights_only=False|trust_remote_code=True|pickle\.loads?\(")
    for file in [*LIBRARY, *(ROOT / "notebooks").glob("*.ipynb")]:
        text = file.read_text()
        assert not risky.search(text), file.name
        assert all("weights_only=True" in line for line in text.splitlines() if "torch.load(" in line), file.name
    assert [file.name for file in LIBRARY if "pickle" in imported_names(file)] == ["weights.py"]


def imported_names(file: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import)]
    return {alias.name for node in nodes for alias in node.names}


def test_commands_begin_without_the_notebooks_packages():
    """A server that trains a grid and judges it has no use for Jupyter, nor for what captions by many machines need."""
    notebooks = ["IPython", "ipykernel", "jupyterlab", "nbconvert", "nbformat", "papermill", "diffusers", "ray"]
    commands = ["data", "train", "latents", "sample", "generate", "evaluation", "grid", "claims", "captions"]
    code = f"import sys; sys.modules.update(dict.fromkeys({notebooks})); import textok_mini.{{}}".format
    done = run([sys.executable, "-c", code(", textok_mini.".join(commands))], ROOT)
    assert done.returncode == 0, done.stderr
