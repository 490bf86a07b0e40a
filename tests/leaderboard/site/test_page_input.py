"""Entries of every kind: none, broken, contradictory."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from built_pages import write
from synthetic_entries import METHODS, entry, many

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.site import build, page
from domainbed_sfp.leaderboard.site.board import board_of

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
    setup = (Path(__file__).parents[3] / "setup.py").read_text()
    files = [file.name for file in Path(page.__file__).parent.iterdir() if file.suffix in (".html", ".css", ".js")]
    assert len(files) == 3 and all(f'"{name}"' in setup for name in files)
