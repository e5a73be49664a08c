"""The page says what the ledger says, and needs no other file."""

import base64
import html
import re

import pytest

from textok_mini import claims, report
from textok_mini.paths import project_root

REFERENCE = project_root() / "reference"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "claims.html"
    assert claims.main([f"page={file}"]) == 0
    return file.read_text(encoding="utf-8")


def test_every_comparison_is_there_with_the_ledgers_words(page):
    cells = [html.unescape(cell) for cell in re.findall(r"<td>([^<]*)", page)]
    rows = [
        line.split(" | ")[1:] for line in claims.ledger(REFERENCE).splitlines() if re.match(r"\| (lead|C\d+) ", line)
    ]
    rows = [[cell.strip(" |") for cell in row] for row in rows if len(row) == 5]
    assert len(rows) == sum(len(claim["rows"]) for claim in claims.CLAIMS.values())
    for what, paper, ours, said, _ in rows:
        at = [i for i, cell in enumerate(cells) if cell == what and cells[i + 1 : i + 4] == [paper, ours, said]]
        assert at, what


def test_verdicts_are_those_of_the_ledger(page):
    said = dict(re.findall(r'<h2 id="(\w+)">.*?<span class="said"[^>]*>([^<]+)</span></h2>', page))
    ledger = dict(re.findall(r"^\| (lead|C\d+) \| .+ \| \*\*(.+)\*\* \|$", claims.ledger(REFERENCE), re.M))
    assert said == ledger and len(said) == len(claims.CLAIMS)


def test_it_stands_alone_and_fits_a_phone(page):
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page and "@import" not in page
    assert 'name="viewport"' in page and "max-width: 100%" in page and len(page) < 2_000_000
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    drawn = [
        name for name, claim in claims.CLAIMS.items() if any(claims.find(r, REFERENCE).interval for r in claim["rows"])
    ]
    assert len(pictures) == len(drawn) and all(base64.b64decode(png).startswith(b"\x89PNG") for _, png in pictures)
    assert all(re.search(r"[+-]\d", alt) for alt, _ in pictures)  # for whoever hears the page


def test_bad_arguments_are_one_line_and_nothing_is_written(tmp_path, capsys):
    assert claims.main([f"results={tmp_path / 'nowhere'}", f"page={tmp_path / 'x.html'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert claims.main(["sheet=x"]) == 2


def test_a_claims_own_words_are_not_markup(monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "C1", claims.CLAIMS["C1"] | {"says": "a < b & <b>bold</b>"})
    assert "a &lt; b &amp; &lt;b&gt;bold" in report.page(REFERENCE)
