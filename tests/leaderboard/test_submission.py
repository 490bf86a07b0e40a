"""From a sweep to an entry of the leaderboard, and what validation finds in bundles that were tampered with."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shlex
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import summary, tracks, validation
from domainbed_sfp.leaderboard.bundle import layout, mask_headers, tree
from domainbed_sfp.leaderboard.bundle.places import without_places
from domainbed_sfp.leaderboard.bundle.tree import sums_text
from domainbed_sfp.leaderboard.commands import entries_of
from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.facts import facts_of
from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.leaderboard.validation.outcomes import Recomputed, Rerun
from domainbed_sfp.pruning import costs
from domainbed_sfp.runs import mask_files, records
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs
from domainbed_sfp.training import hparams
from domainbed_sfp.training import train as training

DATASET, ROW = "FullColoredDigits", "Magnitude (sparsity=0.5)"
# Held out of 599 samples a fifth: 119; the others: 480.
OUT, IN = 119, 480


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """A real sweep: two rows, one test environment, two hparams draws x two trials of five steps."""
    root = tmp_path_factory.mktemp("sweep")
    spec = SweepSpec(
        [DATASET], [{"name": "Magnitude", "hparams": {"sparsity": s}} for s in (0.5, 0.3)], n_hparams=2, n_trials=2,
        steps=5, checkpoint_freq=2, test_envs=[[0]], hparams={"batch_size": 16}, skip_model_save=True,
    )  # fmt: skip
    jobs = make_jobs(spec, None)
    directory = SweepDirectory(root)
    directory.register(jobs)
    for job in jobs:
        with contextlib.redirect_stdout(io.StringIO()):
            training.train(job.settings(None, directory.job_dir(job), skip_model_save=True))
    return root


@pytest.fixture(scope="session")
def made(sweep, tmp_path_factory):
    """The bundle of one row of it."""
    target = tmp_path_factory.mktemp("made") / "bundle"
    assert submit(str(sweep), ROW, str(target)).tier == "records-verified"
    return target


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def resum(folder: Path) -> None:
    """Makes SHA256SUMS anew, as a forger would."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != layout.SUMS]
    sums = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / layout.SUMS).write_text(sums_text(sums))


def runs(folder: Path) -> list[Path]:
    """Files of records, by (trial seed, hparams seed)."""

    def seeds(file: Path) -> tuple[int, int]:
        args = json.loads(file.read_text().splitlines()[0])["args"]
        return args["trial_seed"], args["hparams_seed"]

    return sorted((folder / "records").iterdir(), key=seeds)


def edit(file: Path, change, lines: slice = slice(None)) -> None:
    """Changes records of a file by `change(record)`."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records[lines]:
        change(record)
    file.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def edit_submission(folder: Path, change) -> None:
    document = json.loads((folder / "submission.json").read_text())
    change(document)
    (folder / "submission.json").write_text(json.dumps(document))


def problems(folder: Path) -> list[str]:
    outcome = validation.validate(folder)
    assert outcome.problems and outcome.tier is None
    return [problem.line() for problem in outcome.problems]


def assert_told(folder: Path, file: str, field: str, expected: str, found: str) -> list[str]:
    """Some problem names file, field, what was expected and what was found."""
    told = problems(folder)
    start = f"{file}: {field}" if field else file
    matching = [line for line in told if line.startswith(f"{start}: expected ")]
    assert any(expected in line.split(", found ")[0] and found in line.split(", found ")[-1] for line in matching), told
    return told


def name_of(file: Path) -> str:
    return f"records/{file.name}"


# the way of an honest submission -------------------------------------------------------------------------------------


def test_a_bundle_holds_records_masks_and_sums_and_no_paths(made, sweep):
    document = json.loads((made / "submission.json").read_text())
    assert document["name"] == ROW and document["settings"] == {"batch_size": 16, "sparsity": 0.5}
    protocol = document["datasets"][DATASET]["protocol"]
    assert protocol["steps"] == 5 and protocol["hparams_seeds"] == [0, 1] and protocol["trial_seeds"] == [0, 1]
    assert protocol["backbone"] == "MNIST_CNN" and protocol["weights"] == "none" and protocol["image_size"] == 8
    assert len(runs(made)) == 4
    assert str(sweep) not in "".join(file.read_text() for file in runs(made))
    last = json.loads(runs(made)[0].read_text().splitlines()[-1])
    masks = mask_files.unpack((made / "masks" / f"{last['masks']}.safetensors").read_bytes())
    dead = sum(int((~mask).sum()) for mask in masks.values())
    assert last["parameters"] - last["surviving_parameters"] == dead
    # One bit a weight.
    size = (made / "masks" / f"{last['masks']}.safetensors").stat().st_size
    assert size < sum(mask.numel() for mask in masks.values()) / 8 + 4000


def one_run(root: Path, algorithm: str, **hparams) -> Path:
    """The bundle of a sweep of one run of two steps."""
    spec = SweepSpec(
        [DATASET], [algorithm], n_hparams=1, n_trials=1, steps=2, checkpoint_freq=1, test_envs=[[0]],
        hparams={"batch_size": 8, **hparams}, skip_model_save=True,
    )  # fmt: skip
    (job,) = make_jobs(spec, None)
    directory = SweepDirectory(root / "sweep")
    directory.register([job])
    with contextlib.redirect_stdout(io.StringIO()):
        training.train(job.settings(None, directory.job_dir(job), skip_model_save=True))
    assert submit(str(root / "sweep"), algorithm, str(root / "bundle")).tier == "records-verified"
    return root / "bundle"


def test_a_quantized_row_with_its_degraded_evaluation(tmp_path):
    folder = one_run(tmp_path, "UniformQuant", bits=3)
    (file,) = runs(folder)
    assert len(json.loads(file.read_text().splitlines()[-1])["env0_degraded"]) == 26
    # One width for all layers: every cost follows from the architecture.
    outcome = validation.validate(folder)
    assert outcome.unverified == {DATASET: []} and entries_of(outcome)[0].unverified == ()
    assert "not recomputed" not in validation.text_of(outcome)
    true = json.loads(file.read_text().splitlines()[-1])
    edit(file, lambda r: r.update(mean_bits=2.0, bitops=1e6, exported_bytes=9), slice(-1, None))
    resum(folder)
    told = problems(folder)
    for name in ("mean_bits", "bitops", "exported_bytes"):
        start = f"{name_of(file)}: line 2.{name}: expected {true[name]:,}, by"
        assert any(line.startswith(start) for line in told), (start, told)
    edit(file, lambda record: record["env0_degraded"][3].update(accuracy=1.5), slice(-1, None))
    resum(folder)
    assert_told(folder, name_of(file), "line 2.env0_degraded[3].accuracy", "at most 1", "1.5")


def test_learned_widths_are_marked_and_kept_in_bounds(tmp_path):
    """No bundle holds the weights that decide them."""
    folder = one_run(tmp_path, "StaticMixedPrecision", degraded_evaluation=False)
    outcome = validation.validate(folder)
    assert outcome.tier == "records-verified"
    assert outcome.unverified == {DATASET: ["exported_bytes", "bitops", "mean_bits"]}
    assert f"not recomputed on {DATASET}, and marked so: exported_bytes, bitops, mean_bits" in validation.text_of(
        outcome
    )
    assert json.loads(validation.json_of(outcome))["unverified"] == outcome.unverified
    (entry,) = entries_of(outcome)
    assert entries.as_json(entry)["unverified"] == ["exported_bytes", "bitops", "mean_bits"]
    assert entries.from_json(entries.as_json(entry)) == entry
    (file,) = runs(folder)
    edit(file, lambda record: record.update(mean_bits=1.0, bitops=1.0, bitops_8bit=1.0), slice(-1, None))
    resum(folder)
    told = problems(folder)
    for words in ("mean_bits: expected from 2.0 to 8.0, by Static", "bitops: expected from ", "bitops_8bit: expected "):
        assert any(line.startswith(f"{name_of(file)}: line 2.{words}") for line in told), (words, told)


def test_weights_of_ones_own_go_by_their_files_name(tmp_path):
    """Where they lie on their author's machine is in the records of the sweep, and nowhere in bundle or entry."""
    facts, hp = facts_of(DATASET), hparams.resolve_hparams("ERM", DATASET)
    featurizer = networks.make_featurizer((facts.channels, 8, 8), hp)
    file = tmp_path / "home" / "alice" / "mine.safetensors"
    file.parent.mkdir(parents=True)
    save_file(featurizer.state_dict(), file)
    folder = one_run(tmp_path, "ERM", weights=str(file))
    (sweep_run,) = (tmp_path / "sweep").glob("*/results.jsonl")
    assert "alice" in sweep_run.read_text()
    (records,) = runs(folder)
    kept, before = (json.loads(one.read_text().splitlines()[0]) for one in (records, sweep_run))
    assert kept["args"].keys() == before["args"].keys() and kept["hparams"].keys() == before["hparams"].keys()
    assert kept["hparams"]["weights"] == "./mine.safetensors" == json.loads(kept["args"]["hparams"])["weights"]
    assert {name for name in kept["args"] if kept["args"][name] != before["args"][name]} == {"hparams", "output_dir"}
    (entry,) = entries_of(validation.validate(folder))
    whole = "".join(one.read_text() for one in (records, folder / "submission.json")) + entries.text_of(entry)
    assert "alice" not in whole and str(tmp_path) not in whole
    assert entry.settings["weights"] == "./mine.safetensors" and entry.protocol["weights"] == "mine.safetensors"
    # What DomainBed's reader takes from records is there.
    (loaded,) = load_records_of(folder, tmp_path / "read")
    assert loaded.args["output_dir"] is None and loaded.hparams["weights"] == "./mine.safetensors"
    # Nor does a bundle pass that was made by hand.
    edit(records, lambda record: record["hparams"].update(weights=str(file)))
    resum(folder)
    assert_told(
        folder, name_of(records), "line 1.hparams.weights", '"./mine.safetensors", no path of a machine', "alice"
    )


