"""The claims as one page that needs nothing else: figures inside, no network, readable on a phone.

    page(folder)        # python -m textok_mini.claims page=runs/claims.html

What `claims.py` computes, drawn: each comparison with its interval beside its margin, every seed as a dot, and what the
runs were made with.
"""

import html
import json
from base64 import b64encode
from collections import Counter
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from textok_mini.claims import CLAIMS, Found, find_all, verdict
from textok_mini.figures import COLOURS
from textok_mini.run import read_log

VERDICTS = {"holds": "#1b7f3b", "does not hold": "#b00020", "inconclusive": "#8a6d00", "not run yet": "#666666"}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>TexTok: what holds here</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 1.5rem auto; padding: 0 1rem; color: #222 }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .2rem }}
.said {{ color: #fff; padding: .1rem .5rem; border-radius: .6rem; font-size: .85rem; white-space: nowrap }}
img {{ max-width: 100%; height: auto }} table {{ border-collapse: collapse; font-size: .85rem }}
td, th {{ padding: .2rem .5rem; text-align: left; border-top: 1px solid #ddd; vertical-align: top }}
.wide {{ overflow-x: auto }} .small {{ color: #555; font-size: .85rem }}</style>
<h1>TexTok: the paper's claims, and what holds here</h1>
<p>{intro}</p>{overview}{sections}<h2>Made with</h2><p class="small">{made}</p></html>"""
INTRO = (
    "Small pictures, small networks, short trainings: a verdict is about these runs, not about ImageNet. Each dot is a "
    "training seed, each bar its 95% interval over seeds; a comparison holds where the whole bar lies right of the "
    "dashed margin. Metrics and expectations were written into the grids before their runs; what was chosen later, the "
    "notes say."
)


def drawing(found: list[Found]) -> str:
    """A claim's comparisons from top to bottom as an <img>; empty where nothing has run."""
    shown = [one for one in found if one.interval]
    if not shown:
        return ""
    figure = Figure(figsize=(5, 0.2 + 0.75 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), squeeze=False)[:, 0]
    for axis, one in zip(axes, shown, strict=True):  # an axis each, for each has its own unit
        x, colour = one.interval, VERDICTS[one.verdict]
        axis.errorbar(x.mean, 0, xerr=[[x.mean - x.low], [x.high - x.mean]], fmt="o", capsize=3, color=colour)
        axis.plot(one.values, [0.35] * len(one.values), ".", color=COLOURS["textok"], alpha=0.6)
        axis.axvline(one.margin, color="#444444", ls="--", lw=0.9)
        axis.set(yticks=[], ylim=(-0.5, 0.7))
        axis.set_title(f"{one.what} ({one.unit})", loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    told = html.escape("; ".join(f"{one.what}: {one.interval:+.3f} {one.unit}" for one in shown))
    return f'<img alt="{told}" src="data:image/png;base64,{b64encode(file.getvalue()).decode()}">'


def section(name: str, found: list[Found]) -> str:
    claim = CLAIMS[name]
    cells = ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in one.cells) for one in found]
    head = "<tr><th>comparison<th>the paper<th>here, 95% over seeds<th>verdict<th>runs"
    rows = f'<div class="wide"><table>{head}{"".join(cells)}</table></div>' if cells else ""
    note = f'<p class="small">{html.escape(claim["note"])}</p>' if "note" in claim else ""
    title = f"{name}: {html.escape(claim['says'])} {badge(verdict(found))}"
    return f'<h2 id="{name}">{title}</h2><p class="small">{html.escape(claim["rule"])}</p>{drawing(found)}{rows}{note}'


def badge(said: str) -> str:
    return f'<span class="said" style="background:{VERDICTS[said]}">{said}</span>'


def made_with(folder: Path) -> str:
    """How many runs, how long, on what, by which commits and versions of torch."""
    names = {row["grid"] for claim in CLAIMS.values() for row in claim["rows"] if "grid" in row}
    runs = sorted({path.parent for name in names for path in (folder / name).glob("*/metrics.npz")})
    seconds = sum(read_log(run, "timing.jsonl")[-1]["seconds"] for run in runs if (run / "timing.jsonl").exists())
    files = [run / "results.json" for run in runs]
    kept = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    keys = zip(*((one["device"], one["commit"][:10], f"torch {one['versions']['torch']}") for one in kept), strict=True)
    of = "; ".join(f"{key} ({count})" for column in keys for key, count in Counter(column).most_common())
    return html.escape(f"{len(runs)} trainings, {seconds / 3600:.1f} hours in all. Where it was kept: {of}.")


def page(folder: Path) -> str:
    """The whole page from the runs under `folder`."""
    claims = find_all(folder)
    lines = (
        f'<tr><td><a href="#{name}">{name}</a><td>{html.escape(CLAIMS[name]["says"])}<td>{badge(verdict(found))}'
        for name, found in claims.items()
    )
    overview = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    sections = "".join(section(name, found) for name, found in claims.items())
    return PAGE.format(intro=INTRO, overview=overview, sections=sections, made=made_with(folder))
