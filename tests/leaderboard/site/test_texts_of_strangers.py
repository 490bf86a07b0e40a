"""Texts of strangers are texts in every format."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from synthetic_entries import METHODS, entry

from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.site import data, page, tables
from domainbed_sfp.leaderboard.site.board import board_of


def texts_in(value):
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from texts_in(one)


def test_page_escapes_every_text(hostile_board):
    text = page.html_text(hostile_board)

    class Tags(HTMLParser):
        found: list = []

        def handle_starttag(self, tag, attrs):
            self.found.append((tag, dict(attrs)))

    parser = Tags()
    parser.found = []
    parser.feed(text)
    tags = {tag for tag, _ in parser.found}
    assert not tags & {"img", "svg", "b.", "iframe"}
    assert [tag for tag, _ in parser.found].count("script") == 1
    attributes = {name for _, attrs in parser.found for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name in ("style", "src", "action")}
    assert {attrs["href"] for _, attrs in parser.found if "href" in attrs} == {"#tables", "data:,"}


def test_json_and_csv_keep_every_text(hostile_board):
    document = json.loads(data.json_text(hostile_board))
    wanted = set(texts_in([entries.as_json(one) for one in hostile_board.entries]))
    assert wanted <= set(texts_in(document["entries"]))
    lines = list(csv.DictReader(io.StringIO(data.csv_text(hostile_board))))
    assert {one.name for one in hostile_board.entries} == {row["name"] for row in lines}


def test_texts_are_no_markup_in_the_other_formats():
    one = entry("PACS", METHODS[0])
    names = ["=HYPERLINK(1)", "a\n\n# b | c", "<img src=x>[x](javascript:1)", "\\input{x}%\u202e"]
    cells = tuple(replace(cell, environment=name) for cell, name in zip(one.results["oracle"].cells, names))
    low = min(cells, key=lambda cell: cell.accuracy)
    result = replace(one.results["oracle"], cells=cells, worst=(low.environment, low.accuracy))
    one = replace(one, results={"oracle": result}, protocol={**one.protocol, "environments": names})
    entries.text_of(one)  # an entry may be called so
    board = board_of([one])
    markdown, latex, table = (
        tables.markdown_text(board),
        tables.latex_text(board),
        data.csv_text(board),
    )
    assert "\n# b" not in markdown and "a\\\\n\\\\n# b \\| c" in markdown
    assert "\\<img src=x\\>\\[x\\](javascript:1)" in markdown
    assert "\\textbackslash{}input\\{x\\}\\%\\textbackslash{}u202e" in latex and "\n# b" not in latex
    environments = [row["environment"] for row in csv.DictReader(io.StringIO(table))]
    assert environments[:4] == ["'=HYPERLINK(1)", *names[1:]]


def board_with(environments: list[str]):
    """A board whose four environments are called so."""
    one = replace(entry("PACS", METHODS[0]), tier="records-verified")
    cells = tuple(replace(cell, environment=name) for cell, name in zip(one.results["oracle"].cells, environments))
    low = min(cells, key=lambda cell: cell.accuracy)
    result = replace(one.results["oracle"], cells=cells, worst=(low.environment, low.accuracy))
    one = replace(one, results={"oracle": result}, protocol={**one.protocol, "environments": environments})
    entries.text_of(one)  # an entry may be called so
    return board_of([one])


@pytest.mark.parametrize(
    "text, written",
    [
        ("a|b", "a\\|b"), ("a\\|b", "a\\\\\\|b"), ("`rm`", "\\`rm\\`"), ("**a**", "\\*\\*a\\*\\*"),
        ("_a_ b_c", "\\_a\\_ b_c"), ("~~a~~", "\\~\\~a\\~\\~"), ("$x$", "\\$x\\$"), ("&lt;b&gt;", "\\&lt;b\\&gt;"),
        ("![x](https://a.example)", "!\\[x\\](https\\://a.example)"), ("<javascript:1>", "\\<javascript:1\\>"),
        ("www.a.example", "www\\.a.example"), ("a\u2028b", "a\\\\u2028b"), ("a\r\n| b", "a\\\\r\\\\n\\| b"),
    ],
)  # fmt: skip
def test_markdown_shows_texts_as_they_are(text, written):
    markdown = tables.markdown_text(board_with([text, "b", "c", "d"]))
    (header,) = (line for line in markdown.splitlines() if line.startswith("| Method"))
    cells = [cell.strip() for cell in re.split(r" \| ", header.strip("| "))] if "| b" not in text else [header]
    assert written in cells[2 if "| b" not in text else 0]
    # No cell more than there would be: pipes that divide are not behind a backslash.
    rule = markdown.splitlines()[markdown.splitlines().index(header) + 1]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", header)) == rule.count("|")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1", "\x001"])
def test_csv_texts_are_no_formulas(text):
    written = data.csv_text(board_with([text, "x;=1+1", "c", "d"]))
    rows = list(csv.DictReader(io.StringIO(written, newline="")))
    assert [row["environment"] for row in rows][:2] == [f"'{text}", "x;=1+1"]
    # Divided by semicolons, a text is one cell still; numbers stay numbers.
    assert '"x;=1+1"' in written and ";=1+1" not in written.replace('"x;=1+1"', "")
    assert not math.isnan(float(rows[0]["accuracy"])) and f",{rows[0]['accuracy']}," in written


def test_latex_texts_are_no_commands():
    names = ["\\input{x}", "a & b % c", "$x^2_1$ #1 ~", "\\\\[1cm] {\\bf"]
    latex = tables.latex_text(board_with(names))
    (header,) = (line for line in latex.splitlines() if line.startswith("Method"))
    assert header.startswith(
        "Method & Rank & \\textbackslash{}input\\{x\\} & a \\& b \\% c & "
        "\\$x\\textasciicircum{}2\\_1\\$ \\#1 \\textasciitilde{} & "
        "\\textbackslash{}\\textbackslash{}[1cm] \\{\\textbackslash{}bf & Average"
    )


def test_the_page_links_nothing_that_an_entry_says():
    """A reference is a text: no address in it becomes a link, whatever its scheme."""
    one = replace(
        entry("PACS", METHODS[0]), reference="https://a.example javascript:alert(1)", notes=("http://b.example",)
    )
    text = page.html_text(board_of([one]))
    assert "https://a.example javascript:alert(1)" in text and "http://b.example" in text
    assert set(re.findall(r'href="([^"]*)"', text)) == {"#tables", "data:,"}
