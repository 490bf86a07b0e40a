"""The leaderboard's page and tables: the entries' values in every format, and what the page does in a real browser."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, find_browser
from synthetic_entries import ENVIRONMENTS, METHODS, entry, many

from domainbed_sfp.analysis.render.grids import ABSENT
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.documents.entry import Entry
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.site import build, data, page, tables, texts
from domainbed_sfp.leaderboard.site.board import band_of, board_of, family_of
from domainbed_sfp.leaderboard.tiers import TIERS

RULES = ("training-domain", "oracle")


def write(folder: Path, found: list[Entry]) -> Path:
    for number, one in enumerate(found):
        kept = "" if one.superseded_by is None else f".{number}"
        path = folder / one.dataset / f"{entries.slug(one.name)}{kept}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(entries.text_of(one))
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """All formats of many entries."""
    root = tmp_path_factory.mktemp("leaderboard")
    build.build(write(root / "entries", many()), root / "out", list(build.FILES))
    return root / "out"


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


def peers(one: Entry, rule: str) -> list[Entry]:
    return [
        other
        for other in many()
        if other.superseded_by is None
        and (other.dataset, other.track, other.transductive) == (one.dataset, one.track, one.transductive)
        and other.tier == one.tier
        and rule in other.results
    ]


def rank_of(one: Entry, rule: str) -> int | None:
    """One more than the number of competitors whose average reads higher; none where nobody checked the entry."""
    if one.results[rule].average is None or one.tier == "self-reported":
        return None
    shown = [
        float(f"{other.results[rule].average[0]:.1f}") for other in peers(one, rule) if other.results[rule].average
    ]
    return 1 + sum(value > float(f"{one.results[rule].average[0]:.1f}") for value in shown)


def texts_of(one: Entry, rule: str) -> list[str]:
    """The accuracies of an entry as readers see them."""
    result = one.results[rule]
    cells = [f"{cell.accuracy:.1f} ± {cell.std_err:.1f}" if cell else "X" for cell in result.cells]
    average = f"{result.average[0]:.1f} ± {result.average[1]:.1f}" if result.average else "X"
    worst = f"{result.worst[1]:.1f} ({result.worst[0]})" if result.worst else "X"
    return [*cells, average, worst]


CURRENT = [one for one in many() if one.superseded_by is None]


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


# input of every kind ------------------------------------------------------------------------------------------------


def test_same_entries_same_bytes(built, tmp_path):
    build.build(write(tmp_path / "entries", many()[::-1]), tmp_path / "out", list(build.FILES))
    for _, name in build.FILES.values():
        assert (tmp_path / "out" / name).read_bytes() == (built / name).read_bytes(), name


def test_no_entries(main, tmp_path):
    (tmp_path / "entries").mkdir()
    printed = main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "out").stdout
    assert printed.splitlines() == [f"wrote out/{name}" for _, name in build.FILES.values()]
    assert "There are no entries yet." in (tmp_path / "out" / "index.html").read_text()
    assert "There are no entries yet." in (tmp_path / "out" / "leaderboard.md").read_text()
    assert json.loads((tmp_path / "out" / "leaderboard.json").read_text())["entries"] == []


def test_only_the_formats_that_are_asked_for(main, tmp_path):
    write(tmp_path / "results" / "entries", many()[:2])
    main("leaderboard", "build", "--output_dir", "out", "--format", "html", "csv")
    assert sorted(os.listdir(tmp_path / "out")) == ["index.html", "leaderboard.csv"]
    text = (tmp_path / "out" / "index.html").read_text()
    assert re.findall(r'<a href="([^#"]+)"', text) == ["leaderboard.csv"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--format", "htm"], "unknown --format 'htm'; did you mean 'html'?"),
        (["--entries_dir", "nowhere"], "--entries_dir 'nowhere' is no folder"),
        (["--output_dir", "entries/PACS/ERM.json"], "--output_dir 'entries/PACS/ERM.json' cannot be written"),
    ],
)
def test_bad_arguments(main, tmp_path, arguments, told):
    write(tmp_path / "entries", many()[:1])
    done = main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "out", *arguments, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1


def test_a_broken_entry_is_told_by_file_and_field(main, tmp_path):
    write(tmp_path / "entries", many()[:3])
    path = tmp_path / "entries" / "PACS" / "IRM.json"
    document = json.loads(path.read_text())
    document["results"]["oracle"]["average"]["accuracy"] = "high"
    path.write_text(json.dumps(document))
    done = main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "out", check=False)
    assert done.returncode == 2
    assert done.stderr == (
        'error: entries/PACS/IRM.json: results.oracle.average.accuracy: expected a number, found "high"\n'
    )
    assert not (tmp_path / "out").exists()


ORACLE = ("results", "oracle")
CELL = (*ORACLE, "cells", 0)


@pytest.mark.parametrize(
    "path, value, told",
    [
        (("tier",), None, 'tier: expected one of self-reported, records-verified, model-verified, rerun-verified, rerun-identical, found null'),
        (("extra",), 1, "extra: expected no such field, found 1"),
        (("date",), "2026-02-30", 'date: expected a day of the calendar, found "2026-02-30" (day is out of range'),
        (("tier",), "rerun-verified", "rerun: expected a value with tier rerun-verified or rerun-identical, null with rerun-verified, found null"),
        (("unverified",), ["accuracy"], "unverified[0]: expected one of sparsity, parameters, "),
        (("settings", "sparsity"), 10**4000, "expected a JSON document (a whole number of 4,001 digits"),
        (("superseded_by",), "0" * 64, "superseded_by: expected null: a file without number is the current entry"),
        (("name",), "Vrex plus", 'name: expected VREx, alone or with settings as in'),
        (("protocol", "test_envs"), [[1], [2], [3]], "results.oracle.cells[0]: expected null, because"),
        (("dataset",), "VLCS", 'protocol.environments: expected ["Caltech101", '),
        (("protocol", "steps"), 600, "results.oracle.cells[0].trials[1].step: expected below 600"),
        (("protocol", "steps"), 6000, 'notes: expected "Open track: 6,000 steps, closed takes 5,001.", found no such'),
        (("protocol", "checkpoint_freq"), 7, "results.oracle.cells[0].trials[0].step: expected below 5001"),
        (("protocol", "trial_seeds"), [0, 1, 5], "protocol.trial_seeds: expected [0, 1, 2]: all from 0 on"),
        (("protocol", "data_digest"), "mine", "protocol.data_digest: expected null, because PACS stands for"),
        (("protocol", "backbone"), "resnet50 (tv V1)", 'protocol.backbone: expected "resnet50 (augmix)", by settings'),
        (("protocol", "precision"), "int8", "protocol.precision: expected one of fp32, bf16"),
        (("date",), "2999-01-01", 'date: expected a day that has come, found "2999-01-01"'),
        (("package",), "domainbed_sfp 9.0", "package: expected at most domainbed_sfp 0"),
        (("tier",), "model-verified", "models: expected a value with tier model-verified"),
        (("tier",), "self-reported", 'notes: expected a note "Not checked: ..." with tier self-reported'),
        (("track",), "open", 'track: expected a note "Open track: ..." for each reason'),
        (("transductive",), True, "transductive: expected false, as of VREx"),
        (("standing",), "reconstruction", 'standing: expected "reference", as of VREx'),
        (("reference",), "mine", 'reference: expected "'),
        (("algorithm",), "ERM", "reference: expected "),
        (("settings", "lr"), "fast", "settings: expected hparams of VREx, in their ranges"),
        (("settings", "sparsity"), 0.9, "settings: expected hparams of VREx, in their ranges"),
        (("notes",), ["the best method"], "notes[0]: expected a note that begins"),
        (("unverified",), ["mean_bits"], "unverified: expected costs of the results"),
        (("runs",), ["x"], "runs[0]: expected text like"),
        (("step_0",), {"runs": 1, "difference": 0.0}, "step_0.runs: expected 240, the runs of the protocol"),
        (("archive",), "/etc/passwd", "archive: expected text like"),
        (("archive",), "../../../../../secret", "archive: expected text like"),
        (("author",), "me", "author: expected text like"),
        (("protocol", "trial_seeds"), [0, 1], "results.oracle.cells[0].trials: expected one for each of protocol.trial_seeds, [0, 1], found [0, 1, 2]"),
        ((*ORACLE, "cells"), [None], "results.oracle.cells: expected 4 of them, one for each environment, found 1"),
        ((*CELL, "environment"), "photo", 'results.oracle.cells[0].environment: expected "art_painting", as in'),
        ((*CELL, "accuracy"), 99.0, "results.oracle.cells[0].accuracy: expected 6"),
        ((*CELL, "std_err"), 0.0, "results.oracle.cells[0].std_err: expected "),
        ((*CELL, "trials", 1, "trial_seed"), 0, "results.oracle.cells[0].trials: expected one for each of protocol.trial_seeds"),
        ((*ORACLE, "average", "accuracy"), 99.0, "results.oracle.average: expected 7"),
        ((*ORACLE, "average"), None, "results.oracle.average: expected 7"),
        ((*ORACLE, "worst", "environment"), "photo", 'results.oracle.worst.environment: expected "art_painting", found'),
        ((*ORACLE, "worst", "accuracy"), 99.0, "results.oracle.worst: expected 6"),
        ((*ORACLE, "costs", "macs"), 1e12, "results.oracle.costs.macs: expected at most dense_macs, 4100000000.0, found"),
        ((*ORACLE, "costs", "macs"), 10**400, "expected a JSON document (a whole number of 401 digits"),
        ((*ORACLE, "costs", "sparsity"), 0.9, "results.oracle.costs.sparsity: expected 0 where all parameters survive"),
        ((*ORACLE, "costs"), {}, "results.oracle.costs.sparsity: expected a number: every record has it"),
        ((*CELL, "trials", 1, "accuracy"), 99.0, "results.oracle.cells[0].trials[1].accuracy: expected a multiple of"),
        ((*CELL, "trials", 1, "step"), 5, "results.oracle.cells[0].trials[1].step: expected below 5001"),
        ((*CELL,), None, "results.oracle.cells[0]: expected a cell: protocol.test_envs has 0"),
        ((*ORACLE, "average", "std_err"), 0.0, "results.oracle.average.std_err: expected "),
        (("results",), {}, "results: expected "),
        ((*ORACLE, "costs", "speed"), 1, "results.oracle.costs.speed: expected no such field, found 1"),
    ],
)  # fmt: skip
def test_an_entry_that_contradicts_itself_or_its_place(main, tmp_path, path, value, told):
    """Whoever edits an entry by hand is told file and field, on one line; nothing is built."""
    write(tmp_path / "entries", [entry("PACS", METHODS[2])])
    file = tmp_path / "entries" / "PACS" / "VREx.json"
    inner = document = json.loads(file.read_text())
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    file.write_text(json.dumps(document))
    done = main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "out", check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith(f"error: entries/PACS/VREx.json: {told}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "data, told",
    [
        (b"[" * 10**6, "expected a JSON document (nested too deeply)"),
        (b"\xff\xfe", "expected a JSON document ('utf-8' codec"),
        (b"", "expected a JSON document (Expecting value"),
        (b"1" * 5000, "expected a JSON document (a whole number of 5,000 digits"),
        (b"[]", "expected an object, found []"),
        (b" " * (store.LARGEST_FILE + 1), "expected an entry of at most 4,194,304 bytes"),
    ],
    ids=["deep", "binary", "empty", "number", "list", "large"],
)
def test_files_that_are_no_entries(main, tmp_path, data, told):
    path = tmp_path / "entries" / "PACS" / "ERM.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    done = main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "out", check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: entries/PACS/ERM.json: {told}")
    assert done.stderr.count("\n") == 1


def test_folders_pipes_and_links_are_no_entries(main, tmp_path):
    folder = tmp_path / "entries" / "PACS"
    folder.mkdir(parents=True)
    makers = (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"))
    for number, make in enumerate(makers):
        make(folder / f"{number}.json")
        done = main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "out", check=False)
        assert done.returncode == 2 and f"entries/PACS/{number}.json cannot be read" in done.stderr
        (folder / f"{number}.json").rename(tmp_path / str(number))


def test_two_current_entries_of_one_name():
    one = entry("PACS", METHODS[0])
    with pytest.raises(UserError, match="2 current entries are called 'ERM' on PACS"):
        board_of([one, replace(one, bundle="cd" * 32)])


def test_history_is_reachable(built):
    text = (built / "index.html").read_text()
    assert text.count("Earlier entries (1)") == 2 and "ab" * 32 in text  # under both rules
    old = replace(entry("PACS", METHODS[3]), superseded_by="ef" * 32)
    alone = page.html_text(board_of([old]))
    assert "GroupDRO on PACS" in alone and "ef" * 32 in alone


def test_the_package_has_the_page():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    files = [file.name for file in Path(page.__file__).parent.iterdir() if file.suffix in (".html", ".css", ".js")]
    assert len(files) == 3 and all(f'"{name}"' in setup for name in files)


# texts of strangers -------------------------------------------------------------------------------------------------

PAYLOADS = (
    "</script><script>alert('{}')</script>",
    "\"><img src=x onerror=alert('{}')>",
    "'-alert('{}')-' onmouseover=alert(1) x='",
    "</style></title><svg onload=alert('{}')>",
    "{{{{ 7*7 }}}}{{% raw %}}{}<!--",
)
# What decides where a text goes is not a stranger's choice: the schema knows all its values.
FIXED = ("track", "tier", "superseded_by", "date")


def hostile(value, path=""):
    """The value with a payload of its own in every text."""
    if isinstance(value, str):
        return PAYLOADS[sum(map(ord, path)) % len(PAYLOADS)].format(path)
    if isinstance(value, dict):
        keys = {"settings": "<b>", "costs": "<i>"}
        made = {name: one if name in FIXED else hostile(one, f"{path}.{name}") for name, one in value.items()}
        return {**made, keys[end]: 3.0} if (end := path.rpartition(".")[2]) in keys else made
    if isinstance(value, (list, tuple)):
        return tuple(hostile(one, f"{path}.{index}") for index, one in enumerate(value))
    return value


def hostile_entry(number: int) -> Entry:
    one = replace(entry("PACS", METHODS[8]), notes=("a note",))
    fields = {name: getattr(one, name) for name in ("settings", "protocol", "rerun", "notes")}
    texts = {name: value for name, value in vars(one).items() if isinstance(value, str) and name not in FIXED}
    # On one data set, so that they compete and are drawn together.
    made = replace(one, **{**hostile({**texts, **fields}, f"e{number}"), "dataset": PAYLOADS[0].format("dataset")})
    results = {}
    for rule, result in one.results.items():
        document = hostile(entries.result_as_json(result), f"e{number}.{rule}")
        results[rule] = entries.result_from_json(document)
    return replace(made, results=results)


@pytest.fixture(scope="module")
def hostile_board():
    first = hostile_entry(0)
    return board_of([first, hostile_entry(1), replace(first, superseded_by="<b>superseded")])


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


# in the browser -----------------------------------------------------------------------------------------------------

# Rows that are shown, as [data set, rule, name].
SHOWN = """[...document.querySelectorAll("tr.entry")].filter(row => row.checkVisibility()).map(row =>
    [row.closest("section").dataset.dataset, row.closest("section").dataset.rule, row.dataset.name.replace(" †", "")])"""
SETTLE = "new Promise(done => setTimeout(done, 250))"
FIRST = "document.querySelector('section.ranking:not([hidden])')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here: the page is not tried in a browser")
    made = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def opened(browser, built):
    """Opens the page at an address's fragment; afterwards nothing may have gone to the console or the network."""

    def go(fragment: str = "", width: int = 1280, **options) -> Browser:
        browser.resize(width, 900, **options)
        browser.open((built / "index.html").as_uri() + fragment)
        return browser

    yield go
    assert browser.messages == []
    assert {address.partition("#")[0] for address in browser.requests} == {(built / "index.html").as_uri()}


