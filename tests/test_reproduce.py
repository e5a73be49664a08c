"""All notebooks in a row: two small ones stand for them."""

import base64
import io
import re

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from textok_mini import notebooks, reproduce


def write(folder, name: str, *cells: str) -> None:
    parameters = new_code_cell('preset = "a"\noutput_dir = "x"', metadata={"tags": ["parameters"]})
    book = new_notebook(cells=[new_markdown_cell(f"# {name}"), parameters, *map(new_code_cell, cells)])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(book, folder / "notebooks" / f"{name}.ipynb")


GOOD = """import json, pathlib
pathlib.Path(output_dir, "results.json").write_text(json.dumps({"summary": ["2 < 3 & so on", preset]}))
open(pathlib.Path(output_dir).parent / "runs.txt", "a").write("good ")
import matplotlib.pyplot as plt
plt.plot([1, 2]);"""


def test_a_failed_notebook_stops_no_other_and_is_run_again(tmp_path, monkeypatch, capsys):
    for module in (notebooks, reproduce):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    (tmp_path / "notebooks" / "parameters").mkdir(parents=True)
    (tmp_path / "notebooks" / "parameters" / "tiny.yaml").write_text("preset: of-tiny\n")
    write(tmp_path, "00_bad", "1 / 0")
    write(tmp_path, "01_good", GOOD)
    assert reproduce.reproduce("tiny") == 1
    folder = tmp_path / "runs" / "tiny"
    page = (folder / "index.html").read_text()
    assert "so on\nof-tiny<" in page  # the preset that the file names
    assert "00_bad" in page and "failed" in page and "2 &lt; 3 &amp; so on" in page and "01_good/01_good.html" in page
    picture = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0])))
    assert picture.format == "PNG" and "http" not in page
    assert "1 of 2 notebooks have run" in capsys.readouterr().out

    write(tmp_path, "00_bad", "1 / 1")  # mended; the other is not run again
    assert reproduce.reproduce("tiny") == 0
    assert (folder / "runs.txt").read_text() == "good " and "01_good: done before" in capsys.readouterr().out
    assert "failed" not in (folder / "index.html").read_text().split("</style>")[1]
    assert re.search(r"<p>in \d+ s · .*01_good", page)


def test_an_unknown_preset_is_one_line(capsys):
    assert reproduce.main(["tyni"]) == 2
    assert "no preset 'tyni'" in capsys.readouterr().err