def load_records_of(folder: Path, target: Path):
    """A bundle's records, read as those of a sweep."""
    for file in runs(folder):
        (target / file.stem).mkdir(parents=True)
        shutil.copy(file, target / file.stem / "results.jsonl")
    return records.load_records(target, warn=pytest.fail)


@pytest.mark.parametrize(
    "name, value, kept",
    [
        ("weights", "imagenet", "imagenet"),
        ("weights", "none", "none"),
        ("weights", "/mnt/alice/none", "./none"),
        ("weights", "runs/alice/mine.pth", "./mine.pth"),
        ("weights", "C:\\Users\\alice\\mine.pth", "./mine.pth"),
        ("weights", "./mine.pth", "./mine.pth"),
        ("teacher", "~alice/teacher/", "./teacher"),
        ("teacher", "../alice/t.pth", "./t.pth"),
        ("teacher", "\\\\server\\alice\\t.pth", "./t.pth"),
        ("teacher", "file:///mnt/alice/t.pth", "./t.pth"),
        ("teacher", "/", "./folder"),
        ("backbone", "hf_hub:timm/resnet50.a1_in1k", "hf_hub:timm/resnet50.a1_in1k"),
        ("objective", "ERM", "ERM"),
        ("sparsity", 0.5, 0.5),
    ],
)
def test_paths_of_a_machine_are_told_from_names(name, value, kept):
    assert without_places({name: value}) == {name: kept}
    assert without_places({name: kept}) == {name: kept}


def test_the_numbers_are_those_of_the_table(main, made, sweep):
    table = json.loads(main("collect", "--input_dir", sweep, "--format", "json").stdout)
    claimed = json.loads((made / "submission.json").read_text())["datasets"][DATASET]["results"]
    assert set(claimed) == {"training-domain", "oracle"}
    for one in table["tables"]:
        (row,) = [row for row in one["rows"] if row["label"] == ROW]
        cell = claimed[one["selection"]]["cells"][0]
        assert cell["accuracy"] == row["cells"][0]["accuracy"] and cell["std_err"] == row["cells"][0]["std_err"]
        assert [trial["step"] for trial in cell["trials"]] == [c["step"] for c in row["cells"][0]["choices"]]
        assert claimed[one["selection"]]["costs"] == row["costs"]


def test_validate_and_add_and_supersede(main, made, tmp_path):
    told = main("leaderboard", "validate", made).stdout
    assert "tier records-verified" in told and "open track" in told
    assert "a checkpoint every 2 steps, closed takes 100; 2 trials, closed takes at least 3" in told
    report = json.loads(main("leaderboard", "validate", made, "--json").stdout)
    assert report["tier"] == "records-verified" and report["problems"] == []
    folder = tmp_path / "entries"
    told = main("leaderboard", "add", made, "--entries_dir", folder).stdout.splitlines()
    command = f"domainbed-sfp leaderboard add {made} --rerun 1 --entries_dir {folder}"
    assert told[-1] == f"`{command}` trains runs again and raises it to rerun-verified or higher; an earlier `validate --rerun` does not count."  # fmt: skip
    (entry,) = store.read_all(folder)
    assert (folder / DATASET / "Magnitude_sparsity=0.5.json").is_file()
    assert "Open track: 2 trials, closed takes at least 3." in entry.notes
    assert entry.name == ROW and entry.tier == "records-verified" and entry.track == "open" and not entry.transductive
    assert entry.bundle == hashlib.sha256((made / "SHA256SUMS").read_bytes()).hexdigest()
    result = entry.results["training-domain"]
    assert result.cells[0].environment == "95%" and result.cells[1] is None and result.average is None
    assert len(result.cells[0].trials) == 2 and 0 < result.costs["sparsity"] < 1
    assert entries.from_json(entries.as_json(entry)) == entry
    again = main("leaderboard", "add", made, "--entries_dir", folder, check=False)
    assert again.returncode == 2 and again.stderr.endswith(
        f"this bundle is there already, at tier records-verified; `{command}` trains runs again and raises it to rerun-verified or higher\n"
    )
    # The command that was told does it.
    told = main(*shlex.split(command)[1:], "--rerun_seed", 3).stdout
    assert "does not count" not in told
    (entry,) = store.read_all(folder)
    assert entry.tier == "rerun-identical" and entry.rerun["seed"] == 3 and len(entry.rerun["cells"]) == 1
    assert entry.step_0 == {"runs": 4, "difference": 0.0} and entry.models is None and len(entry.runs) == 4
    assert entry.rerun["cells"][0]["agreement"] == "identical"
    current, old = store.read_all(folder, history=True)
    assert current == entry and old.superseded_by == entry.bundle and old.tier == "records-verified"