def shown(where=lambda one, rule: True, rule: str | None = "training-domain") -> list[list[str]]:
    return sorted(
        [one.dataset, key, one.name] for one in CURRENT for key in RULES if rule in (None, key) and where(one, key)
    )


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f"""(() => {{ const field = document.forms[0].elements[{json.dumps(name)}]; field.value = {json.dumps(value)};
        field.dispatchEvent(new Event("input", {{bubbles: true}})); return {SETTLE}; }})()"""
    )


FILTERS = {
    "dataset": ("OfficeHome", lambda one, rule: one.dataset == "OfficeHome"),
    "track": ("open", lambda one, rule: one.track == "open"),
    "transductive": ("yes", lambda one, rule: one.transductive),
    "family": ("objective", lambda one, rule: family_of(one.algorithm) == "objective"),
    "band": ("60 to 80 %", lambda one, rule: 0.6 <= one.results[rule].costs["sparsity"] < 0.8),
    "tier": ("rerun-verified", lambda one, rule: one.tier == "rerun-verified"),
    "search": ("sfp sparsity=0.5", lambda one, rule: one.algorithm == "SFP" and one.settings["sparsity"] == 0.5),
}


def test_filters_and_search(opened):
    browser = opened()
    assert sorted(browser.run(SHOWN)) == shown()
    for name, (value, keeps) in FILTERS.items():
        choose(browser, name, value)
        wanted = shown(keeps)
        assert sorted(browser.run(SHOWN)) == wanted and wanted, name
        told = browser.run("document.getElementById('count').textContent")
        assert told.startswith(f"{len(wanted)} of {2 * len(CURRENT)} rows shown, in ") and f": {value}" in told
        choose(browser, name, "")
    choose(browser, "rule", "")
    assert sorted(browser.run(SHOWN)) == shown(rule=None)
    choose(browser, "search", "nothing has this name")
    assert browser.run(SHOWN) == [] and browser.run("document.getElementById('nothing').checkVisibility()")
    browser.run("document.querySelector('[type=reset]').click()")
    assert sorted(browser.run(SHOWN)) == shown()


