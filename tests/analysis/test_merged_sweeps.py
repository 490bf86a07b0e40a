"""Folders of several machines and sweeps, copied together or side by side."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from runs_on_disk import record, write_run
from told_errors import assert_one_line_error

from domainbed_sfp.runs.manifests import read_manifests
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs

ACCURACIES = (0.5, 0.5, 0.6, 0.6, 0.7, 0.7)


def _box(root: Path, trials: range, *, steps: int = 2, algorithms: tuple[str, ...] = ("ERM",)) -> Path:
    """A sweep as a launch leaves it, its runs written by hand."""
    spec = SweepSpec(
        ["ColoredDigits"], list(algorithms), single_test_envs=True, n_hparams=1, steps=steps,
        n_trials_from=trials.start, n_trials=trials.stop,
    )  # fmt: skip
    directory = SweepDirectory(root)
    jobs = make_jobs(spec, None)
    directory.register(jobs)
    for job in jobs:
        args = {"steps": steps, "seed": job.seed, "output_dir": job.name}
        one = record(
            ACCURACIES, step=steps - 1, test_envs=job.test_envs, algorithm=job.algorithm, dataset=job.dataset,
            trial_seed=job.trial_seed, args=args, environments=["first", "second", "third"],
        )  # fmt: skip
        write_run(root, job.name, [one])
    return root


def _lose(root: Path, test_env: int) -> None:
    for results in list(root.glob("*/results.jsonl")):
        if json.loads(results.read_text())["args"]["test_envs"] == [test_env]:
            shutil.rmtree(results.parent)


def _merge(target: Path, *boxes: Path) -> Path:
    """What `cp -r BOX/* TARGET` does."""
    for box in boxes:
        shutil.copytree(box, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock"))
    return target


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_missing_jobs_of_all_machines_are_named_in_any_order_of_copying(main, tmp_path, order):
    boxes = [_box(tmp_path / f"box{trial}", range(trial, trial + 1)) for trial in range(3)]
    _lose(boxes[1], 2)
    _merge(tmp_path / "flat", *(boxes[at] for at in order))
    told = main("collect", "--input_dir", "flat", "--selection", "training-domain").stdout
    assert "ERM: 1 job missing (not started): test third with trial 1 x hparams seed 0." in told
    assert "not list" not in told
    assert "This folder holds 3 sweeps, copied together: sweep.json (3 jobs; ColoredDigits; ERM; trial" in told
    status = main("sweep", "status", "--output_dir", "flat").stdout
    assert "9 jobs: 8 done, 0 incomplete, 1 not launched." in status and "holds 3 sweeps" in status
    # The next launch makes one sweep of them.
    _box(tmp_path / "flat", range(3, 4))
    told = main("collect", "--input_dir", "flat", "--selection", "training-domain").stdout
    assert "copied together" not in told and "test third with trial 1" in told


def test_a_sweep_that_grows_is_one_sweep_wherever_it_is_copied(main, tmp_path):
    box = _box(tmp_path / "box", range(0, 1))
    _box(box, range(1, 2))
    _box(box, range(1, 2))
    assert len(list(box.glob("sweep-*.json"))) == 2
    assert [manifest.file for manifest in read_manifests(box)] == ["sweep.json"]
    (box / "sweep.json").unlink()  # what is left without it says as much
    (manifest,) = read_manifests(box)
    assert len(manifest.jobs) == 6
    other = _box(tmp_path / "other", range(2, 3))
    for target, parts in (("one", (box, other)), ("two", (other, box))):
        told = main("collect", "--input_dir", _merge(tmp_path / target, *parts), "--selection", "oracle").stdout
        assert "holds 2 sweeps" in told and "missing" not in told


def test_a_sweep_of_an_earlier_version_copied_first_stays_known(main, tmp_path):
    old = _box(tmp_path / "old", range(0, 1))
    for file in old.glob("sweep-*.json"):
        file.unlink()
    _lose(old, 0)
    told = main("collect", "--input_dir", _merge(tmp_path / "flat", _box(tmp_path / "new", range(1, 2)), old)).stdout
    assert "test first with trial 0" in told and "holds 2 sweeps" in told


def test_sweeps_of_different_protocols_are_told_apart(main, tmp_path):
    boxes = [_box(tmp_path / f"steps{steps}", range(0, 1), steps=steps) for steps in (2, 3)]
    flat = _merge(tmp_path / "flat", *boxes)
    told = main("collect", "--input_dir", flat, "--selection", "training-domain").stdout
    assert "They differ in steps 3 and 2." in told or "They differ in steps 2 and 3." in told
    assert "9 jobs" not in told and told.count("\n| ERM") == 2
    spec = ("--datasets", "ColoredDigits", "--algorithms", "ERM", "--single_test_envs", "--steps", 4)
    refused = main("sweep", "launch", *spec, "--output_dir", flat, check=False)
    assert_one_line_error(refused, "holds another sweep", "4 here")


def test_folders_of_sweeps_are_named_where_runs_were_expected(main, tmp_path):
    side = tmp_path / "side"
    for name in ("box0", "box1", "deep/box2", "deep/box3"):
        _box(side / name, range(0, 1))
    for command in ("collect", "degraded", "rankings"):
        refused = main(command, "--input_dir", side, check=False)
        assert_one_line_error(
            refused, "holds no run with a record", "box0 holds 3 runs", "box1 holds 3 runs", "deep/box2"
        )
        assert "and 1 more" in refused.stderr
    submitted = main("submit", "--input_dir", side, "--algorithm", "ERM", "--output", "bundle", check=False)
    assert_one_line_error(submitted, "box0 holds 3 runs")
    status = main("sweep", "status", "--output_dir", side, check=False)
    assert_one_line_error(status, "holds no sweep", "box0 holds 3 runs")
    # One copied into the other is said, too.
    shutil.copytree(side / "box1", side / "box0" / "box1")
    told = main("collect", "--input_dir", side / "box0")
    assert "box1 holds 3 runs, which are left out" in told.stderr


def test_jobs_listed_under_other_spellings_are_listed_once(tmp_path):
    directory = SweepDirectory(tmp_path)
    spec = SweepSpec(["ColoredDigits"], ["ERM"], single_test_envs=True, n_hparams=1, n_trials=1, steps=2)
    jobs = make_jobs(spec.updated(hparams={"weight_decay": 0}), None)
    directory.register(jobs)
    manifest = json.loads((tmp_path / "sweep.json").read_text())
    for number, job in enumerate(manifest["jobs"]):
        job.update(name=f"earlier{number}", hparams={"weight_decay": 0})
    for file in tmp_path.glob("sweep*.json"):
        file.unlink()
    (tmp_path / "sweep.json").write_text(json.dumps(manifest))
    (tmp_path / "earlier0").mkdir()
    directory.register(jobs)
    names = [job["name"] for job in json.loads((tmp_path / "sweep.json").read_text())["jobs"]]
    assert sorted(names) == sorted(["earlier0", *(job.name for job in jobs)])
