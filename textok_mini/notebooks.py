"""Running a notebook from the command line: papermill, then a page that can be read without Jupyter.

    python -m textok_mini.notebooks 00_quickstart                   # with notebooks/parameters/laptop.yaml
    python -m textok_mini.notebooks 00_quickstart preset=smoke data=path/to/pictures seed=3
    python -m textok_mini.notebooks keep runs/quickstart/00_quickstart.ipynb    # for whoever commits a run

The executed copy, its HTML page and what it writes go to `runs/NAME-PRESET/`, or where other parameters are given to a
folder of theirs beside it; and into `notebooks/` only by `keep`.
"""

import json
import re
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from textok_mini.command import command
from textok_mini.config import ConfigError
from textok_mini.own_data import digest
from textok_mini.paths import project_root, write_text
from textok_mini.settings import nearest


def parameters_of(preset: str) -> dict:
    """What a file of `notebooks/parameters/` sets: imagenet256.yaml the preset imagenet256-32, say."""
    file = project_root() / "notebooks" / "parameters" / f"{preset}.yaml"
    if not file.is_file():
        presets = sorted(p.stem for p in file.parent.glob("*.yaml"))
        raise ConfigError(f"no preset {preset!r}{nearest(preset, presets)}; there are: {', '.join(presets)}")
    return yaml.safe_load(file.read_text())


def run_notebook(name: str, output_dir: Path, parameters: dict) -> Path:
    """Execute `notebooks/NAME.ipynb` with these parameters into `output_dir`; returns the executed copy.

    Raises ConfigError for a parameter that the notebook does not have (papermill would only warn), and papermill's
    own error when a cell fails; the copy then holds the traceback."""
    source = project_root() / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        there = sorted(p.stem for p in source.parent.glob("*.ipynb"))
        raise ConfigError(f"no notebook {name!r}{nearest(name, there)}; there are: {', '.join(there)}")
    known = papermill.inspect_notebook(str(source))
    for key in parameters:
        if key not in known:
            raise ConfigError(f"{name} has no parameter {key!r}{nearest(key, known)}; it has: {', '.join(known)}")
    output_dir.mkdir(parents=True, exist_ok=True)
    executed = output_dir / f"{name}.ipynb"
    # In the caller's folder, as the other commands: a relative path means the same inside the notebook and outside.
    papermill.execute_notebook(str(source), str(executed), parameters=parameters, kernel_name="python3")
    # Of a progress bar that was drawn a hundred times over itself, the last line is enough.
    book, _ = CoalesceStreamsPreprocessor(enabled=True).preprocess(nbformat.read(executed, as_version=4), {})
    nbformat.write(book, executed)
    return executed


def keep(executed: Path) -> Path:
    """Put an executed copy into `notebooks/` as it is committed: without papermill's cell and records of the run."""
    book = nbformat.read(executed, as_version=4)
    book.cells = [cell for cell in book.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for part in (book, *book.cells):
        part.metadata.pop("papermill", None)
        part.metadata.pop("execution", None)
    path = project_root() / "notebooks" / executed.name
    nbformat.write(book, path)
    return path


def to_html(executed: Path) -> Path:
    """An executed notebook as one page that needs no network: its figures inside, no script from elsewhere."""
    exporter = HTMLExporter(embed_images=True)
    page, _ = exporter.from_notebook_node(nbformat.read(executed, as_version=4))
    # nbconvert's template asks a CDN for MathJax, require.js and mermaid; these notebooks use none of them.
    page = re.sub(r"<script[^>]*src=\"https?://[^>]*>\s*</script>", "", page)
    page = re.sub(r"<script type=\"module\">.*?mermaid.*?</script>", "", page, flags=re.DOTALL)
    write_text(html := executed.with_suffix(".html"), page)
    return html


@command(__doc__)
def main(arguments: list[str]) -> int:
    """0; or 1 where a cell failed."""
    (name, *settings), begun = arguments, time.perf_counter()
    if name == "keep":
        print("\n".join(str(keep(Path(copy))) for copy in settings))
        return 0
    given = dict(s.split("=", 1) for s in settings if "=" in s)
    preset = given.get("preset", "laptop")
    others = {key: value for key, value in given.items() if key not in ("preset", "output_dir")}
    folder = "-".join([name.split("_", 1)[-1], preset, *([digest(others)] if others else [])])
    output_dir = Path(given.get("output_dir", project_root() / "runs" / folder))
    if wrong := [s for s in settings if "=" not in s]:
        raise ConfigError(f"{wrong[0]!r} is not KEY=VALUE, as in preset=smoke")
    parameters = parameters_of(preset)
    try:
        typed = {key: yaml.safe_load(value) for key, value in given.items() if key != "preset"}
    except yaml.YAMLError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    try:
        executed = run_notebook(name, output_dir, parameters | typed | {"output_dir": str(output_dir)})
    except papermill.PapermillExecutionError as error:
        copy = output_dir / f"{name}.ipynb"
        print(f"error: {copy}: cell In [{error.exec_count}]: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    page = to_html(executed)
    results = output_dir / "results.json"
    for line in json.loads(results.read_text())["summary"] if results.is_file() else []:
        print(line)
    print(f"in {time.perf_counter() - begun:.0f} s: {executed} and {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