def test_the_address_keeps_the_filters(opened):
    browser = opened("#dataset=PACS&rule=oracle&tier=self-reported&family=unheard-of")
    wanted = shown(lambda one, rule: one.dataset == "PACS" and one.tier == "self-reported", "oracle")
    assert sorted(browser.run(SHOWN)) == wanted
    choose(browser, "search", "sfp")
    assert browser.run("location.hash") == "#dataset=PACS&rule=oracle&tier=self-reported&search=sfp"


@pytest.mark.parametrize(
    "header, key, first",
    [
        ("Method", lambda one, result: one.name.lower(), "ascending"),
        ("Average", lambda one, result: result.average and result.average[0], "descending"),
        ("MACs left", lambda one, result: result.costs["macs"], "ascending"),
        ("Tier", lambda one, result: one.tier, "ascending"),
    ],
)
def test_sorting(opened, header, key, first):
    browser = opened("#dataset=PACS&track=open&tier=records-verified")
    click = f"[...{FIRST}.querySelectorAll('thead button')].find(one => one.textContent === {header!r})"
    others = {"ascending": "descending", "descending": "ascending"}
    found = (one for one in CURRENT if one.dataset == "PACS" and one.track == "open" and one.tier == "records-verified")
    known = {one.name: one for one in found}
    for direction in (first, others[first]):
        browser.run(f"{click}.focus()")
        browser.key("Enter", 13, "\r")
        assert browser.run(f"{click}.closest('th').ariaSort") == direction
        assert browser.run(f"{FIRST}.querySelectorAll('[aria-sort]').length") == 1
        order = browser.run(f"[...{FIRST}.querySelectorAll('tr.entry')].map(row => row.dataset.name.replace(' †', ''))")
        values = [key(known[name], known[name].results["training-domain"]) for name in order]
        given = [value for value in values if value is not None]
        assert sorted(order) == sorted(known)
        assert given == sorted(given, reverse=direction == "descending") == values[: len(given)]  # missing ones last
    follows = (
        f"[...{FIRST}.querySelectorAll('tr.entry')].every(row => row.nextElementSibling.id === row.id + '-detail')"
    )
    assert browser.run(follows)


