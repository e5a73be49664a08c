"""Every notebook in order, at one scale, and a page that shows what came out.

    python -m textok_mini.reproduce laptop      # make reproduce PRESET=laptop

Each is run by papermill into `runs/PRESET/NAME/`. The same command again goes on where it stopped: a notebook whose
page is there is not run again, and a training goes on from its checkpoint. One that fails leaves its traceback in its
copy, and the others are run all the same. `runs/PRESET/index.html` shows all, with figures and `results.json`.
"""

import html
import json
import sys
import time
from pathlib import Path

import nbformat

from textok_mini import notebooks
from textok_mini.paths import beside, project_root

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>textok_mini: {preset}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
img {{ height: 9rem; max-width: 100%; object-fit: contain; margin: .3rem; border: 1px solid #ddd }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: .6rem }}
.failed {{ color: #b00020 }}</style><h1>textok_mini, {preset}</h1>{sections}</html>"""


def reproduce(preset: str) -> int:
    """0 if every notebook has run, 1 if one failed, 2 for an unknown preset."""
    folder, failed = project_root() / "runs" / preset, 0
    names = sorted(path.stem for path in (project_root() / "notebooks").glob("*.ipynb"))
    for number, name in enumerate(names, 1):
        if (folder / name / f"{name}.html").is_file():
            print(f"{number}/{len(names)} {name}: done before", flush=True)
            continue
        print(f"{number}/{len(names)} {name} ...", flush=True)
        begun = time.perf_counter()
        code = notebooks.main([name, f"preset={preset}", f"output_dir={folder / name}"])
        if code == 2:
            return code
        failed += code
        (folder / name / "seconds.json").write_text(json.dumps(time.perf_counter() - begun))
    with beside(folder / "index.html") as part:
        sections = "\n".join(section(folder / name) for name in names)
        part.write_text(PAGE.format(preset=html.escape(preset), sections=sections), encoding="utf-8")
    print(f"{len(names) - failed} of {len(names)} notebooks have run: {folder / 'index.html'}")
    return min(failed, 1)


def section(folder: Path) -> str:
    """One notebook on the index page: its state, what it says at its end, and its figures, small."""
    name, page, results = folder.name, folder / f"{folder.name}.html", folder / "results.json"
    took = folder / "seconds.json"  # missing if it was killed just after its page was written
    state = f"in {json.loads(took.read_text()):.0f} s" if took.is_file() else "has run"
    if not page.is_file():
        state = "<span class=failed>failed: the copy holds the traceback</span>"
    links = [path for path in (page, page.with_suffix(".ipynb"), results) if path.is_file()]
    listed = " · ".join(f'<a href="{name}/{path.name}">{path.name}</a>' for path in links)
    said = json.loads(results.read_text(encoding="utf-8"))["summary"] if page.is_file() and results.is_file() else []
    summary = f"<pre>{html.escape(chr(10).join(said))}</pre>" if said else ""
    return f"<h2>{name}</h2><p>{state} · {listed}</p>{summary}<p>{''.join(pictures(page.with_suffix('.ipynb')))}</p>"


def pictures(executed: Path) -> list[str]:
    """The PNG outputs of an executed notebook as <img> tags that need no other file."""
    if not executed.is_file():
        return []
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    found = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return [f'<img alt="a figure" src="data:image/png;base64,{"".join(png.split())}">' for png in found]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(2)
    sys.exit(reproduce(sys.argv[1]))