def test_a_rerun_as_json_is_one_document(main, made, copy):
    """Whether runs agree, disagree, or wait because the records are wrong."""
    report = json.loads(main("leaderboard", "validate", made, "--json").stdout)
    assert report["rerun"] is None and report["tier"] == "records-verified"
    assert report["computed"][DATASET] == {"step_0": {"runs": 4, "difference": 0.0}, "models": None, "rerun": None}
    report = json.loads(main("leaderboard", "validate", made, "--json", "--rerun", 1, "--rerun_seed", 3).stdout)
    again = report["rerun"]
    assert report["tier"] == "rerun-identical" and report["problems"] == []
    assert (again["outcome"], again["seed"], again["tolerance"]) == ("agreed", 3, 3.0)
    (name,) = again["runs"][DATASET]
    (cell,) = report["computed"][DATASET]["rerun"]["cells"]
    assert cell == {"run": name, "agreement": "identical", "difference": 0.0, "selected_difference": 0.0}
    # Records of another commit, of which one says what no computation gives.
    edit(copy / "records" / f"{name}.jsonl", lambda record: record.update(loss=50.0), slice(1, 2))
    for file in runs(copy):
        edit(file, lambda record: record.update(commit="0123456789ab"))
    edit_submission(copy, lambda document: document.update(commit="0123456789ab"))
    resum(copy)
    done = main("leaderboard", "validate", copy, "--json", "--rerun", 2, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["tier"] is None and report["problems"][0]["field"] == "line 2.loss"
    assert report["rerun"]["outcome"] == "disagreed"
    edit_submission(copy, lambda document: document.update(reference="mine"))
    done = main("leaderboard", "validate", copy, "--json", "--rerun", 1, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["rerun"]["outcome"] == "not computed" and report["rerun"]["runs"] == {}


def test_a_rerun_raises_only_the_data_sets_it_was_of(made):
    """Runs of one data set say nothing of another's."""
    outcome = validation.validate(made)
    outcome.submission["datasets"]["Other"] = outcome.submission["datasets"][DATASET]
    name = outcome.runs[0].name
    outcome.rerun = Rerun(0, 1, 3.0, {DATASET: [name], "Other": []}, [Recomputed(name)], {DATASET: 0.0})
    assert (outcome.tier_of(DATASET), outcome.tier_of("Other")) == ("rerun-identical", "records-verified")
    assert outcome.tier == "records-verified" and outcome.computed("Other")["rerun"] is None
    outcome.rerun.compared[0].agreement = "within tolerance"
    assert outcome.tier_of(DATASET) == "rerun-verified"
    outcome.unchecked.append("something")
    assert outcome.tier == outcome.tier_of(DATASET) == "self-reported"


def with_protocol(entry, field, value, there, here):
    """Another bundle's entry, under another protocol."""
    notes = tuple(note.replace(f"{there},", f"{here},") for note in entry.notes)
    return replace(entry, bundle="0" * 64, runs=(), protocol={**entry.protocol, field: value}, notes=notes)


def test_another_protocol_does_not_take_an_entrys_place(made, tmp_path):
    (entry,) = entries_of(validation.validate(made))
    store.write(tmp_path, entry)
    other = with_protocol(entry, "steps", 7, "5 steps", "7 steps")
    with pytest.raises(UserError, match=r"protocol\.steps \(5 there, 7 here\).*submit --name"):
        store.write(tmp_path, other)
    other = with_protocol(entry, "checkpoint_freq", 1, "every 2 steps", "every 1 steps")
    with pytest.raises(UserError, match=r"protocol\.checkpoint_freq \(2 there, 1 here\)"):
        store.write(tmp_path, other)
    with pytest.raises(UserError, match=r"entry: tier: expected one of .*, found \"best\""):
        entries.from_json({**entries.as_json(entry), "tier": "best"})


@pytest.mark.parametrize(
    "row, message",
    [("Magnitude", "has several rows"), ("Magnitud (sparsity=0.5)", "did you mean 'Magnitude (sparsity=0.5)'")],
)
def test_submit_names_the_rows(sweep, tmp_path, row, message):
    with pytest.raises(UserError) as error:
        submit(str(sweep), row, str(tmp_path / "b"))
    assert message in str(error.value) and list(tmp_path.iterdir()) == []


def test_submit_refuses_what_validation_would_refuse(main, sweep, tmp_path):
    other = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    (first, *_) = [run for run in sorted(other.iterdir()) if run.is_dir() and _sparsity(run) == 0.5]
    (first / "done").unlink()
    done = main("submit", "--input_dir", other, "--algorithm", ROW, "--output", tmp_path / "b", check=False)
    assert (
        done.returncode == 2 and "is not complete: Magnitude (sparsity=0.5): 1 job missing (incomplete)" in done.stderr
    )
    (first / "done").write_text("done")
    shutil.rmtree(first / "masks")
    done = main("submit", "--input_dir", other, "--algorithm", ROW, "--output", tmp_path / "b", check=False)
    if done.returncode:  # where a selection rule chooses the run
        assert "is missing: the masks of step" in done.stderr
    shutil.rmtree(first)
    done = main("submit", "--input_dir", other, "--algorithm", ROW, "--output", tmp_path / "c", check=False)
    assert done.returncode == 2 and "(not started)" in done.stderr and not (tmp_path / "c").exists()
    done = main(
        "submit", "--input_dir", sweep, "--algorithm", ROW, "--output", tmp_path / "d", "--name", "a/b", check=False
    )
    assert done.returncode == 2 and "name: expected letters a to z, digits" in done.stderr


def test_submit_tells_of_edited_records_at_once(main, sweep, tmp_path):
    other = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    (first, *_) = [run for run in sorted(other.iterdir()) if run.is_dir() and _sparsity(run) == 0.5]
    edit(first / "results.jsonl", lambda record: record.update(env0_in_acc=0.99999))
    done = main("submit", "--input_dir", other, "--algorithm", ROW, "--output", tmp_path / "b", check=False)
    assert done.returncode == 2 and "would be rejected" in done.stderr and "multiple of 1/480" in done.stderr
    assert not (tmp_path / "b").exists() and not (tmp_path / ".b.part").exists()


def _sparsity(run: Path) -> float:
    return json.loads((run / "results.jsonl").read_text().splitlines()[0])["hparams"]["sparsity"]


# tampering, with the sums made anew -----------------------------------------------------------------------------------


def test_a_run_left_out(copy):
    runs(copy)[3].unlink()
    resum(copy)
    grid = f"{DATASET}, the grid"
    assert_told(copy, "records", grid, "a run with test_envs [0], hparams_seed 1, trial_seed 1", "none")


def test_a_bad_trial_left_out_and_not_declared(copy):
    """Only trial 1 is kept, and the submission speaks of no other."""
    for file in runs(copy)[:2]:
        file.unlink()
    edit_submission(copy, lambda d: d["datasets"][DATASET]["protocol"].update(trial_seeds=[1]))
    resum(copy)
    told = assert_told(copy, "submission.json", f"datasets.{DATASET}.protocol.trial_seeds", "[0]: all from 0 on", "[1]")
    assert any(line.startswith("records: ") for line in told)


def test_a_run_twice(copy):
    shutil.copy(runs(copy)[0], copy / "records" / "zz.jsonl")
    resum(copy)
    assert_told(copy, "records/zz.jsonl", "line 1.args", "a job that no other file holds", name_of(runs(copy)[0]))


def test_a_trial_that_is_a_copy_of_another(copy):
    """The records of trial 0 stand for trial 1 as well; sums, seeds, drawn hparams and times are made to fit."""
    source, target = runs(copy)[0], runs(copy)[2]
    own = json.loads(target.read_text().splitlines()[0])
    shutil.copy(source, target)
    edit(target, lambda r: r.update(args=own["args"], hparams=own["hparams"], wall_time=r["wall_time"] + 1))
    resum(copy)
    told = [line for line in problems(copy) if "accuracies: expected numbers of its own" in line]
    assert len(told) == 1 and "found the same in every record" in told[0]


def test_accuracies_of_unseen_splits_that_lie_too_far_apart(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(env0_in_acc=1.0, env0_out_acc=24 / OUT), slice(-1, None))
    resum(copy)
    assert_told(copy, name_of(file), "line 3.env0_in_acc", "about 0.2017", "1.0")


def test_a_checkpoint_called_final_at_another_sparsity_than_asked_for(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(final_compression=True))
    resum(copy)
    told = [
        line
        for line in problems(copy)
        if name_of(file) in line and ".final_compression: expected false: Magnitude is at its final" in line
    ]
    assert len(told) == 1


def test_the_name_of_another_algorithm_is_taken(sweep, tmp_path, copy):
    for name in ("SFP", "sfp (kappa=2)"):
        with pytest.raises(UserError, match=r"not taken for that of algorithm SFP.*; this is a row of Magnitude"):
            submit(str(sweep), ROW, str(tmp_path / "other"), name)
    edit_submission(copy, lambda document: document.update(name="SFP"))
    resum(copy)
    assert_told(copy, "submission.json", "name", "not taken for that of algorithm SFP", "SFP")


def test_two_versions_of_an_algorithms_package(copy):
    for file, code in zip(runs(copy), ("0123456789ab", "ba9876543210")):
        edit(file, lambda record, code=code: record.update(code=code))
    resum(copy)
    assert_told(copy, "records", "code", "one version of the algorithm's package", "3")


def test_test_environments_in_another_order_or_all(copy):
    edit(runs(copy)[0], lambda record: record["args"].update(test_envs=[1, 0]))
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.args.test_envs", "rising numbers", "[1, 0]")


def test_numbers_that_the_method_does_not_have(copy):
    """BitOPs of a network that is not quantized would stand at the front of the plot; a digest would rank it apart."""
    for file in runs(copy):
        edit(file, lambda record: record.update(bitops=1.0, data_digest="mine"))
    edit(runs(copy)[1], lambda record: record["args"].update(uda_holdout_fraction=0.5))
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.data_digest", "null", "mine")
    told = problems(copy)
    assert any("args.uda_holdout_fraction: expected " in line for line in told)
    edit(runs(copy)[1], lambda record: record["args"].update(uda_holdout_fraction=0.0))
    assert any(
        ": line 3.bitops: expected no such field: Magnitude quantizes nothing, found 1.0" in line
        for line in problems(copy)
    )


def test_degraded_copies_of_the_test_environment_may_be_described(copy):
    case = {"degradation": "blur", "severity": 1, "samples": 100, "accuracy": 0.5}
    for file in runs(copy):
        edit(file, lambda record: record.update(env0_degraded=[case]), slice(2, 3))
    resum(copy)
    assert validation.validate(copy).tier == "records-verified"


def test_a_record_left_out(copy):
    file = runs(copy)[0]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[2])
    resum(copy)
    assert_told(copy, name_of(file), "line 2.step", "2 (every 2 of 5 steps and the last)", "4")


def test_a_run_trained_longer(copy):
    """Another number of steps in one run, records and all."""
    file = runs(copy)[2]
    edit(file, lambda record: record["args"].update(steps=6))
    edit(file, lambda record: record.update(step=5, epoch=5 / (IN / 16)), slice(2, 3))
    resum(copy)
    told = assert_told(copy, name_of(file), "protocol, steps", "5 as in", "6")
    assert any("line 3.step: expected 4 (every 2 of 6 steps" in line for line in told)


def test_an_hparam_out_of_range(copy):
    for file in runs(copy):
        edit(file, lambda record: record["args"].update(hparams='{"batch_size": 16, "sparsity": 1.5}'))
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.args.hparams", "hparams of Magnitude, in their ranges", "1.5")


def test_an_hparam_that_does_not_exist(copy):
    edit(runs(copy)[0], lambda record: record["args"].update(hparams='{"batch_size": 16, "sparsit": 0.5}'))
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.args.hparams", "hparams of Magnitude", "unknown hparam")


def test_an_hparam_that_was_not_drawn(copy):
    """The learning rate of hparams seed 1 is drawn; a better one was put in."""
    file = runs(copy)[1]
    drawn = json.loads(file.read_text().splitlines()[0])["hparams"]["lr"]
    edit(file, lambda record: record["hparams"].update(lr=0.005))
    resum(copy)
    words = f"{drawn!r}, the draw of hparams_seed 1 and trial_seed 0"
    assert_told(copy, name_of(file), "line 1.hparams.lr", words, "0.005")


def test_an_override_of_one_run_only(copy):
    file = runs(copy)[1]
    edit(
        file,
        lambda r: (
            r["args"].update(hparams='{"batch_size": 16, "lr": 0.005, "sparsity": 0.5}'),
            r["hparams"].update(lr=0.005),
        ),
    )
    resum(copy)
    first = sorted(runs(copy))[0]
    where, found = (file, "0.005") if file != first else (sorted(runs(copy))[1], "0.5}")
    assert_told(copy, name_of(where), "line 1.args.hparams", f"as in {name_of(first)}", found)


def test_a_seed_of_choice(copy):
    file = runs(copy)[0]
    seed = json.loads(file.read_text().splitlines()[0])["args"]["seed"]
    edit(file, lambda record: record["args"].update(seed=7))
    resum(copy)
    assert_told(copy, name_of(file), "line 1.args.seed", f"{seed}, which is seed_hash(", "7")


@pytest.mark.parametrize("field, count", [("env0_in_acc", IN), ("env1_out_acc", OUT)])
def test_an_accuracy_that_the_split_cannot_give(copy, field, count):
    file = runs(copy)[0]
    edit(file, lambda record: record.update({field: 0.5001}), slice(1, 2))
    resum(copy)
    assert_told(copy, name_of(file), f"line 2.{field}", f"a multiple of 1/{count}", "0.5001")


def test_a_possible_accuracy_changes_the_results(copy):
    """One that the split can give is found by the results that it contradicts."""
    for file in runs(copy):
        edit(file, lambda record: record.update(env0_in_acc=1.0))
    resum(copy)
    field = f"datasets.{DATASET}.results.training-domain.cells[0].accuracy"
    assert_told(copy, "submission.json", field, "100.0, from the records", "")


def test_a_result_better_than_its_records(copy):
    path = f"datasets.{DATASET}.results.oracle.cells[0].accuracy"
    true = json.loads((copy / "submission.json").read_text())["datasets"][DATASET]["results"]["oracle"]["cells"][0]

    def better(document):
        document["datasets"][DATASET]["results"]["oracle"]["cells"][0]["accuracy"] += 1

    edit_submission(copy, better)
    resum(copy)
    assert_told(copy, "submission.json", path, repr(true["accuracy"]), repr(true["accuracy"] + 1))


def test_a_standard_error_too_small(copy):
    def smaller(document):
        document["datasets"][DATASET]["results"]["oracle"]["cells"][0]["std_err"] = 0.001

    edit_submission(copy, smaller)
    resum(copy)
    assert_told(
        copy, "submission.json", f"datasets.{DATASET}.results.oracle.cells[0].std_err", "from the records", "0.001"
    )


def test_selection_by_the_test_environment(copy):
    """The claimed checkpoint is the best on the test environment, not on validation."""
    file = runs(copy)[0]
    for one in runs(copy)[:2]:
        # Validation prefers the last record, the test environment the one before it.
        edit(
            one, lambda r: r.update(env1_out_acc=1 / OUT, env2_out_acc=1 / OUT, env0_in_acc=0.0, final_compression=True)
        )
    edit(file, lambda record: record.update(env1_out_acc=110 / OUT, env2_out_acc=110 / OUT), slice(2, 3))
    edit(file, lambda record: record.update(env0_in_acc=470 / IN), slice(1, 2))

    def peek(document):
        trial = document["datasets"][DATASET]["results"]["training-domain"]["cells"][0]["trials"][0]
        trial.update(accuracy=100 * 470 / IN, step=2, hparams_seed=0, run=file.stem)

    edit_submission(copy, peek)
    resum(copy)
    path = f"datasets.{DATASET}.results.training-domain.cells[0].trials[0].step"
    told = assert_told(
        copy, "submission.json", path, "4, from the records", "2 (chosen by the highest accuracy on the test"
    )
    assert any("which training-domain selection must not see" in line for line in told)


def test_a_sparsity_that_the_masks_do_not_have(copy):
    for file in runs(copy):
        edit(file, lambda record: record.update(sparsity=0.9), slice(2, 3))
    resum(copy)
    told = problems(copy)
    assert any(
        ": line 3.sparsity: expected 0.5 of the channels, by masks/" in line and "found 0.9" in line for line in told
    )


def test_costs_that_the_masks_do_not_have(copy):
    for file in runs(copy):
        edit(
            file, lambda r: r.update(macs=10, dense_macs=r["dense_macs"] + 1, exported_bytes=r["exported_bytes"] - 4),
            slice(2, 3),
        )  # fmt: skip
    resum(copy)
    told = problems(copy)
    assert any(": line 3.exported_bytes: expected " in line and "by masks/" in line for line in told)
    assert any(": line 3.macs: expected 1," in line and "by masks/" in line and "found 10" in line for line in told)
    assert any(": line 3.dense_macs: expected 6,010,112, by" in line and "6,010,113" in line for line in told)


def test_more_parameters_left_than_there_are(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(surviving_parameters=10**9), slice(0, 1))
    resum(copy)
    assert_told(copy, name_of(file), "line 1.surviving_parameters", "at most parameters, 373,002", "1,000,000,000")


def test_masks_of_another_run(copy):
    """All masks are exchanged for ones that are sparser: their digests are in the records."""
    for file in (copy / "masks").iterdir():
        masks = mask_files.unpack(file.read_bytes())
        next(iter(masks.values()))[0] = False
        file.write_bytes(mask_files.pack(masks))
    resum(copy)
    (name, *_) = [file.stem for file in (copy / "masks").iterdir()]
    assert_told(copy, f"masks/{name}.safetensors", "digest of the masks", name, "")


def test_masks_of_another_network(copy):
    """Digest and sums are right, shapes are not."""
    masks = {"featurizer.conv1.weight": torch.ones(7, 3, dtype=torch.bool)}
    for file in list((copy / "masks").iterdir()):
        file.unlink()
    name = mask_files.keep(copy / "masks", masks)
    for file in runs(copy):
        edit(file, lambda record: record.update(masks=name), slice(2, 3))
    resum(copy)
    assert any(line.startswith(f"masks/{name}.safetensors: mask featurizer.conv1.weight: expected a mask of shape [") and "found shape [7, 3]" in line for line in problems(copy))  # fmt: skip


def test_masks_missing_and_masks_too_many(copy):
    (first, *_) = (copy / "masks").iterdir()
    first.rename(copy / "masks" / ("0" * 64 + ".safetensors"))
    resum(copy)
    assert_told(copy, f"masks/{first.name}", "", "the masks of records/", "no file")
    assert_told(
        copy, f"masks/{'0' * 64}.safetensors", "", "masks of a checkpoint that a selection rule chooses", "others"
    )


def test_environments_renamed(copy):
    for file in runs(copy):
        edit(file, lambda record: record.update(environments=["10%", "90%", "95%"]))
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.environments", '["95%", "90%", "10%"]', '["10%", "90%", "95%"]')


def test_header_and_standing(copy):
    for file in runs(copy):
        edit(file, lambda record: record.update(standing="reference"))
    edit_submission(
        copy,
        lambda d: d.update(
            transductive=True, standing="reference", reference="mine", commit="1234567", package="domainbed_sfp 9"
        ),
    )
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.standing", "published", "reference")
    assert_told(copy, "submission.json", "transductive", "false", "true")
    assert_told(copy, "submission.json", "reference", "Zhu & Gupta", "mine")
    assert_told(copy, "submission.json", "package", "domainbed_sfp 0", "domainbed_sfp 9")
    assert_told(copy, "submission.json", "commit", "", "1234567")


def test_never_compressed_and_a_wrong_epoch(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(final_compression=False))
    edit(file, lambda record: record.update(epoch=3.0), slice(0, 1))
    resum(copy)
    assert_told(
        copy,
        name_of(file),
        "line 3.final_compression",
        "true: Magnitude is at its final compression from step 4 on",
        "false",
    )
    assert_told(copy, name_of(file), "line 1.epoch", "0.0", "3.0")


def test_records_of_two_algorithms(copy):
    file = sorted(runs(copy))[-1]
    edit(file, lambda record: record["args"].update(algorithm="Taylor"))
    resum(copy)
    assert_told(copy, name_of(file), "line 1.args.algorithm", '"Magnitude" as in records/', '"Taylor"')


def test_an_algorithm_that_is_not_installed_is_self_reported(made, monkeypatch):
    monkeypatch.delitem(registry.ALGORITHMS.entries, "Magnitude")
    outcome = validation.validate(made)
    assert outcome.tier == "self-reported" and "unknown algorithm 'Magnitude'" in outcome.unchecked[0]
    # Not one of its costs has been counted anew.
    assert entries_of(outcome)[0].unverified == ("sparsity", "parameters", "surviving_parameters", "dense_macs", "macs", "exported_bytes")  # fmt: skip
    assert "not checked: hparams, masks and costs of Magnitude" in validation.text_of(outcome)


# files ----------------------------------------------------------------------------------------------------------------


def test_a_record_edited_after_the_sums(copy):
    file = runs(copy)[0]
    true = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(file, lambda record: record.update(loss=0.1))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert_told(copy, name_of(file), "SHA-256", f"{true} (SHA256SUMS)", found)


def test_links_folders_unknown_and_executable_files(copy, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (copy / "records" / "link.jsonl").symlink_to(tmp_path / "secret")
    (copy / "deep").mkdir()
    (copy / "setup.py").write_text("raise SystemExit(1)")
    os.mkfifo(copy / "records" / "pipe.jsonl")
    os.link(tmp_path / "secret", copy / "records" / "hard.jsonl")
    os.chmod(
        runs_file := next(
            file for file in sorted((copy / "records").iterdir()) if file.stem not in ("link", "pipe", "hard")
        ),
        0o755,
    )
    assert_told(copy, "records/link.jsonl", "", "a plain file", "a symbolic link")
    assert_told(copy, "deep", "", "submission.json, SHA256SUMS", "a folder")
    assert_told(copy, "setup.py", "", "submission.json, SHA256SUMS", "a file that does not belong there")
    assert_told(copy, "records/pipe.jsonl", "", "a plain file", "a device, pipe or socket")
    assert_told(copy, "records/hard.jsonl", "", "a file of its own", "a hard link")
    # A file system without such bits shows all files so, and nothing of a bundle is ever executed.
    assert not any(name_of(runs_file) in line and "executed" in line for line in problems(copy))


def test_a_file_that_changes_while_it_is_read(copy):
    found = tree.read_tree(copy)
    edit_submission(copy, lambda document: document.update(name="Other"))
    with pytest.raises(OSError, match="has changed while"):
        found.read("submission.json")


def test_a_folder_that_is_a_link(made, copy, tmp_path):
    shutil.move(copy / "records", tmp_path / "elsewhere")
    (copy / "records").symlink_to(tmp_path / "elsewhere")
    assert_told(copy, "records", "", "a plain file", "a symbolic link")
    (tmp_path / "link").symlink_to(made)
    with pytest.raises(UserError, match="expected the folder"):
        validation.validate(tmp_path / "link")


def test_names_that_lead_out_of_the_bundle(copy):
    with open(copy / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n{'1' * 64}  /etc/passwd\nnonsense\n")
    lines = len((copy / "SHA256SUMS").read_text().splitlines())
    assert_told(copy, "SHA256SUMS", f"line {lines - 2}", "the name of a file of the bundle", "../../etc/passwd")
    assert_told(copy, "SHA256SUMS", f"line {lines - 1}", "the name of a file of the bundle", "/etc/passwd")
    assert_told(copy, "SHA256SUMS", f"line {lines}", "64 hexadecimal digits", "nonsense")


def test_an_oversized_file(copy):
    file = copy / "records" / "big.jsonl"
    file.touch()
    os.truncate(file, 2**26 + 1)  # sparse: nothing is written
    assert_told(copy, "records/big.jsonl", "", "at most 67,108,864 bytes", "67,108,865")


@pytest.mark.parametrize(
    "folder, count, size, where, words",
    [
        ("records", 17, 2**26, "records", "at most 1,073,741,824 bytes in all files together, found 1,140,850,688"),
        ("masks", 129, 2**26, "bundle", "at most 8,589,934,592 bytes in all files together, found 8,657,"),
    ],
)
def test_a_bundle_that_is_too_large_is_not_read(tmp_path, monkeypatch, folder, count, size, where, words):
    """Sixty-four megabytes are allowed of a file, but not of all files; the sizes alone say so."""
    (root := tmp_path / "bundle").mkdir()
    (root / folder).mkdir()
    for number in range(count):
        name = f"{number}.jsonl" if folder == "records" else f"{number:064x}.safetensors"
        (root / folder / name).touch()
        os.truncate(root / folder / name, size)  # sparse: nothing is written
    (root / "submission.json").write_text("{}")
    monkeypatch.setattr(tree, "open_plain", lambda path: pytest.fail(f"{path} was opened"))
    (line,) = problems(root)
    assert line.startswith(f"{root if where == 'bundle' else where}: expected {words}")


def peak_of(folder: Path) -> tuple[list[str], int]:
    """The problems of a bundle, and the most bytes that Python held while it was validated."""
    tracemalloc.start()
    try:
        return problems(folder), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_without_end_is_not_held(copy):
    file = runs(copy)[0]
    with open(file, "a") as out:
        out.write('{"x": "' + 32 * 2**20 * "y")
    resum(copy)
    told, peak = peak_of(copy)
    assert f"{name_of(file)}: line 4: expected at most 262,144 bytes, found more" in told
    assert peak < 16 * 2**20


def test_records_repeat_in_memory_only_what_differs(copy):
    """Five hundred records that repeat a text of 15 kB hold it once."""
    file = runs(copy)[0]
    record = json.loads(file.read_text().splitlines()[-1])
    record["args"]["hparams"] = json.dumps({**json.loads(record["args"]["hparams"]), "note": 15_000 * "x"})
    with open(file, "w") as out:
        for step in range(500):
            out.write(json.dumps({**record, "step": step}) + "\n")
    resum(copy)
    told, peak = peak_of(copy)
    assert any("hparams of Magnitude" in line for line in told) and file.stat().st_size > 7 * 2**20
    assert peak < 5 * 2**20, peak


def test_values_without_end(copy, monkeypatch):
    """Numbers take far more memory than text; no run has so many."""
    monkeypatch.setattr(layout, "MOST_VALUES", 2000)
    for file in runs(copy):
        edit(file, lambda record: record.update({f"x{n}": n for n in range(800)}))
    resum(copy)
    told = problems(copy)
    first = min(file.name for file in runs(copy))
    assert f"records/{first}: line 3: expected at most 2,000 values in all records, found more" in told
    monkeypatch.undo()
    edit(runs(copy)[0], lambda record: record.update({f"x{n}": n for n in range(1000)}))
    assert any(
        line.startswith(name_of(runs(copy)[0]) + ": line 1: expected at most 1,000 fields") for line in problems(copy)
    )


def test_names_without_end(copy):
    """Every record has fields of its own: their names would be most of what is held."""
    file = runs(copy)[0]
    edit(file, lambda record: record.update({f"x{record['step']}_{n}": n for n in range(900)}))
    resum(copy)
    assert f"{name_of(file)}: line 3: expected at most 2,000 names in all records, found more" in problems(copy)


def test_more_runs_than_the_grid_has_are_not_read(copy, monkeypatch):
    whole = runs(copy)[0].read_bytes()
    for number in range(5):
        (copy / "records" / f"more{number}.jsonl").write_bytes(whole)
    resum(copy)
    monkeypatch.setattr(tree.Tree, "lines", lambda tree, name: pytest.fail(f"{name} was read"))
    assert problems(copy) == ["records: expected 4 files, one for each run of the protocol's grid, found 9"]


def test_a_list_of_problems_has_an_end(copy, monkeypatch):
    monkeypatch.setattr(validation, "MOST_TOLD", 7)
    for file in runs(copy):
        edit(file, lambda record: record.update(env0_in_acc=0.50001, env1_in_acc=0.50001, epoch=9.0))
    resum(copy)
    assert len(problems(copy)) == 7


def masks_file(tensors: dict, shapes: str, data: bytes) -> bytes:
    """A safetensors file whose header may say anything."""
    header = json.dumps({"__metadata__": {"shapes": shapes}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header + data


def one_mask(shape: list[int], size: int, **changes) -> tuple[dict, str]:
    return {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size], **changes}}, json.dumps({"w": shape})


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "a header of 0 bytes in a file of 0"),
        ((2**40).to_bytes(8, "little") + b"{}", "a header of 1,099,511,627,776 bytes in a file of 10"),
        (masks_file({}, "[" * 100_000, b""), "nested too deeply"),
        (masks_file({"w": [[[]]]}, "{}", b""), "header.w: expected an object, found [[[]]]"),
        (masks_file(*one_mask([8], 1, dtype="F32"), b"\0"), 'header.w.dtype: expected "U8", found "F32"'),
        (masks_file(*one_mask([2**30, 2**30], 1), b"\0"), "'w' is not one bit for each of [1073741824, 1073741824]"),
        (masks_file(*one_mask([8, -1], 1), b"\0"), "shapes.w[1]: expected at least 1, found -1"),
        (masks_file(*one_mask([8], 1, data_offsets=[1, 2]), b"\0\0"), "from byte 0 on"),
        (masks_file(*one_mask([8], 1), b"\0" * 9), "9 bytes of masks, the header declares 1"),
        (masks_file(one_mask([8], 1)[0], "{}", b"\0"), "do not name the same masks: 'w'"),
        (b"\2" + b"\0" * 7 + b"[]", "header: expected an object, found []"),
    ],
)  # fmt: skip
def test_headers_of_masks_are_read_before_the_masks(copy, monkeypatch, data, words):
    monkeypatch.setattr(mask_files, "unpack", lambda data: pytest.fail("the masks were unpacked"))
    names = sorted((copy / "masks").iterdir())
    for file in names:
        file.write_bytes(data)
    resum(copy)
    for file in names:
        told = [line for line in problems(copy) if line.startswith(f"masks/{file.name}: ")]
        assert len(told) == 1 and "masks, one bit a weight" in told[0] and words in told[0], told