def test_rows_open_by_mouse_and_keyboard(opened):
    browser = opened("#dataset=PACS&tier=records-verified")
    button, detail = f"{FIRST}.querySelector('tr.entry th button')", f"{FIRST}.querySelector('tr.detail')"
    assert not browser.run(f"{detail}.checkVisibility()")
    browser.run(f"{button}.click()")
    assert browser.run(f"{detail}.checkVisibility() && {button}.ariaExpanded") == "true"
    ranked = next(one for one in CURRENT if one.dataset == "PACS" and one.tier == "records-verified")
    best = next(one for one in peers(ranked, "training-domain") if rank_of(one, "training-domain") == 1)
    text = browser.run(f"{detail}.innerText").replace("\xa0", " ")
    for environment, accuracy in zip(ENVIRONMENTS["PACS"], texts_of(best, "training-domain")):
        assert f"{environment} {accuracy}" in text
    assert best.bundle in text and best.results["training-domain"].cells[0].trials[2].run in text
    browser.run(f"{button}.focus()")
    browser.key("Enter", 13, "\r")
    assert not browser.run(f"{detail}.checkVisibility()")
    browser.run("document.getElementById('expand').click()")
    open_now = "[...document.querySelectorAll('tr.detail')].filter(row => row.checkVisibility()).length"
    assert browser.run(open_now) == len(browser.run(SHOWN))
    assert browser.run("document.getElementById('expand').textContent") == "Collapse all"


