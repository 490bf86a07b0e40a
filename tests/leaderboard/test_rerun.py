"""What is computed again of a bundle: first steps, models and cited runs, and how two computations are compared."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle import layout, weights
from domainbed_sfp.leaderboard.bundle.tree import sums_text
from domainbed_sfp.leaderboard.commands import entries_of
from domainbed_sfp.leaderboard.rerun import comparing, whole_runs
from domainbed_sfp.leaderboard.rerun.comparing import check_means, compare
from domainbed_sfp.leaderboard.rerun.drawing import draw
from domainbed_sfp.leaderboard.rerun.first_steps import check_first_steps
from domainbed_sfp.leaderboard.rerun.models import check_models
from domainbed_sfp.leaderboard.rerun.place import Place, hours_of
from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.leaderboard.validation.outcomes import Rerun
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs
from domainbed_sfp.training import train as training

DATASET = "FullColoredDigits"
HERE = Place()


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Two test environments of one trial, three steps, with every model kept."""
    root = tmp_path_factory.mktemp("rerun") / "sweep"
    spec = SweepSpec(
        [DATASET], ["Magnitude"], n_hparams=1, n_trials=1, steps=3, checkpoint_freq=1, test_envs=[[0], [2]],
        hparams={"batch_size": 8},
    )  # fmt: skip
    jobs = make_jobs(spec, None)
    directory = SweepDirectory(root)
    directory.register(jobs)
    for job in jobs:
        args = job.settings(None, directory.job_dir(job), skip_model_save=False)
        args = replace(args, save_model_every_checkpoint=True)
        with contextlib.redirect_stdout(io.StringIO()):
            training.train(args)
    return root


@pytest.fixture(scope="session")
def made(sweep):
    """Its bundle, with models."""
    target = sweep.parent / "bundle"
    submit(str(sweep), "Magnitude", str(target), with_models=True)
    return target


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def resum(folder: Path) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != layout.SUMS]
    sums = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / layout.SUMS).write_text(sums_text(sums))


def elsewhere(records, **changes):
    """Records as another machine would have made them."""
    return [{**record, "environment": {**record["environment"], "cpu": "other"}, **changes} for record in records]


def raised(records, points: float, match=lambda name: True):
    """Records whose accuracies are higher by so many points, but for the first one."""
    return [
        {
            name: min(1.0, value + points / 100) if name.endswith("_acc") and at and match(name) else value
            for name, value in record.items()
        }
        for at, record in enumerate(records)
    ]


@pytest.fixture(scope="session")
def records(made):
    """Twelve records of a run whose accuracies leave room above them."""
    (run, _) = validation.validate(made).runs
    low = [{**run.records[-1], "step": step, "commit": "ba9876543210"} for step in range(12)]
    return [{name: 0.5 if name.endswith("_acc") else value for name, value in record.items()} for record in low]


# two computations -----------------------------------------------------------------------------------------------------


def told(name, claimed, again, tolerance=3.0, selected=frozenset({11})) -> list[str]:
    return [problem.line() for problem in compare(name, claimed, again, tolerance, selected).problems]


def test_the_same_records_are_identical_wherever_they_were_made(records):
    for again in (records, elsewhere(records), elsewhere(records, commit="0123456789ab", wall_time=9.0)):
        one = compare("run", records, again, 3.0, frozenset({11}))
        assert (one.agreement, one.difference, one.problems, one.signed) == ("identical", 0.0, [], {})