def test_masks_that_no_network_has_are_not_unpacked(copy, monkeypatch):
    """Shapes and sums fit each other: only the network says that there is no such parameter, or not so many."""
    monkeypatch.setattr(mask_files, "unpack", lambda data: pytest.fail("the masks were unpacked"))
    names = sorted((copy / "masks").iterdir())
    for file in names:
        file.write_bytes(masks_file(*one_mask([1000, 8000], 10**6), bytes(10**6)))
    resum(copy)
    words = "at most 373,002 weights, the parameters of records/"
    assert any(f"masks/{names[0].name}: masks: expected {words}" in line for line in problems(copy))
    for file in names:
        file.write_bytes(masks_file(*one_mask([8], 1), b"\0"))
    resum(copy)
    told = problems(copy)
    assert f"masks/{names[0].name}: mask w: expected a parameter that is masked by Magnitude, found shape [8]" in told


def test_a_network_that_is_too_large_is_not_built(made, monkeypatch):
    monkeypatch.setattr(layout, "MOST_PARAMETERS", 300_000)
    monkeypatch.setattr(costs, "count_positions", lambda *args: pytest.fail("the network was built"))
    words = "line 1.hparams.backbone: expected a network of at most 300,000 parameters, found 371,712"
    assert any(line.startswith("records/") and line.endswith(words) for line in problems(made))