def test_earlier_entries_open(opened):
    browser = opened("#dataset=PACS&search=ERM&track=closed")
    browser.run("document.getElementById('expand').click()")
    texts = "[...document.querySelectorAll('details')].filter(one => one.checkVisibility() && one.querySelector('.history'))"
    browser.run(f"{texts}[0].querySelector('summary').click()")
    assert "2025-11-02, self-reported" in browser.run(f"{texts}[0].innerText")


def test_theme(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    browser = opened(dark=True)
    browser.run("localStorage.clear()")
    browser = opened(dark=True)
    seen = [browser.run(ground)]
    for _ in range(3):
        browser.run("document.getElementById('theme').click()")
        seen.append(browser.run(ground))
    assert seen == [dark, light, dark, dark]
    browser.run("document.getElementById('theme').click()")  # light, and remembered
    browser = opened(dark=True)
    assert (browser.run(ground), browser.run("document.getElementById('theme').textContent")) == (light, "Theme: light")
    browser.run("localStorage.clear()")
    assert opened(dark=False).run(ground) == light


def contrast(one: str, two: str) -> float:
    """WCAG 2's contrast of two colours as getComputedStyle tells them."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(opened, dark):
    browser = opened(dark=dark)
    colours = browser.run(
        """Object.fromEntries(["text", "quiet", "accent", "line", "ground", "band", "field"].map(name => {
        document.body.style.color = `var(--${name})`; return [name, getComputedStyle(document.body).color]; }))"""
    )
    for ground in ("ground", "band", "field"):
        for name in ("text", "quiet", "accent"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        assert contrast(colours["line"], colours[ground]) >= 3, ground


def on_front(found: list[Entry], cost) -> set[str]:
    """The names that no other beats: neither worse in cost nor accuracy and better in one."""

    def values(one):
        result = one.results["training-domain"]
        return cost(result.costs), -result.average[0]

    names = set()
    for one in found:
        (c, a), others = values(one), [values(other) for other in found]
        if not any(oc <= c and oa <= a and (oc < c or oa < a) for oc, oa in others):
            names.add(one.name)
    return names


COSTS = {
    "macs": lambda costs: costs["macs"],
    "bitops": lambda costs: costs.get("bitops", 1024 * costs["macs"]),
    "parameters": lambda costs: costs["surviving_parameters"],
}


@pytest.mark.parametrize("cost", COSTS)
def test_plot(opened, cost):
    browser = opened(f"#dataset=TerraIncognita&track=closed&transductive=no&tier=records-verified&cost={cost}")
    found = [one for one in CURRENT if one.dataset == "TerraIncognita" and not one.transductive]
    found = [one for one in found if one.tier == "records-verified"]
    labels = browser.run(f"[...{FIRST}.querySelectorAll('.point')].map(point => point.ariaLabel)")
    assert {label.partition(":")[0].removesuffix(" †") for label in labels} == {one.name for one in found}
    front = {label.partition(":")[0].removesuffix(" †") for label in labels if label.endswith(", on the front")}
    assert front == on_front(found, COSTS[cost])
    table = browser.run(
        f"[...{FIRST}.querySelectorAll('figure tbody tr')].map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert {row[0].removesuffix(" †"): row[2] for row in table} == {
        one.name: texts_of(one, "training-domain")[-2] + " %" for one in found
    }
    assert {row[0].removesuffix(" †") for row in table if row[3] == "yes"} == front
    # Positions: the axis is logarithmic in cost, linear in accuracy.
    places = browser.run(
        f"[...{FIRST}.querySelectorAll('.point')].map(point => point.getAttribute('transform').match(/[\\d.]+/g).map(Number))"
    )
    by_name = {one.name: one.results["training-domain"] for one in found}
    costs = [COSTS[cost](by_name[label.partition(":")[0].removesuffix(" †")].costs) for label in labels]
    accuracies = [by_name[label.partition(":")[0].removesuffix(" †")].average[0] for label in labels]
    assert costs == sorted(costs)
    for (x, y), value, accuracy in zip(places, costs, accuracies):
        part = (x - places[0][0]) / (places[-1][0] - places[0][0])
        assert part == pytest.approx(math.log(value / costs[0]) / math.log(costs[-1] / costs[0]), abs=1e-6)
        assert (y < places[0][1]) == (accuracy > accuracies[0])


def test_costs_that_nobody_recomputed_are_marked_in_the_plot(opened):
    marked = f"[...{FIRST}.querySelectorAll('.point')].map(one => one.ariaLabel).filter(one => one.includes('‡'))"
    for cost, names in (("bitops", ["Quantized"]), ("macs", [])):
        browser = opened(f"#dataset=PACS&track=closed&transductive=no&tier=self-reported&cost={cost}")
        labels = browser.run(marked)
        assert [label.partition(":")[0] for label in labels] == names
        assert ("‡ not recomputed" in browser.run(f"{FIRST}.querySelector('figcaption').textContent")) == bool(names)
        cells = browser.run(f"[...{FIRST}.querySelectorAll('figure tbody tr')].map(row => row.children[1].textContent)")
        assert sum("‡" in cell for cell in cells) == len(names)


def test_plot_by_keyboard_and_pointer(opened):
    browser = opened("#dataset=PACS&track=closed&transductive=no")
    browser.run(f"{FIRST}.querySelector('.point').focus()")
    tip = f"{FIRST}.querySelector('.tip')"
    first = browser.run(f"{tip}.textContent")
    browser.key("ArrowRight", 39)
    second = browser.run("document.activeElement.ariaLabel")
    assert browser.run(f"{tip}.textContent").partition("\n")[0] == second.partition(":")[0] != first.partition("\n")[0]
    assert browser.run(f"{FIRST}.querySelectorAll('.point[tabindex=\"0\"]').length") == 1
    browser.key("Escape", 27)
    assert not browser.run(f"{tip}.checkVisibility()")
    browser.key("Enter", 13, "\r")
    row = "document.activeElement.closest('tr.entry')"
    assert browser.run(f"{row}.dataset.name") == second.partition(":")[0]
    assert browser.run(f"{row}.nextElementSibling.checkVisibility()")
    browser.run(f"{FIRST}.querySelector('figure').scrollIntoView()")
    box = browser.run(
        f"(box => [box.x + box.width / 2, box.y + box.height / 2])({FIRST}.querySelector('.point').getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert browser.run(f"{tip}.checkVisibility() && {tip}.textContent") == first


def test_plot_follows_the_filters(opened):
    browser = opened("#dataset=PACS&track=closed&transductive=no")
    choose(browser, "band", "93 % and more")
    labels = browser.run(f"[...{FIRST}.querySelectorAll('.point')].map(point => point.ariaLabel.split(':')[0])")
    assert {label.removesuffix(" †") for label in labels} == {
        f"{name} (sparsity=0.95)" for name in ("Magnitude", "Taylor", "SFP")
    }


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_does_not_scroll_sideways(opened, width):
    browser = opened("#dataset=PACS", width)
    browser.run("document.getElementById('expand').click()")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    inside = "[...document.querySelectorAll('.inside')].filter(one => one.checkVisibility())"
    assert browser.run(f"{inside}.every(one => one.getBoundingClientRect().right <= innerWidth)")
    # Plot labels stay inside, so that nothing is cut.
    assert browser.run(
        "[...document.querySelectorAll('svg text')].every(one => { const box = one.getBoundingClientRect();"
        " return box.width === 0 || (box.left >= 0 && box.right <= innerWidth); })"
    )


def test_for_screen_readers(opened):
    browser = opened("#rule=")
    problems = browser.run(
        """(() => {
        const all = selector => [...document.querySelectorAll(selector)];
        const ids = all("[id]").map(one => one.id);
        return {
            ids: ids.filter((id, at) => ids.indexOf(id) !== at),
            references: all("[aria-labelledby], [aria-controls]").flatMap(one => [one.getAttribute("aria-labelledby"),
                one.getAttribute("aria-controls")]).filter(id => id && !document.getElementById(id)),
            fields: all("input, select").filter(one => one.labels.length !== 1).map(one => one.name),
            buttons: all("button, [role=button]").filter(one => !(one.textContent.trim() || one.ariaLabel)).length,
            tables: all("table").filter(one => !one.caption?.textContent.trim()).length,
            heads: all("thead > tr > th").filter(one => one.scope !== "col").length
                + all("tbody > tr > th").filter(one => one.scope !== "row").length,
            regions: all("[role=region]").filter(one => !one.hasAttribute("tabindex")).length,
            live: all("#count[role=status]").length !== 1,
            skip: document.querySelector("a").getAttribute("href") !== "#tables",
            language: document.documentElement.lang !== "en",
        }; })()"""
    )
    assert not any(problems.values()), problems


def test_without_scripts_everything_is_there(opened):
    browser = opened()
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser = opened()
        assert sorted(browser.run(SHOWN)) == shown(rule=None)
        assert browser.run("[...document.querySelectorAll('tr.detail')].every(row => row.checkVisibility())")
        assert browser.run(
            "[...document.querySelectorAll('button, select, input')].every(one => !one.checkVisibility())"
        )
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_print(opened, tmp_path):
    browser = opened("#dataset=PACS", dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        controls = "form select, form input, form button, #theme, .skip, .tip"
        assert browser.run(f"[...document.querySelectorAll('{controls}')].every(one => !one.checkVisibility())")
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        lines = "[...document.querySelectorAll('.cells')].filter(one => one.checkVisibility()).length"
        assert browser.run(lines) == len(browser.run(SHOWN))
        heads = f"[...{FIRST}.querySelectorAll('thead th[data-kind]')].map(one => getComputedStyle(one, '::before').content)"
        assert browser.run(heads)[:2] == ['"Rank"', '"Method"']
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_texts_of_strangers_run_nothing(browser, hostile_board, tmp_path):
    (tmp_path / "index.html").write_text(page.html_text(hostile_board))
    browser.resize(1280, 900)
    browser.open((tmp_path / "index.html").as_uri())
    browser.run("document.getElementById('expand').click()")
    for name in ("family", "tier", "dataset", "search"):
        choose(browser, name, "<b>x")
        choose(browser, name, "")
    browser.run(f"{FIRST}.querySelector('.point').focus()")
    assert browser.messages == []
    assert [address.partition("#")[0] for address in browser.requests] == [(tmp_path / "index.html").as_uri()]
    assert (
        browser.run("document.querySelectorAll('img, script[src], svg[onload], [onerror], [onmouseover]').length") == 0
    )
    text = browser.run("document.body.textContent")
    for one in hostile_board.entries:
        told = [one.name, one.algorithm, one.reference, *one.notes, *one.protocol["environments"]]
        assert all(word in text for word in told)


def test_the_policy_holds_what_escaping_would_let_through(browser, tmp_path):
    """A second wall: even markup that got in could run and load nothing."""
    text = page.html_text(board_of([entry("PACS", METHODS[0])]))
    bad = "<script>window.bad = 1</script><img src='https://example.invalid/x.png' onerror='window.bad = 1'>"
    (tmp_path / "index.html").write_text(text.replace("<main", f"{bad}<main"))
    browser.open((tmp_path / "index.html").as_uri())
    assert browser.run("window.bad") is None and browser.messages
    assert browser.blocked == ["https://example.invalid/x.png"]
    assert browser.run("document.documentElement.className") == "js"  # ours did run
