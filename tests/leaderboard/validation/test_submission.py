"""From a sweep to an entry of the leaderboard: the way of an honest submission."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from changed_bundles import DATASET, ROW, assert_told, edit, edit_submission, name_of, problems, resum, runs
from safetensors.torch import save_file

from domainbed_sfp import networks
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle.places import without_places
from domainbed_sfp.leaderboard.commands import entries_of
from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.facts import facts_of
from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.leaderboard.validation.outcomes import Recomputed, Rerun
from domainbed_sfp.runs import mask_files, records
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs
from domainbed_sfp.training import hparams
from domainbed_sfp.training import train as training

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


def test_runs_from_before_an_hparam_was_there_are_held_to_what_they_did(tmp_path):
    """The committed runs of GlobalPru name no `vote_by`: they voted by attention, and the default is another now."""
    archive = Path(__file__).parents[3] / "results" / "bundles" / "globalpru_coloured_GlobalPru.tgz"
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    (submission,) = tmp_path.rglob("submission.json")
    assert validation.validate(submission.parent).problems == []