def test_what_pack_writes_has_the_header_that_is_read():
    masks = {"a": torch.ones(3, 5, dtype=torch.bool), "b.c": torch.zeros(16, dtype=torch.bool)}
    assert mask_headers.shapes_of(mask_files.pack(masks)) == {"a": (3, 5), "b.c": (16,)}


def test_a_pickle_is_not_opened(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    name = next((copy / "masks").iterdir())
    name.write_bytes(pickle.dumps(Evil()))
    resum(copy)
    assert_told(copy, f"masks/{name.name}", "", "masks, one bit a weight", "not a file of masks")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "text, field, expected, found",
    [
        ("{not json", "", "a JSON document", "Expecting"),
        ('{"format": 1, "format": 1}', "", "a JSON document", "one name twice"),
        ("[" * 100_000, "", "a JSON document", "nested too deeply"),
        ('{"format": NaN}', "", "a JSON document", "NaN is not JSON"),
        ('{"format": ' + "[" * 60 + "]" * 60 + "}", "", "a JSON document", "nested too deeply"),
        ('{"name": "\\ud800"}', "", "a JSON document", "lone surrogate"),
        ('{"name": "SFP\\n"}', "name", "letters a to z", r'"SFP\n"'),
        ('{"format": 2}', "format", "1", "2"),
        ('{"commit": 1}', "commit", "text or null", "1"),
        ("[]", "", "object", "[]"),
    ],
)
def test_a_submission_that_is_not_one(copy, text, field, expected, found):
    (copy / "submission.json").write_text(text)
    resum(copy)
    assert_told(copy, "submission.json", field, expected, found)