SAME_PLACE = {
    "loss": 0.123, "env0_in_acc": 0.5001, "sparsity": 0.51, "macs": 5, "masks": "0" * 64, "precision": "bf16",
    "final_compression": False, "bitops": 1.0, "granularity": "weight", "epoch": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name, value", SAME_PLACE.items())
@pytest.mark.parametrize("at", [0, 5, 11])
def test_at_the_same_place_every_field_of_every_record_counts(records, name, value, at):
    claimed = [dict(record) for record in records]
    claimed[at][name] = value
    (line,) = told("run", claimed, records)
    assert line.startswith(f"records/run.jsonl: line {at + 1}.{name}: expected ") and "as computed again with" in line


@pytest.mark.parametrize(
    "changes, is_told",
    [
        ({"loss": 1.1}, False),
        ({"loss": 1000.0}, True),
        ({"loss": None}, True),
        ({"env0_in_acc": 0.529}, False),
        ({"env0_in_acc": 0.531}, True),
        ({"sparsity": 0.51}, False),
        ({"sparsity": 0.6}, True),
        ({"macs": 10}, True),
        ({"surviving_parameters": 10}, True),
        ({"masks": "0" * 64}, False),
        ({"precision": "bf16"}, True),
        ({"bitops": 1.0}, True),
        ({"dense_macs": 1}, True),
        ({"hparams": {}}, False),  # versions differ in what they name; `check_hparams` holds them to the seeds' draw
        ({"standing": "reference"}, True),
        ({"final_compression": False}, True),
        ({"surprise": 1.0}, True),
        ({"wall_time": 9.0, "mem_gb": 3.0, "step_time": 1.0, "images_per_second": 2.0}, False),
    ],
)
def test_elsewhere_a_record_may_differ_by_what_training_decides(records, changes, is_told):
    claimed = [dict(record) for record in records]
    claimed[5].update(changes)
    again = elsewhere(records, loss=1.0)
    claimed = [{"loss": 1.0, **record} if at != 5 else record for at, record in enumerate(claimed)]
    claimed = [
        {**record, "loss": 1.0} if "loss" not in changes or at != 5 else record for at, record in enumerate(claimed)
    ]
    found = told("run", claimed, again)
    assert bool(found) == is_told and all(
        "line 6." in line and "on another machine or commit" in line for line in found
    )


def test_a_field_that_is_left_out_is_told(records):
    claimed = [{name: value for name, value in record.items() if name != "masks"} for record in records]
    assert all("masks: expected" in line and line.endswith("found nothing") for line in told("run", claimed, records))
    assert told("run", claimed, elsewhere(records)) and told("run", records[:-1], records)


def test_the_first_step_has_a_tolerance_of_its_own(records):
    claimed = [dict(record) for record in records]
    claimed[0]["env1_in_acc"] = 0.509
    assert not told("run", claimed, elsewhere(records))
    claimed[0]["env1_in_acc"] = 0.511
    (line,) = told("run", claimed, elsewhere(records))
    assert "line 1.env1_in_acc" in line


def test_two_samples_of_a_small_split_may_differ(records):
    """One of 31 images is more than three points."""
    claimed = [dict(record) for record in records]
    for at in (0, 5):
        claimed[at]["env1_out_acc"] = 0.5 + 2 / 31
    again = elsewhere(records)
    assert len(told("run", claimed, again)) == 2
    assert not compare("run", claimed, again, 3.0, frozenset(), {"env1_out_acc": 31}).problems
    assert len(compare("run", claimed, again, 3.0, frozenset(), {"env1_out_acc": 480}).problems) == 2


def means(claimed, again, selected=frozenset({11})):
    one = compare("run", claimed, again, 3.0, selected)
    assert not one.problems
    mean, problems = check_means([one], 3.0)
    return mean, [problem.line() for problem in problems]


def test_points_added_to_every_record_are_told_by_their_mean(records):
    """Each record lies within its tolerance; all together do not."""
    again = elsewhere(records)
    mean, found = means(raised(records, 2.0), again)
    assert mean == pytest.approx(2.0) and len(found) == 2
    unseen = next(line for line in found if "unseen environments" in line)
    assert "expected a mean within 1.00 points" in unseen and "found +2.00 points over" in unseen
    # Of the unseen environment or the validation splits alone; lower ones make others look better.
    tested = records[0]["args"]["test_envs"][0]
    assert means(raised(records, 2.0, lambda name: name.startswith(f"env{tested}_")), again)[1]
    assert means(raised(records, 2.0, lambda name: "_out_" in name and not name.startswith(f"env{tested}_")), again)[1]
    assert means(raised(records, -2.0), again)[1]
    assert not means(raised(records, 0.5), again)[1]


def test_a_difference_where_a_rule_selected_is_told_apart(records):
    claimed = [dict(record) for record in records]
    claimed[3]["env0_in_acc"] = 0.52
    claimed[11]["env0_in_acc"] = 0.51
    one = compare("run", claimed, elsewhere(records), 3.0, frozenset({11}))
    assert (one.agreement, one.problems) == ("within tolerance", [])
    assert one.difference == pytest.approx(2.0) and one.selected_difference == pytest.approx(1.0)
    # Selected records alone, in many runs: their mean has to be the better, the more there are.
    tested = records[0]["args"]["test_envs"][0]
    claimed = [dict(record) for record in records]
    claimed[11][f"env{tested}_in_acc"] = 0.525
    some = [compare("run", claimed, elsewhere(records), 3.0, frozenset({11})) for _ in range(4)]
    (problem,) = check_means(some, 3.0)[1]
    assert "selected records: expected a mean within 1.50 points" in problem.line()


def test_what_changes_were_nobody_knows(records):
    """Two checkouts with changes of their own may have the same commit."""
    again = [{**record, "commit": "0123456789ab+changes", "loss": 1.0} for record in records]
    claimed = [{**record, "loss": 1.1} for record in again]
    assert compare("run", claimed, again, 3.0, frozenset()).agreement == "within tolerance"


def test_another_version_of_an_algorithms_package(records):
    theirs, ours = ([{**record, "code": code} for record in records] for code in ("0123456789ab", "ba9876543210"))
    (line,) = told("run", theirs, ours)
    assert "install the version that made the records" in line


# the draw ---------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_draw_has_runs_of_every_test_environment(count, seed, sizes):
    cited = {f"env{at}": {f"{at}-{run}" for run in range(size)} for at, size in enumerate(sizes)}
    drawn = draw(cited, count, "ab" * 32, seed)
    assert len(drawn) == len(set(drawn)) == sum(min(count, size) for size in sizes)
    assert all(any(run in runs for run in drawn) for runs in cited.values())
    assert drawn == draw(cited, count, "ab" * 32, seed)


def test_a_draw_hangs_on_every_byte_of_the_bundle():
    cited = {"env": {str(run) for run in range(1000)}}
    assert len({tuple(draw(cited, 1, f"{digest:064x}", seed)) for digest in range(4) for seed in range(4)}) > 12


# first steps --------------------------------------------------------------------------------------------------------------


def test_first_steps_follow_from_seed_hparams_and_data(made):
    outcome = validation.validate(made)
    check_first_steps(outcome, HERE)
    assert outcome.problems == [] and outcome.computed(DATASET)["step_0"] == {"runs": 2, "difference": 0.0}
    # Records that were invented, and hold in themselves.
    outcome = validation.validate(made)
    first = outcome.runs[0].records[0]
    outcome.runs[0].records[0] = {
        **first,
        "env1_in_acc": 400 / 480,
        "environment": {**first["environment"], "cpu": "x"},
    }
    check_first_steps(outcome, HERE)
    assert [problem.field for problem in outcome.problems] == ["line 1.env1_in_acc"]


def test_first_steps_that_cannot_be_computed_here_are_said(made, monkeypatch):
    def reason(place=HERE, **hparams) -> str:
        outcome = validation.validate(made)
        for run in outcome.runs:
            run.run.hparams.update(hparams)
        check_first_steps(outcome, place)
        assert outcome.problems == [] and outcome.computed(DATASET)["step_0"] is None
        assert f"step 0: not computed on {DATASET}: " in validation.text_of(outcome)
        return outcome.step_0.skipped[DATASET]

    assert "begin from a file of their author (hparam weights" in reason(weights="./mine.pth")
    assert "hours; --hours raises the limit" in reason(Place(hours=1e-9))
    monkeypatch.setattr(registry, "names", lambda: ["ERM"])
    assert reason() == "Magnitude is not installed here; install the package that has it"


# models -------------------------------------------------------------------------------------------------------------------


def test_models_in_the_bundle_make_it_model_verified(made, main):
    outcome = validation.validate(made)
    check_models(outcome, outcome.tree, HERE)
    cited = outcome.cited(DATASET)
    assert outcome.problems == [] and outcome.tier == "model-verified"
    assert outcome.computed(DATASET)["models"] == {"checkpoints": len(cited), "difference": 0.0}
    assert len(list((made / "models").iterdir())) == len(cited)
    (entry,) = entries_of(outcome)
    assert entry.tier == "model-verified" and entry.models["checkpoints"] == len(cited)
    assert "tier model-verified" in main("leaderboard", "validate", made).stdout
    assert "tier records-verified" in main("leaderboard", "validate", made, "--records_only").stdout


def check(folder: Path) -> list[str]:
    outcome = validation.validate(folder)
    if not outcome.problems:
        check_models(outcome, outcome.tree, HERE)
    return [problem.line() for problem in outcome.problems]


def change(folder: Path, edit) -> Path:
    """Changes the tensors of a model, and makes the sums anew."""
    file = sorted((folder / "models").iterdir())[0]
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=header["__metadata__"])
    resum(folder)
    return file


