"""The launch files: what they run is the training command, with settings that exist."""

import re
import shlex
import subprocess

import pytest
import yaml

from textok_mini.paths import project_root
from textok_mini.settings import PRESETS, load_config

LAUNCH = project_root() / "launch"
VALUES = {"PRESET": "imagenet256-32", "DATA": "somewhere", "CAPTIONS": "elsewhere", "OUTPUT_DIR": "runs/x"}


def overrides(script: str) -> list[str]:
    """What follows `-m textok_mini.train` in a shell script, with its variables filled in."""
    (command,) = re.findall(r"-m textok_mini\.train (.*?)(?: &)?$", script, re.MULTILINE)
    return [re.sub(r"\$(\w+)", lambda m: VALUES[m[1]], word) for word in shlex.split(command)]


def scripts() -> dict[str, str]:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert {"resources", "num_nodes", "workdir", "setup", "run"} <= set(task) and set(task["envs"]) == set(VALUES)
    return {"skypilot": task["run"], "slurm": (LAUNCH / "slurm.sh").read_text()}


@pytest.mark.parametrize("name", ["skypilot", "slurm"])
def test_a_launch_file_is_shell_and_runs_a_config_that_exists(name):
    script = scripts()[name]
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    preset, *given = overrides(script)
    config = load_config(preset, [o for o in given if not o.startswith("output_dir=")])
    assert preset in PRESETS and config.data.source == "somewhere" and config.data.captions_from == "elsewhere"
    assert config.training.batch_size % 8 == 0 and "output_dir=runs/x" in given


def test_both_run_the_same():
    one, two = map(overrides, scripts().values())
    assert one == two
