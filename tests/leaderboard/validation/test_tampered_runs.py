"""Runs, seeds, hparams and results that were tampered with, under new sums."""

from __future__ import annotations

import json
import shutil

import pytest
from changed_bundles import DATASET, ROW, assert_told, edit, edit_submission, name_of, problems, resum, runs

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.submit import submit

# Held out of 599 samples a fifth: 119; the others: 480.
OUT, IN = 119, 480


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