def test_another_model_than_the_records_were_measured_with(copy):
    change(
        copy, lambda tensors: tensors.update({"classifier.bias": tensors["classifier.bias"] + 50 * torch.eye(10)[3]})
    )
    found = check(copy)
    assert found and all(
        "_acc: expected" in line and "of the model in the bundle on the data" in line for line in found
    )


def test_dense_weights_under_sparse_masks_do_not_count(copy):
    """What the masks remove is removed before the model is evaluated."""

    def fill(tensors):
        weights = tensors["featurizer.conv2.weight"]
        assert bool((weights == 0).flatten(1).all(1).any())
        weights[weights == 0] = 5.0

    change(copy, fill)
    assert check(copy) == []


def test_models_of_other_shapes_and_files_that_are_none(copy):
    file = change(copy, lambda tensors: tensors.update({"classifier.bias": torch.zeros(3)}))
    (line,) = check(copy)
    assert line.startswith(
        f"models/{file.name}: expected the model of Magnitude, which can be evaluated, found not a state"
    )
    for data, words in (
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x02" + 7 * b"\0" + b"{}", "a header without domainbed_sfp"),
        ((2**40).to_bytes(8, "little"), "a header of 1,099,511,627,776 bytes"),
    ):
        file.write_bytes(data)
        resum(copy)
        (line,) = check(copy)
        assert "expected a model, as tensors" in line and words in line
    file.unlink()
    resum(copy)
    assert check(copy) == [f"models/{file.name}: expected a model, as of the other selected checkpoints, found no file"]
    (copy / "models" / "other.1.safetensors").write_bytes(b"")
    resum(copy)
    assert any("expected the model of a checkpoint that a selection rule chooses" in line for line in check(copy))