def test_a_record_that_is_not_one(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(env0_in_acc="x", sparsity=-1, penalty=["x"]), slice(0, 1))
    with open(file, "a") as out:
        out.write("{]\n")
    resum(copy)
    assert_told(copy, name_of(file), "line 1.env0_in_acc", "number", '"x"')
    assert_told(copy, name_of(file), "line 1.sparsity", "at least 0", "-1")
    assert_told(copy, name_of(file), "line 1.penalty", "number or null", '["x"]')
    assert_told(copy, name_of(file), "line 4", "a JSON object", "Expecting")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["hparams"].update(batch_size=10**400),
        lambda record: record.update(epoch=10**400),
        lambda record: record.update(exported_bytes=10**400),
        lambda record: record["environment"].pop("domainbed_sfp"),
        lambda record: record["args"].update(steps=10**400, checkpoint_freq=10**400),
        lambda record: record["args"].update(test_envs=[0, 1, 2]),
        lambda record: record["args"].update(hparams='{"batch_size": ' + "[" * 60 + "]" * 60 + "}"),
    ],
    ids=["batch_size", "epoch", "cost", "fingerprint", "steps", "test_envs", "hparams"],
)
def test_values_that_no_run_has_are_told(copy, change):
    for file in runs(copy):
        edit(file, change)
    resum(copy)
    assert any(line.startswith("records/") for line in problems(copy))
    validation.text_of(validation.validate(copy))


