"""The leaderboard's page and tables: the entries' values in every format."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from built_pages import CURRENT, RULES, rank_of, texts_of
from synthetic_entries import ENVIRONMENTS, METHODS, entry, many

from domainbed_sfp.analysis.render.grids import ABSENT
from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.site import data, page, tables, texts
from domainbed_sfp.leaderboard.site.board import band_of, board_of
from domainbed_sfp.leaderboard.tiers import TIERS


class Rows(HTMLParser):
    """The rows of entries, as (section's attributes, row's attributes, texts of its cells)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section: dict = {}
        self.rows: list[tuple[dict, dict, list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "section":
            self.section = attributes
        elif tag == "tr":
            self.inside = attributes.get("class") == "entry"
            if self.inside:
                self.rows.append((self.section, attributes, []))
        elif tag in ("td", "th") and self.inside:
            self.rows[-1][2].append("")

    def handle_data(self, data):
        if self.inside and self.rows[-1][2]:
            self.rows[-1][2][-1] += data.strip()


# values -------------------------------------------------------------------------------------------------------------


def test_csv_has_every_value(built):
    lines = list(csv.DictReader(io.StringIO((built / "leaderboard.csv").read_text())))
    found = {(row["dataset"], row["name"], row["selection"], row["environment"]): row for row in lines}
    assert len(found) == len(lines) == sum(len(one.results) * 6 for one in CURRENT)
    for one in CURRENT:
        for rule, result in one.results.items():
            for environment, cell in zip(ENVIRONMENTS[one.dataset], result.cells):
                row = found[one.dataset, one.name, rule, environment]
                assert row["accuracy"] == ("" if cell is None else repr(cell.accuracy))
                assert row["std_err"] == ("" if cell is None else repr(cell.std_err))
                assert row["trials"] == ("0" if cell is None else "3")
                assert row["rank"] == str(rank_of(one, rule) or "")
                assert float(row["macs"]) == result.costs["macs"]
                assert (row["bundle"], row["tier"], row["track"]) == (one.bundle, one.tier, one.track)
                assert row["transductive"] == str(int(one.transductive))
                assert json.loads(row["settings"]) == one.settings
            average, worst = (found[one.dataset, one.name, rule, name] for name in ("average", "worst"))
            assert average["accuracy"] == (repr(result.average[0]) if result.average else "")
            assert worst["accuracy"] == (repr(result.worst[1]) if result.worst else "")


def test_json_holds_the_entries_whole(built):
    document = json.loads((built / "leaderboard.json").read_text())
    as_documents = [json.loads(entries.text_of(one)) for one in many()]
    current = [one for one in as_documents if one["superseded_by"] is None]

    def by_name(found):
        return {(one["dataset"], one["name"]): one for one in found}

    assert by_name(document["entries"]) == by_name(current) and len(document["entries"]) == len(current)
    assert document["history"] == [one for one in as_documents if one["superseded_by"]]
    ranked = {
        (ranking["dataset"], row["name"], ranking["selection"]): row["rank"]
        for ranking in document["rankings"]
        for row in ranking["rows"]
    }
    assert ranked == {(one.dataset, one.name, rule): rank_of(one, rule) for one in CURRENT for rule in RULES}


@pytest.mark.parametrize("name, separator", [("leaderboard.md", "|"), ("leaderboard.tex", "&")])
def test_tables_have_every_value(built, name, separator):
    text = (built / name).read_text().replace("$\\pm$", "±").replace("\\_", "_").replace("$^\\dagger$", "†")
    text = re.sub(r"\*\*|</?u>|\\textbf\{|\\underline\{|\}", "", text)
    rows = {tuple(part.strip() for part in line.strip("|").split(separator)) for line in text.splitlines()}
    for one in CURRENT:
        label = one.name + (" †" if one.standing == "reconstruction" else "")
        for rule in RULES:
            wanted = (label, str(rank_of(one, rule) or ABSENT), *texts_of(one, rule))
            wanted = tuple(part.replace(ABSENT, "--") for part in wanted) if separator == "&" else wanted
            assert any(row[: len(wanted)] == wanted for row in rows), wanted


def test_page_has_every_value(built):
    text = (built / "index.html").read_text()
    parsed = Rows(text)
    assert len(parsed.rows) == 2 * len(CURRENT)
    found = {
        (section["data-dataset"], row["data-name"].removesuffix(" †"), section["data-rule"]): (section, row, cells)
        for section, row, cells in parsed.rows
    }
    for one in CURRENT:
        for rule in RULES:
            section, row, cells = found[one.dataset, one.name, rule]
            result = one.results[rule]
            assert row["data-name"].endswith(" †") == (one.standing == "reconstruction")
            assert cells[0] == str(rank_of(one, rule) or ABSENT)
            assert cells[2:4] == texts_of(one, rule)[-2:]
            assert row["data-accuracy"] == (repr(result.average[0]) if result.average else "")
            assert float(row["data-macs"]) == result.costs["macs"]
            assert float(row["data-bitops"]) == result.costs.get("bitops", 1024 * result.costs["macs"])
            assert (section["data-track"], section["data-transductive"]) == (
                one.track, "yes" if one.transductive else "no"
            )  # fmt: skip
            for cell in filter(None, result.cells):
                assert all(trial.run in text for trial in cell.trials)


def test_tracks_transductive_methods_and_tiers_are_ranked_apart():
    found = board_of(many()).rankings
    for ranking in found:
        kinds = {(one.track, one.transductive, one.tier) for one in (line.entry for line in ranking.lines)}
        assert kinds == {(ranking.track, ranking.transductive, ranking.tier)}
    kinds = [(one.track, one.transductive, one.tier) for one in found if one.dataset == "PACS" and one.is_verified]
    closed, open_ = ([(track, False, tier) for tier in TIERS[:0:-1]] for track in ("closed", "open"))
    closed = [kind for kind in closed if kind in kinds]
    open_ = [kind for kind in open_ if kind in kinds]
    assert len(closed) == 2 and kinds[: len(closed + open_)] == closed + open_
    # Behind all others, whatever the data set.
    verified = [ranking.is_verified for ranking in found]
    assert verified == sorted(verified, reverse=True) and not verified[-1]


def test_self_reported_entries_take_no_rank_in_any_format():
    """The best one by far, of which nobody has checked anything, stands behind the worst that was checked."""
    low, high = (replace(entry("PACS", METHODS[0]), name=name, tier="records-verified") for name in ("Low", "High"))
    best = replace(low, name="Best", tier="self-reported")
    found = []
    for one, accuracy in ((low, 50.0), (high, 60.0), (best, 99.9)):
        cells = tuple(replace(cell, accuracy=accuracy) for cell in one.results["oracle"].cells)
        found.append(
            replace(one, results={"oracle": replace(one.results["oracle"], cells=cells, average=(accuracy, 0.1))})
        )
    board = board_of(found)
    assert [[(line.entry.name, line.rank) for line in ranking.lines] for ranking in board.rankings] == [
        [("High", 1), ("Low", 2)], [("Best", None)]
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(data.csv_text(board))))
    assert [row["name"] for row in rows] == 6 * ["High"] + 6 * ["Low"] + 6 * ["Best"]
    assert {row["name"]: (row["rank"], row["tier"]) for row in rows}["Best"] == ("", "self-reported")
    document = json.loads(data.json_text(board))
    assert [one["verified"] for one in document["rankings"]] == [True, False]
    assert document["rankings"][1]["rows"][0]["rank"] is None
    title = "PACS, closed track, self-reported (not ranked), model selection: "
    for text, best_mark in ((tables.markdown_text(board), "**"), (tables.latex_text(board), "\\textbf{")):
        verified, _, apart = text.partition(title)
        assert best_mark + "60.0" in verified and "99.9" not in verified
        assert "99.9" in apart and best_mark not in apart and "Self-reported. Checked: what could be; each" in apart
    text = page.html_text(board)
    assert text.index("PACS: closed track, records-verified</h2>") < text.index(
        "PACS: closed track, self-reported (not ranked)</h2>"
    )
    cells = {row["data-name"]: (section["id"], row_cells[0]) for section, row, row_cells in Rows(text).rows}
    assert cells == {"High": ("ranking-1", "1"), "Low": ("ranking-1", "2"), "Best": ("ranking-2", ABSENT)}


def test_data_that_the_name_does_not_determine_is_ranked_apart():
    one, two = (entry("PACS", method) for method in METHODS[:2])
    other = replace(two, protocol={**two.protocol, "data_digest": "0a1b"})
    assert [len(ranking.lines) for ranking in board_of([one, two]).rankings] == [2, 2]
    assert [len(ranking.lines) for ranking in board_of([one, other]).rankings] == [1, 1, 1, 1]


def test_without_an_average_the_tested_environments_are_columns():
    """One environment alone, as in the coloured sets: there is nothing else to compare."""
    one = entry("PACS", METHODS[0], track="open", tested=1)
    assert board_of([one]).rankings[0].tested == ("art_painting",)
    assert board_of([one, entry("PACS", METHODS[1], track="open", tier=one.tier)]).rankings[0].tested == ()
    _, row, cells = Rows(page.html_text(board_of([one]))).rows[0]
    assert row["data-name"] == one.name and cells[2:5] == [texts_of(one, "training-domain")[0], "X", "X"]


def test_equal_averages_share_a_rank():
    def with_average(method, accuracy):
        made = entry("PACS", method)
        result = replace(made.results["oracle"], average=(accuracy, 0.1))
        return replace(made, tier="records-verified", results={"oracle": result})

    values = (70.04, 69.96, 69.94, 71.0)
    (ranking,) = board_of([with_average(method, value) for method, value in zip(METHODS, values)]).rankings
    assert [(line.rank, line.result.average[0]) for line in ranking.lines] == [
        (1, 71.0), (2, 70.04), (2, 69.96), (4, 69.94)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sparsity, band",
    [(None, "not recorded"), (0.0, "none removed"), (0.299, "up to 40 %"), (0.4, "40 to 60 %"), (0.5, "40 to 60 %"),
     (0.703, "60 to 80 %"), (0.899, "80 to 93 %"), (0.949, "93 % and more"), (1.0, "93 % and more")],
)  # fmt: skip
def test_bands(sparsity, band):
    assert band_of(sparsity) == band


def test_costs_that_nobody_recomputed_are_marked_everywhere():
    """The BitOPs of learned widths, in the row, in its details, on the plot's axis and in a footnote; no other cost."""
    one, other = (entry("PACS", method) for method in METHODS[:2])
    learned = next(entry("PACS", method) for method in METHODS if method[0] == "Quantized")
    board = board_of([learned, one, other])
    line = next(line for line in board.rankings[0].lines if line.entry.name == "Quantized")
    assert texts.bitops_text(line) == "65.6G ‡" and "‡" not in texts.part_text(line, "macs", "dense_macs")
    assert texts.unverified_axes(line) == ["bitops"]
    text = page.html_text(board)
    assert text.count('data-unverified="bitops"') == 2 and text.count('data-unverified=""') == 4  # under two rules
    assert text.count("65.6G ‡") == 2 and "bitops 65,600,000,000 ‡;" in text and text.count("‡ not recomputed") == 2
    markdown, latex = tables.markdown_text(board), tables.latex_text(board)
    assert markdown.count("65.6G ‡") == 2 and markdown.count("- ‡ not recomputed") == 2
    assert latex.count("65.6G $^\\ddagger$") == 2 and "‡" not in latex
    rows = csv.DictReader(io.StringIO(data.csv_text(board)))
    assert {row["name"]: row["unverified"] for row in rows} == {"Quantized": "bitops", one.name: "", other.name: ""}
    document = json.loads(data.json_text(board))
    told = {row["name"]: row["unverified"] for row in document["rankings"][0]["rows"]}
    assert told == {"Quantized": ["bitops"], one.name: [], other.name: []}
    # Where nobody is quantized BitOPs come from the MACs, and so does their mark.
    assert "‡ not recomputed" not in page.html_text(board_of([one])).partition("<script>")[0]
    assert texts.unverified_axes(board_of([replace(one, unverified=("macs",))]).rankings[0].lines[0]) == [
        "macs", "bitops"
    ]  # fmt: skip