def test_a_state_survives_packing():
    shared = torch.rand(3, 2)
    state = {"a": shared, "b": shared, "c": torch.arange(4), "step": 7, "extra": {"widths": [2, 3]}}
    again = weights.unpack(weights.pack(state))
    assert again.keys() == state.keys() and again["step"] == 7 and again["extra"] == {"widths": [2, 3]}
    assert all(torch.equal(again[name], state[name]) for name in "abc")
    assert len(weights.pack(state)) < 600


def test_models_that_were_not_kept(sweep, tmp_path):
    other = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    for file in other.glob("*/model*"):
        file.unlink()
    with pytest.raises(UserError, match=r"--with_models: .* has no model of step \d.*--save_model_every_checkpoint"):
        submit(str(other), "Magnitude", str(tmp_path / "b"), with_models=True)
    assert not (tmp_path / "b").exists()


def test_a_row_without_its_masks_is_self_reported(sweep, tmp_path):
    """Runs of earlier versions did not keep them; who only deletes them is told so."""
    other = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    for folder in other.glob("*/masks"):
        shutil.rmtree(folder)
    with pytest.raises(
        UserError, match=r"the masks of step \d.*without them \(--without_masks\) the row is self-reported"
    ):
        submit(str(other), "Magnitude", str(tmp_path / "b"))
    outcome = submit(str(other), "Magnitude", str(tmp_path / "b"), without_masks=True)
    assert outcome.tier == "self-reported" and "not checked: masks: its author did not keep them" in validation.text_of(
        outcome
    )
    (entry,) = entries_of(outcome)
    assert {"sparsity", "macs", "surviving_parameters"} <= set(entry.unverified) and entry.tier == "self-reported"
    file = tmp_path / "b" / "submission.json"
    document = json.loads(file.read_text())
    del document["without_masks"]
    file.write_text(json.dumps(document))
    resum(tmp_path / "b")
    assert any(
        "expected the masks of records/" in line and line.endswith("found no file") for line in check(tmp_path / "b")
    )


# reruns -------------------------------------------------------------------------------------------------------------------