def test_files_of_nothing_but_problems_are_told_in_part(copy):
    """A list that jsonschema would compare with itself, item by item; lines, fields and sums without end."""
    mixed = [[n] if n % 2 else str(n) for n in range(20_000)]
    edit_submission(copy, lambda d: d["datasets"][DATASET]["protocol"].update(test_envs=mixed))
    runs(copy)[0].write_text("{}\n" * 20_000)
    with open(copy / "SHA256SUMS", "a") as file:
        file.write("x\n" * 20_000)
    told = problems(copy)
    assert len(told) < 2_000 and {line.split(":")[0] for line in told} >= {"submission.json", "SHA256SUMS"}


def test_names_that_would_steer_a_terminal_are_spelled(made):
    outcome = validation.validate(made)
    outcome.submission["datasets"][DATASET]["results"]["oracle"]["cells"][0]["environment"] = "\x1b[2J\u202e"
    text = validation.text_of(outcome)
    assert "\x1b" not in text and r"\x1b[2J\u202e" in text


def test_all_problems_are_told_at_once(copy):
    one, two = runs(copy)[0], runs(copy)[3]
    edit(one, lambda record: record["args"].update(seed=7))
    edit(one, lambda record: record.update(env0_in_acc=0.50001), slice(0, 1))
    two.unlink()
    told = problems(copy)
    for part in ("args.seed", "line 1.env0_in_acc", "the grid", "SHA-256", f"{name_of(two)}: expected a file"):
        assert any(part in line for line in told), (part, told)


