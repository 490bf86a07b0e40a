"""The folder of entries: what takes another's place, what is refused there, and what hand-edited files are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_entries import METHODS, as_added, entry

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.site.board import board_of
from domainbed_sfp.leaderboard.tiers import NOTES, TIERS


def method(at: int, tier: str = "records-verified", dataset: str = "PACS", **changes):
    """An entry at a tier."""
    made = replace(entry(dataset, METHODS[at]), tier=tier, notes=(), rerun=None)
    return replace(as_added(made), **changes)


def another(one, **changes):
    """The entry of another bundle of the same method, with runs of its own."""
    made = replace(one, bundle=f"{len(one.name):064x}", runs=(f"{len(one.name):064x}",), **changes)
    return replace(as_added(replace(made, rerun=None)), date="2026-04-01")


def with_draws(one, count: int):
    """An entry whose author drew hparams so many times."""
    return replace(one, protocol={**one.protocol, "hparams_seeds": list(range(count))})


def refused(folder: Path, one) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as told:
        store.write(folder, one)
    assert sorted(folder.rglob("*")) == before
    return str(told.value)


# what takes another's place --------------------------------------------------------------------------------------------


def test_a_higher_tier_takes_the_place(tmp_path):
    one = method(2)
    store.write(tmp_path, one)
    other = another(replace(one, tier="rerun-verified"))
    store.write(tmp_path, other)
    current, old = store.read_all(tmp_path, history=True)
    assert current == other and old == replace(one, superseded_by=other.bundle)
    assert "is rerun-verified, this one only records-verified" in refused(tmp_path, replace(one, bundle=64 * "e"))


def test_the_same_tier_gives_way_to_a_better_protocol_or_to_its_author(tmp_path):
    few = method(2)
    more = with_draws(few, 30)
    store.write(tmp_path, few)
    told = refused(tmp_path, another(few))
    assert "is records-verified, too, with as many trials and hparams draws" in told and "--author_key" in told
    store.write(tmp_path, another(more))
    assert "has 30 hparams_seeds, this one only 20" in refused(tmp_path, replace(few, bundle=64 * "e", runs=()))
    # Who signed the first one may mend it; a key that the first one does not name is nobody's.
    assert "gives way" in refused(tmp_path, replace(another(more), bundle=64 * "e", author=64 * "1"))
    signed = method(3, author=64 * "1")
    store.write(tmp_path, signed)
    assert "gives way" in refused(tmp_path, another(signed, author=64 * "2"))
    assert "gives way" in refused(tmp_path, another(signed, author=None))
    store.write(tmp_path, another(signed, author=64 * "1"))


@pytest.mark.parametrize("field, value", [("precision", "bf16"), ("task", "domain_adaptation")])
def test_another_protocol_takes_no_place(tmp_path, field, value):
    one = method(2)
    store.write(tmp_path, one)
    changes = {"transductive": True} if field == "task" else {}
    other = replace(one, tier="rerun-verified", protocol={**one.protocol, field: value}, **changes)
    other = another(replace(other, track="open" if field == "task" else "closed"))
    assert f"with another protocol.{field}" in refused(tmp_path, other)


def test_one_bundle_and_its_runs_have_one_name(tmp_path):
    one, other = method(2), method(3)
    store.write(tmp_path, one)
    assert "this bundle is there already, as VREx.json" in refused(tmp_path, replace(other, bundle=one.bundle))
    told = refused(tmp_path, replace(other, runs=(*one.runs, *other.runs)))
    assert "1 of its 2 runs are those of VREx.json" in told
    store.write(tmp_path, method(4, name="A row"))
    assert "cannot tell the names apart" in refused(tmp_path, replace(one, name="A ROW", bundle=64 * "e", runs=()))
    assert "name: expected VREx, alone or with settings" in refused(tmp_path, replace(one, name="VREX"))
    # A replaced entry's runs are known, too.
    store.write(tmp_path, another(replace(one, tier="rerun-verified")))
    assert "are those of VREx.1.json" in refused(tmp_path, replace(other, runs=one.runs))


def test_tiers_rank_apart_whatever_the_accuracy():
    """An invented entry of the lowest rank that has one never stands above what was trained again."""
    made = [method(at, tier) for at, tier in enumerate(TIERS)]
    for at, one in enumerate(made):
        result = replace(one.results["oracle"], average=(90.0 - 10 * at, 0.1))
        made[at] = replace(one, results={"oracle": result})
    found = board_of(made).rankings
    assert [ranking.tier for ranking in found] == list(TIERS[::-1])
    assert [[line.rank for line in ranking.lines] for ranking in found] == [[1], [1], [1], [1], [None]]
    assert set(NOTES) == set(TIERS)


# files that were edited by hand --------------------------------------------------------------------------------------------


def edited(folder: Path, name: str, change) -> str:
    """What reading the folder says of a file that was changed."""
    file = folder / "PACS" / name
    before = file.read_text()
    document = json.loads(before)
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(UserError) as told:
        store.read_all(folder)
    file.write_text(before)
    store.read_all(folder)
    return str(told.value).removeprefix(f"{file}: ")


@pytest.fixture
def folder(tmp_path):
    """Two entries, of which one has replaced another."""
    store.write(tmp_path, method(2))
    store.write(tmp_path, another(replace(method(2), tier="rerun-verified")))
    store.write(tmp_path, method(3))
    return tmp_path


def trial(document, rule="oracle"):
    return document["results"][rule]["cells"][0]["trials"][0]


def test_a_rerun_that_was_not_drawn(folder):
    def other_run(document):
        document["rerun"]["cells"][0]["run"] = trial(document)["run"] + "0"

    assert edited(folder, "VREx.json", other_run).startswith("rerun.cells: expected [")
    assert "which bundle and seed 8 draw" in edited(folder, "VREx.json", lambda d: d["rerun"].update(seed=8))
    assert "rerun.cells: expected [" in edited(folder, "VREx.json", lambda d: d.update(bundle=64 * "9"))
    told = edited(folder, "VREx.json", lambda d: d["rerun"].update(mean_difference=9.0))
    assert told.startswith("rerun.mean_difference: expected at most 1 points")
    told = edited(folder, "VREx.json", lambda d: d["rerun"]["cells"][0].update(difference=9.0))
    assert told.startswith("rerun.cells[0].difference: expected at most 3")
    told = edited(folder, "VREx.json", lambda d: d["rerun"].update(tolerance=100))
    assert told.startswith("rerun.tolerance: expected at most 3 points")
    told = edited(folder, "VREx.json", lambda d: d.update(tier="rerun-identical"))
    assert told == 'tier: expected rerun-verified, found "rerun-identical"'
    told = edited(folder, "VREx.json", lambda d: d["rerun"]["cells"][0].update(agreement="identical"))
    assert told.startswith("rerun.cells[0].difference: expected 0 where identical")


def test_choices_that_cannot_both_be(folder):
    def same_run(document):
        trial(document)["run"] = document["results"]["oracle"]["cells"][1]["trials"][0]["run"]

    assert "run: expected one run for each test environment, trial" in edited(folder, "GroupDRO.json", same_run)

    def same_checkpoint(document):
        names = ("run", "step", "hparams_seed")
        trial(document).update({name: trial(document, "training-domain")[name] for name in names})

    told = edited(folder, "GroupDRO.json", same_checkpoint)
    assert "trials[0].accuracy: expected" in told and "as the same checkpoint of" in told


def test_entries_that_contradict_each_other(folder):
    other = json.loads((folder / "PACS" / "GroupDRO.json").read_text())
    told = edited(folder, "VREx.1.json", lambda d: d.update(bundle=other["bundle"]))
    assert "bundle: expected a bundle of its own, not that of " in told
    told = edited(folder, "VREx.1.json", lambda d: d.update(runs=other["runs"]))
    assert "runs: expected runs of its own, not that of " in told
    told = edited(folder, "VREx.1.json", lambda d: d.update(superseded_by=64 * "0"))
    assert told.startswith("superseded_by: expected the bundle of ")
    told = edited(folder, "VREx.1.json", lambda d: d.update(date="2026-05-01"))
    assert told.startswith("date: expected no day after 2026-04-01")


def test_one_bundle_of_two_data_sets_says_one_thing(folder):
    """Whoever changes the name of one of a bundle's rows is told by the other."""
    (folder / "OfficeHome").mkdir()
    one = method(3, dataset="OfficeHome", bundle=method(3).bundle)
    (folder / "OfficeHome" / "GroupDRO.json").write_text(entries.text_of(one))
    store.read_all(folder)
    told = edited(folder, "GroupDRO.json", lambda d: d.update(commit="ffffffffffff"))
    assert told.startswith('commit: expected "0123456789ab", as ')


def test_files_of_all_kinds_keep_their_fields():
    """Every field of an entry is in its file, and comes back as it was."""
    one = method(
        2, "rerun-verified", author=64 * "1", archive="../bundles/x.tgz", step_0={"runs": 240, "difference": 0.2}
    )
    assert entries.from_json(entries.as_json(one)) == one
    assert set(entries.as_json(one)) == {"format", *vars(one)}