def test_a_rerun_trains_a_cited_run_of_every_test_environment(made, capsys):
    outcome = validation.validate(made)
    again = outcome.rerun = Rerun(5, 1, 3.0)
    whole_runs.train_again(outcome, again, HERE)
    assert outcome.problems == [] and outcome.tier == "rerun-identical"
    (entry,) = entries_of(outcome)
    assert len(entry.rerun["cells"]) == 2 and entry.rerun["seed"] == 5 and entry.rerun["mean_difference"] == 0.0
    said = capsys.readouterr().err
    assert f"drawn by the bundle's digest {outcome.sums[:12]} and --rerun_seed 5" in said


def test_a_run_that_cannot_be_trained_fails_alone(made, monkeypatch, capsys):
    outcome = validation.validate(made)
    again, train, calls = Rerun(5, 1, 3.0), training.train, []

    def diverging(args):
        calls.append(args)
        if len(calls) == 1:
            raise UserError("Magnitude diverged: the loss is nan at step 2")
        train(args)

    monkeypatch.setattr(training, "train", diverging)
    whole_runs.train_again(outcome, again, HERE)
    (problem,) = outcome.problems
    assert problem.expected == "a run that can be trained" and "diverged" in problem.found
    assert len(calls) == 2 and again.outcome == "disagreed" and again.document(DATASET) is None


def test_a_rerun_that_would_take_for_ever_is_refused_before_it_begins(made, monkeypatch):
    outcome = validation.validate(made)
    for run in outcome.runs:
        run.run.args["steps"] = 10**9
    assert hours_of(outcome.runs, None, None) > 1000
    monkeypatch.setattr(training, "train", lambda args: pytest.fail("it was begun"))
    with pytest.raises(UserError, match=r"--rerun: 2 runs would take about [\d,.]+ hours here, --hours allows 2"):
        whole_runs.train_again(outcome, Rerun(5, 1, 3.0), HERE)


def test_a_rerun_opens_no_file_that_the_bundle_names(made):
    outcome = validation.validate(made)
    for run in outcome.runs:
        run.run.hparams["weights"] = "/etc/passwd"
    with pytest.raises(UserError, match=r"hparam weights \"/etc/passwd\".*no file that a bundle names is opened"):
        whole_runs.train_again(outcome, Rerun(5, 1, 3.0), HERE)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rerun", "1", "--tolerance", "nan"], "from 0 to 3"),
        (["--rerun", "1", "--tolerance", "9"], "from 0 to 3"),
        (["--rerun", "0"], "--rerun"),
        (["--rerun", "1", "--rerun_seed", "-1"], "--rerun_seed"),
        (["--hours", "0"], "above 0"),
    ],
)
def test_flags_out_of_range(main, made, flags, words):
    done = main("leaderboard", "validate", made, *flags, check=False)
    assert done.returncode == 2 and words in done.stderr


def test_tolerances_stand_where_honest_runs_were_measured():
    """At most .21 points at step 0, 2.5 later and .26 in the mean, with other convolution routines."""
    assert comparing.FIRST_TOLERANCE > 0.21 and comparing.TOLERANCE > 2.5 and 0.26 < comparing.MEAN_TOLERANCE < 2


# entries rebuilt from bundles -------------------------------------------------------------------------------------------


@pytest.fixture
def board(main, made, tmp_path):
    """A folder of one entry whose bundle is archived beside it, and the page that was built from it."""
    (tmp_path / "bundles").mkdir()
    with tarfile.open(tmp_path / "bundles" / "one.tgz", "w:gz") as archive:
        archive.add(made, "bundle")
    main(
        "leaderboard", "add", tmp_path / "bundles" / "one.tgz", "--archive", "../bundles/one.tgz",
        "--entries_dir", "entries", "--rerun", 1,
    )  # fmt: skip
    main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "page")
    return tmp_path


CHECK = ("leaderboard", "build", "--check", "--entries_dir", "entries", "--output_dir", "page")