def test_an_empty_folder_and_none(tmp_path, main):
    told = problems(tmp_path)
    assert {line.split(":")[0] for line in told} == {"submission.json", "SHA256SUMS", "records"}
    done = main("leaderboard", "validate", tmp_path / "none", check=False)
    assert done.returncode == 2 and "expected the folder" in done.stderr
    assert main("leaderboard", "add", tmp_path, check=False).returncode == 1


FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FUZZ
@given(data=st.data())
def test_flipped_bytes_never_validate(made, data):
    """In any file, whatever is flipped: no traceback, and no bundle that passes."""
    files = sorted(file for file in made.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3, unique=True)):
        flipped[place] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(flipped)
        assert validation.validate(made).tier is None
    finally:
        file.write_bytes(whole)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_under_new_sums_never_crash(made, data):
    """The same by one who makes the sums anew: every parser sees the damage."""
    files = sorted(file for file in made.rglob("*") if file.is_file() and file.name != layout.SUMS)
    file, sums = data.draw(st.sampled_from(files)), (made / layout.SUMS).read_bytes()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    # Digits and quotes are changed as often as anything else is: most damage shall get past the JSON parser.
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3, unique=True)):
        flipped[place] = data.draw(st.sampled_from(list(b'0123456789"{}[],:x-e.\xff')))
    try:
        file.write_bytes(flipped)
        resum(made)
        validation.text_of(validation.validate(made))
    finally:
        file.write_bytes(whole)
        (made / layout.SUMS).write_bytes(sums)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@FUZZ
@given(data=st.data())
def test_any_value_in_any_field_never_crashes(made, data):
    """Well-formed JSON with a field of any kind, in the submission or in all records of a run."""
    file = data.draw(st.sampled_from([made / "submission.json", *runs(made)]))
    whole, sums, value = file.read_bytes(), (made / layout.SUMS).read_bytes(), data.draw(JSON_VALUES)

    def place(record):
        inner = record
        while True:
            key = data.draw(st.sampled_from(sorted(inner)))
            if not isinstance(inner[key], dict) or not inner[key] or data.draw(st.booleans()):
                inner[key] = value
                return
            inner = inner[key]

    try:
        if file.suffix == ".json":
            edit_submission(made, place)
        else:
            edit(file, place, slice(data.draw(st.integers(0, 2)), 3))
        resum(made)
        validation.text_of(validation.validate(made))
    finally:
        file.write_bytes(whole)
        (made / layout.SUMS).write_bytes(sums)


# parts -----------------------------------------------------------------------------------------------------------------


def test_masks_survive_packing():
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"m{n}": torch.rand(shape, generator=generator) < 0.5
        for n, shape in enumerate([(1,), (3, 5), (8,), (2, 3, 3, 3)])
    }
    again = mask_files.unpack(mask_files.pack(masks))
    assert set(again) == set(masks) and all(torch.equal(again[name], masks[name]) for name in masks)
    masks["m1"][0, 0] ^= True
    assert mask_files.digest(again) != mask_files.digest(masks)


def test_facts_are_those_of_the_data():
    from domainbed_sfp.data import get_dataset_class

    for name in ("ColoredDigits", "FullColoredDigits", "RotatedDigits", "TexturedDigits"):
        built, facts = get_dataset_class(name).build(None, {"image_size": 12}, 1, None), facts_of(name)
        assert tuple(map(len, built.environments)) == facts.sizes
        assert (built.input_shape, built.num_classes) == ((facts.channels, 12, 12), facts.classes)
    assert facts_of("PACS").sizes == (2048, 2344, 1670, 3929) and facts_of("PACS").classes == 7
    assert sum(facts_of("ColoredMNIST").sizes) == 70_000 and facts_of("TexturedMNIST").channels == 1
    assert facts_of("Folder") is None and None in facts_of("TerraIncognita").sizes


def test_the_closed_track():
    protocol = {
        "environments": ["95%", "90%", "10%"], "test_envs": [[0], [1], [2]], "steps": 1001, "backbone": "MNIST_CNN",
        "weights": "none", "image_size": 8, "holdout_fraction": 0.2, "task": "domain_generalization",
        "checkpoint_freq": 100, "trial_seeds": [0, 1, 2],
    }  # fmt: skip
    assert list(tracks.reasons_for_open(DATASET, protocol, [])) == []
    assert list(tracks.reasons_for_open(DATASET, {**protocol, "trial_seeds": [0, 1, 2, 3]}, [])) == []
    # Each alone, and both ways: fewer checkpoints are another selection too.
    for changes, words in (
        ({"checkpoint_freq": 10}, "a checkpoint every 10 steps, closed takes 100"),
        ({"checkpoint_freq": 1000}, "a checkpoint every 1,000 steps, closed takes 100"),
        ({"trial_seeds": [0, 1]}, "2 trials, closed takes at least 3"),
        ({"trial_seeds": [0]}, "1 trial, closed takes at least 3"),
    ):
        assert list(tracks.reasons_for_open(DATASET, {**protocol, **changes}, [])) == [words]
    photographs = {
        **protocol, "steps": 5001, "backbone": "resnet50 (augmix)", "weights": "imagenet", "image_size": 224,
        "environments": ["a", "b", "c"], "checkpoint_freq": 300,
    }  # fmt: skip
    assert list(tracks.reasons_for_open("PACS", photographs, [])) == []
    assert list(tracks.reasons_for_open("DomainNet", photographs, [])) == [
        "a checkpoint every 300 steps, closed takes 1,000"
    ]
    changed = {**protocol, "steps": 7, "test_envs": [[0]], "backbone": "resnet18", "holdout_fraction": 0.5}
    assert list(tracks.reasons_for_open(DATASET, changed, [])) == [
        "7 steps, closed takes 1,001", "backbone resnet18, closed takes MNIST_CNN or MNIST_CNN (BatchNorm)",
        "held-out fraction 0.5, closed takes 0.2", "90%, 10% not tested",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "hparams, args, words",
    [
        ({"weights": "./none"}, {}, "hparam weights './none', closed takes imagenet or none"),
        ({"backbone": "MNIST_CNN"}, {}, "hparam backbone 'MNIST_CNN', closed takes auto"),
        ({}, {"uda_holdout_fraction": 0.9}, "unlabelled fraction 0.9 left out of the tests"),
    ],
)
def test_names_do_not_open_the_closed_track(made, hparams, args, words):
    """A file called none, a backbone called as the tables call DomainBed's, a test on a part of the samples."""
    run = validation.validate(made).runs[0].run
    run = replace(run, hparams={**run.hparams, **hparams}, args={**run.args, **args})
    protocol = {**summary.protocol_of([run]), "steps": 1001, "test_envs": [[0], [1], [2]]}
    told = list(tracks.reasons_for_open(DATASET, protocol, [run]))
    assert any(line.startswith(words) for line in told), told
    assert protocol["weights"] == ("file none" if "weights" in hparams else "none")
