"""Every notebook in order, at one scale, and a page that shows what came out.

    python -m textok_mini.reproduce laptop      # make reproduce PRESET=laptop

Each is run by papermill into `runs/PRESET/NAME/`. The same command again goes on where it stopped: a notebook whose
page is there is not run again, and a training goes on from its checkpoint. One that fails leaves its traceback in its
copy, and the others are run all the same. `runs/PRESET/index.html` shows all, with figures and `results.json`.
"""

import functools
import html
import json
import multiprocessing
import os
import sys
from pathlib import Path

import nbformat

from textok_mini import notebooks
from textok_mini.command import Help, command
from textok_mini.paths import project_root, write_text

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>textok_mini: {preset}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
img {{ height: 9rem; max-width: 100%; object-fit: contain; margin: .3rem; border: 1px solid #ddd }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: .6rem }}
.failed {{ color: #b00020 }}</style><h1>textok_mini, {preset}</h1>{sections}</html>"""


def reproduce(preset: str) -> int:
    """0 if every notebook has run, 1 if one failed. Raises ConfigError for an unknown preset."""
    notebooks.parameters_of(preset)
    folder, one = project_root() / "runs" / preset, functools.partial(run, preset)
    names = sorted(path.stem for path in (project_root() / "notebooks").glob("*.ipynb"))
    if preset == "smoke":  # so short that most of it waits for one core: two at a time
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with multiprocessing.Pool(2) as pool:  # of processes, which Ctrl-C ends with their kernels
            failed = sum(pool.imap(one, names))
    else:
        failed = sum(map(one, names))
    sections = "\n".join(section(folder / name) for name in names)
    write_text(folder / "index.html", PAGE.format(preset=html.escape(preset), sections=sections))
    print(f"{len(names) - failed} of {len(names)} notebooks have run: {folder / 'index.html'}")
    return min(failed, 1)


def run(preset: str, name: str) -> int:
    """1 if it failed."""
    folder = project_root() / "runs" / preset / name
    if (folder / f"{name}.html").is_file():
        print(f"{name}: done before", flush=True)
        return 0
    print(f"{name} ...", flush=True)
    return min(1, notebooks.main([name, f"preset={preset}", f"output_dir={folder}"]))


def section(folder: Path) -> str:
    """One notebook on the index page: its state, what it says at its end, and its figures, small."""
    name, page, results = folder.name, folder / f"{folder.name}.html", folder / "results.json"
    copy = page.with_suffix(".ipynb")
    book = nbformat.read(copy, as_version=4) if copy.is_file() else nbformat.v4.new_notebook()
    state, summary = "<span class=failed>failed: the copy holds the traceback</span>", ""
    if page.is_file():
        state = f"in {book.metadata.get('papermill', {}).get('duration', float('nan')):.0f} s"
        said = json.loads(results.read_text(encoding="utf-8"))["summary"] if results.is_file() else []
        summary = f"<pre>{html.escape(chr(10).join(said))}</pre>" if said else ""
    links = [path for path in (page, copy, results) if path.is_file()]
    listed = " · ".join(f'<a href="{name}/{path.name}">{path.name}</a>' for path in links)
    data = [output.get("data", {}) for cell in book.cells for output in cell.get("outputs", [])]
    found = ["".join(some["image/png"].split()) for some in data if "image/png" in some]
    pictures = "".join(f'<img alt="a figure" src="data:image/png;base64,{png}">' for png in found)
    return f"<h2>{name}</h2><p>{state} · {listed}</p>{summary}<p>{pictures}</p>"


@command(__doc__)
def main(arguments: list[str]) -> int:
    if len(arguments) > 1:
        raise Help
    return reproduce(arguments[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