def test_an_entry_is_rebuilt_from_its_archived_bundle(main, board):
    (file,) = board.glob("entries/*/*.json")
    assert json.loads(file.read_text())["tier"] == "rerun-identical"
    assert main(*CHECK).stdout == "1 entries rebuilt from their bundles\n"
    assert main(*CHECK, "--recompute").stdout == "1 entries rebuilt from their bundles\n"
    (board / "page" / "leaderboard.csv").write_text("better")
    done = main(*CHECK, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("page/leaderboard.csv: expected what the entries give, found another")


def test_an_entry_that_its_bundle_does_not_give(main, board):
    (file,) = board.glob("entries/*/*.json")
    document = json.loads(file.read_text())

    def told(*flags, **changes) -> str:
        file.write_text(json.dumps({**document, **changes}))
        done = main(*CHECK, *flags, check=False)
        assert done.returncode in (1, 2), done.stdout
        return done.stdout + done.stderr

    place = str(file.relative_to(board))
    assert f"{place}: commit: expected " in told(commit="0123456789ab") and "as rebuilt from ../bundles" in told(
        commit=None
    )
    assert f"{place}: runs" in told(runs=[64 * "0"])
    assert f"{place}: author: expected null" in told(author=64 * "1")
    assert f"{place}: models.difference: expected 0.0" in told(
        "--recompute", models={**document["models"], "difference": 0.5}
    )
    assert f"{place}: archive: expected the entry's bundle, found" in told(archive="../bundles/none.tgz")
    results = json.loads(json.dumps(document["results"]))
    for result in results.values():
        cell = result["cells"][0]
        cell["trials"][0]["accuracy"] = cell["accuracy"] = 100.0
    assert f"{place}: results.oracle.cells[0].accuracy: expected " in told(results=results)
    file.write_text(json.dumps({**document, "archive": None}))
    done = main(*CHECK, check=False)
    assert f"1 without a bundle, checked for consistency alone: {DATASET}/{file.name}" in done.stdout


def test_archives_hold_nothing_but_a_bundle(main, made, tmp_path):
    def told(name: str, data: bytes) -> str:
        with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
            archive.add(made, "bundle")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        done = main("leaderboard", "validate", "other.tgz", "--records_only", check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return done.stderr

    assert "expected a bundle with submission.json, found 'bundle/setup.py' in it" in told("bundle/setup.py", b"")
    assert "other.tgz" in told("../../escape", b"x") and not (tmp_path.parent / "escape").exists()
    assert "expected at most 200 bytes" in told("bundle/SIGNATURE", b"0" * 300)
    (tmp_path / "none.tgz").write_bytes(b"nothing")
    assert main("leaderboard", "validate", "none.tgz", check=False).returncode == 2


# authors ------------------------------------------------------------------------------------------------------------------


def test_a_signed_bundle_and_what_its_signature_says(sweep, tmp_path, main):
    pytest.importorskip("cryptography")
    key = tmp_path / "key.pem"
    outcome = submit(str(sweep), "Magnitude", str(tmp_path / "b"), author_key=str(key))
    assert outcome.tier == "records-verified" and (key.stat().st_mode & 0o777) == 0o600
    (entry,) = entries_of(outcome)
    assert len(entry.author) == 64 and key.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    again = submit(str(sweep), "Magnitude", str(tmp_path / "c"), author_key=str(key))
    assert entries_of(again)[0].author == entry.author and "BEGIN" not in (tmp_path / "b" / "SIGNATURE").read_text()

    def check_of(folder: Path) -> list[str]:
        return [problem.line() for problem in validation.validate(folder).problems]

    # What was signed was changed; the signature is another's, or missing; the key is the signer's and not the author's.
    resum(tmp_path / "b")
    assert check_of(tmp_path / "b") == []
    with open(tmp_path / "b" / layout.SUMS, "a") as sums:
        sums.write("\n")
    assert any("SIGNATURE: expected the signature of SHA256SUMS by key" in line for line in check_of(tmp_path / "b"))
    (tmp_path / "c" / "SIGNATURE").unlink()
    assert any("SIGNATURE: expected the signature" in line and "no file" in line for line in check_of(tmp_path / "c"))
    other = submit(str(sweep), "Magnitude", str(tmp_path / "d"))
    assert entries_of(other)[0].author is None
    (tmp_path / "d" / "SIGNATURE").write_text("0" * 128)
    assert any("author: expected the public key" in line for line in check_of(tmp_path / "d"))
    (tmp_path / "bad.pem").write_text("no key")
    done = main(
        "submit", "--input_dir", sweep, "--algorithm", "Magnitude", "--output", "e", "--author_key", "bad.pem", check=False
    )  # fmt: skip
    assert done.returncode == 2 and "expected an Ed25519 key" in done.stderr and not (tmp_path / "e").exists()
