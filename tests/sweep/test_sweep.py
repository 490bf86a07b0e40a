"""Sweeps through the command line: grids, states, interruption, failures, two launches on one directory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from image_trees import make_tree
from processes import Command
from told_errors import assert_one_line_error

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.sweep import capacity, commands
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.launchers import local
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs, read_spec, shipped_specs

SPEC = """
datasets: [FullColoredDigits]
algorithms:
  - ERM
  - {name: Magnitude, hparams: {sparsity: 0.3}}
test_envs: [[2]]
n_hparams: 1
n_trials: 1
steps: 11
checkpoint_freq: 5
skip_model_save: true
hparams: {batch_size: 16}
"""


@pytest.fixture
def spec_file(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    return file


@pytest.fixture(scope="module")
def launched_once(tmp_path_factory):
    """A finished sweep of SPEC."""
    root = tmp_path_factory.mktemp("launched")
    (root / "spec.yaml").write_text(SPEC)
    assert commands.launch(read_spec(str(root / "spec.yaml")), None, str(root / "out"), ask=False) == 0
    return root / "out"


@pytest.fixture
def launched(launched_once, tmp_path):
    """A copy of it in `out`, to be changed."""
    return Path(shutil.copytree(launched_once, tmp_path / "out"))


def job_dirs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_launch_status_collect(main, tmp_path, spec_file):
    launched = main("sweep", "launch", spec_file, "--output_dir", "out", "--jobs", 2)
    assert "2 jobs: 0 done, 0 incomplete, 2 not launched." in launched.stdout
    assert "2 jobs: 2 done, 0 incomplete, 0 not launched." in launched.stdout
    assert len(job_dirs(tmp_path / "out")) == 2
    for folder in job_dirs(tmp_path / "out"):
        records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [0, 5, 10]
        assert not (folder / "model.pkl").exists()
    status = main("sweep", "status", spec_file, "--output_dir", "out").stdout
    assert status.count("Done: ") == 2 and '{"batch_size": 16, "sparsity": 0.3}' in status
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("results.jsonl")}
    main("sweep", "launch", spec_file, "--output_dir", "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("results.jsonl")} == before
    table = main("collect", "--input_dir", "out", "--selection", "training-domain").stdout
    assert "ERM" in table and "Magnitude" in table


def test_folders_are_named_by_what_is_computed_not_by_where_data_lies(tmp_path):
    spec = SweepSpec(["PACS"], ["ERM"], n_hparams=1, n_trials=1, single_test_envs=True)
    jobs = make_jobs(spec, "/somewhere")
    assert [job.name for job in jobs] == [job.name for job in make_jobs(spec, "/elsewhere")]
    assert len({job.name for job in jobs}) == 4
    changed = make_jobs(spec.updated(hparams={"lr": 0.1}), None)
    assert not {job.name for job in jobs} & {job.name for job in changed}
    # A job that DomainBed's own sweep has finished is done here too.
    theirs = tmp_path / jobs[0].domainbed_name("/somewhere")
    theirs.mkdir()
    (theirs / "results.jsonl").write_text("{}\n")
    (theirs / "done").write_text("done")
    assert SweepDirectory(tmp_path, "/somewhere").state(jobs[0]).value == "Done"


def test_trials_can_begin_later():
    spec = SweepSpec(["FullColoredDigits"], ["ERM", "Magnitude"], n_hparams=2, n_trials=5, test_envs=[[2]])
    later = make_jobs(spec.updated(n_trials_from=3), None)
    assert {job.trial_seed for job in later} == {3, 4} and len(later) == 8
    assert [job for job in make_jobs(spec, None) if job.trial_seed >= 3] == later


def test_same_seeds_and_results_as_single_runs(main, tmp_path, spec_file, launched):
    printed = main("sweep", "launch", spec_file, "--output_dir", "other", "--command_launcher", "dummy").stdout
    commands = [line.split(" -m domainbed_sfp ")[1] for line in printed.splitlines() if " train " in line]
    assert len(commands) == 2
    import shlex

    for command in commands:
        main(*shlex.split(command))
    for folder in job_dirs(tmp_path / "other"):
        one, two = (
            json.loads((tmp_path / root / folder.name / "results.jsonl").read_text().splitlines()[-1])
            for root in ("out", "other")
        )
        assert one["env2_in_acc"] == two["env2_in_acc"] and one["args"]["seed"] == two["args"]["seed"]


def _start(tmp_path: Path, spec_file: Path) -> Command:
    return Command("sweep", "launch", spec_file, "--output_dir", "out", "--jobs", 1, folder=tmp_path)


def _wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_interrupted_sweep_continues_in_the_middle_of_a_run(main, tmp_path, spec_file):
    spec_file.write_text(SPEC.replace("steps: 11", "steps: 2001"))
    process = _start(tmp_path, spec_file)
    _wait_for(lambda: list((tmp_path / "out").glob("*/results.jsonl")))
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in out and "Traceback" not in errors
    (checkpoint,) = (tmp_path / "out").glob("*/checkpoint.safetensors")
    status = main("sweep", "status", spec_file, "--output_dir", "out").stdout
    assert "2 jobs: 0 done, 1 incomplete, 1 not launched." in status
    process = _start(tmp_path, spec_file)
    _wait_for(lambda: "Continuing at step" in (checkpoint.parent / "out.txt").read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    deleted = main("sweep", "delete_incomplete", spec_file, "--output_dir", "out", "--skip_confirmation")
    assert "Deleted 1 jobs!" in deleted.stdout and not job_dirs(tmp_path / "out")


def test_a_job_killed_with_sigkill_is_reported_and_continued(main, tmp_path, spec_file):
    spec_file.write_text(
        SPEC.replace("steps: 11\ncheckpoint_freq: 5", "steps: 401\ncheckpoint_freq: 50").replace(
            "  - {name: Magnitude, hparams: {sparsity: 0.3}}\n", ""
        )
    )
    process = _start(tmp_path, spec_file)
    _wait_for(lambda: list((tmp_path / "out").glob("*/results.jsonl")))
    worker = subprocess.run(
        ["pgrep", "-f", f"train .*{job_dirs(tmp_path / 'out')[0].name}"], capture_output=True, text=True
    )
    os.kill(int(worker.stdout.split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1 and "killed by SIGKILL" in errors
    done = main("sweep", "launch", spec_file, "--output_dir", "out")
    assert "1 jobs: 1 done" in done.stdout
    steps = [
        json.loads(line)["step"] for line in (job_dirs(tmp_path / "out")[0] / "results.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(0, 401, 50))


def test_failures_are_reported_with_the_end_of_their_errors_and_the_rest_goes_on(main, tmp_path, spec_file):
    spec_file.write_text(SPEC.replace("sparsity: 0.3", "lr: 1e+30"))
    launched = main("sweep", "launch", spec_file, "--output_dir", "out", check=False)
    assert launched.returncode == 1
    assert "Magnitude diverged: the loss is" in launched.stderr and "exit status 2" in launched.stderr
    assert "2 jobs: 1 done, 0 incomplete, 0 not launched, 1 failed." in launched.stdout
    table = main("collect", "--input_dir", "out").stdout
    assert "the loss is" in table  # the missing cell is explained


def test_two_launches_do_not_run_a_job_twice(tmp_path, spec_file):
    spec_file.write_text(SPEC.replace("steps: 11\ncheckpoint_freq: 5", "steps: 61\ncheckpoint_freq: 30"))
    first, second = _start(tmp_path, spec_file), _start(tmp_path, spec_file)
    for process in (first, second):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "2 jobs: 2 done" in out
    for folder in job_dirs(tmp_path / "out"):
        assert (folder / "out.txt").read_text().count("HParams:") == 1
        steps = [json.loads(line)["step"] for line in (folder / "results.jsonl").read_text().splitlines()]
        assert steps == list(range(0, 61, 30))


def test_a_running_job_is_seen_by_its_lock(tmp_path):
    job = make_jobs(SweepSpec(["ColoredDigits"], ["ERM"], n_hparams=1, n_trials=1, test_envs=[[0]]), None)[0]
    directory = SweepDirectory(tmp_path)
    directory.job_dir(job).mkdir()
    assert directory.state(job).value == "Incomplete"
    with FileLock(directory.job_dir(job) / "run.lock"):
        code = ("import sys; from domainbed_sfp.core import locks; from pathlib import Path;"
                "print(locks.is_held(Path(sys.argv[1])))")  # fmt: skip
        seen = subprocess.run(
            [sys.executable, "-c", code, str(directory.job_dir(job) / "run.lock")], capture_output=True, text=True
        )
        assert seen.stdout.strip() == "True", seen.stderr
    assert directory.state(job).value == "Incomplete"


def test_a_sweep_may_grow_but_not_change_its_protocol(main, tmp_path, spec_file, launched):
    main("sweep", "launch", spec_file, "--output_dir", "out", "--algorithms", "Random")
    manifest = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert sorted({job["algorithm"] for job in manifest["jobs"]}) == ["ERM", "Magnitude", "Random"]
    other = main("sweep", "launch", spec_file, "--output_dir", "out", "--steps", 21, check=False)
    assert_one_line_error(other, "holds another sweep", "steps 11 there, 21 here", "--output_dir")
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == manifest


@pytest.mark.parametrize(
    "text, parts",
    [
        ("datasets: [PACS", ("not valid YAML",)),
        ("just text", ("expected keys",)),
        ("dataset: [PACS]", ("unknown key 'dataset'", "did you mean 'datasets'")),
        ("datasets: PACS", ("datasets is 'PACS'", "expected list")),
        ("datasets: [PACS]", ("no algorithms",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERN]", ("unknown algorithm", "'ERM'", "`domainbed-sfp new`")),
        ("datasets: [FullColoredDigits]\nalgorithms: [{name: ERM, hparam: {}}]", ("hparams: {...}",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [{name: ERM, hparams: {sparsity: 0.5}}]", ("unknown hparam", "'sparsity'")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM, ERM]", ("names a job twice",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\ntest_envs: [[5]]", ("no environment 5",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\nn_trials: 0", ("empty",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\nn_trials_from: 3", ("empty", "n_trials_from 3, n_trials 3")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\nn_trials_from: -1", ("n_trials_from is -1",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\ntest_envs: []", ("empty",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\ntest_envs: [2]", ("test_envs holds 2", "[0] or [0, 1]")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\ntest_envs: [[a]]", ("test_envs holds ['a']",)),
        ("datasets: [[PACS]]\nalgorithms: [ERM]", ("datasets holds ['PACS']",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [{name: ERM, hparams: [1]}]", ("hparams: {...}",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\nsteps: -3", ("--steps", "at least 1", "-3")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\ntask: foo", ("--task", "'foo'")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\nprecision: foo", ("--precision", "'foo'")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\nholdout_fraction: 5", ("--holdout_fraction", "(0, 1)", "5")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\nhparams: {lr: -1}", ("'lr'", "at least 0")),
        ("datasets: [PACS]\nalgorithms: [ERM]", ("--data_dir",)),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERMM]", ("spec.yaml", "did you mean 'ERM'")),
        ("datasets: [FullColoredDigits]\nalgorithms: [{name: SFP, sparsity: .5}]", ("spec.yaml", "{name: NAME, hparams: {...}}")),
        ("datasets: [FullColoredDigits]\nalgorithms: [{name: SFP, hparams: {removal_layers: frist}}]", ("spec.yaml", "'first'")),
        ("datasets: [FullColoredDigits]\nalgorithms: [ERM]\ntest_envs: [[5]]", ("no environment 5", "0 95%, 1 90%, 2 10%")),
    ],
)  # fmt: skip
def test_bad_specs(main, spec_file, text, parts):
    spec_file.write_text(text)
    assert_one_line_error(main("sweep", "launch", spec_file, "--output_dir", "out", check=False), *parts)


@pytest.mark.parametrize(
    "options, parts",
    [
        (("nowhere.yaml",), ("nowhere.yaml", "quickstart")),
        (("quikstart",), ("no sweep spec 'quikstart'", "did you mean 'quickstart'?")),
        (("quickstart", "--command_launcher", "slrm"), ("unknown command launcher", "local")),
        (("quickstart", "--jobs", "0"), ("--jobs", "at least 1")),
        (("quickstart", "--hparams", "{"), ("--hparams", "JSON")),
        (("pacs", "--data_dir", "nowhere"), ("nowhere/PACS",)),
    ],
)
def test_bad_options(main, options, parts):
    assert_one_line_error(main("sweep", "launch", *options, "--output_dir", "out", check=False), *parts)


def test_bad_specs_leave_no_trace(main, tmp_path, spec_file):
    spec_file.write_text(SPEC.replace("steps: 11", "steps: 0"))
    main("sweep", "launch", spec_file, "--output_dir", "out", check=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", '{"jobs": 3}', "{"])
def test_a_damaged_manifest_is_named(main, tmp_path, spec_file, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(text)
    failed = main("sweep", "launch", spec_file, "--output_dir", "out", check=False)
    assert_one_line_error(failed, "out/sweep.json", "remove it")


def test_a_sweep_over_a_folder_is_a_sweep_over_its_images(main, tmp_path):
    for name, n in (("one", 8), ("two", 9)):
        make_tree(tmp_path / name, n=n)
    spec = tmp_path / "folder.yaml"
    spec.write_text(
        "{datasets: [Folder], algorithms: [ERM], test_envs: [[0]], n_hparams: 1, n_trials: 1, steps: 2, "
        "hparams: {image_size: 16, backbone: mnist_cnn, batch_size: 4}}"
    )
    main("sweep", "launch", spec, "--data_dir", "one", "--output_dir", "out", "--command_launcher", "dummy")
    other = main("sweep", "launch", spec, "--data_dir", "two", "--output_dir", "out", check=False)
    assert_one_line_error(other, "holds another sweep", "data of Folder")
    # More data sets may come, in any order, and what is known of each stays.
    spec.write_text(spec.read_text().replace("Folder", "ColoredDigits"))
    main("sweep", "launch", spec, "--output_dir", "out", "--command_launcher", "dummy")
    protocol = json.loads((tmp_path / "out" / "sweep.json").read_text())["protocol"]
    assert protocol["data of ColoredDigits"] == "published" and len(protocol["data of Folder"]) == 16
    spec.write_text(spec.read_text().replace("ColoredDigits", "Folder"))
    again = main("sweep", "launch", spec, "--data_dir", "two", "--output_dir", "out", check=False)
    assert_one_line_error(again, "holds another sweep", "data of Folder")


def test_status_knows_the_jobs_of_a_launched_sweep(main, tmp_path, spec_file, launched):
    with_spec, without = (main("sweep", "status", *spec, "--output_dir", "out") for spec in ([spec_file], []))
    assert without.stdout == with_spec.stdout and "Done: out/" in without.stdout
    told = main("sweep", "status", spec_file, "--output_dir", "nowhere").stderr
    assert "warning: --output_dir nowhere: there is no such folder yet" in told


@pytest.mark.parametrize("left", [None, "", '{"step": 0, "los'])
def test_a_done_run_whose_records_are_gone_is_computed_again(main, tmp_path, spec_file, launched, left):
    results = sorted((tmp_path / "out").glob("*/results.jsonl"))[0]
    whole = results.read_text()
    results.unlink() if left is None else results.write_text(left)
    assert "Incomplete: " in main("sweep", "status", spec_file, "--output_dir", "out").stdout
    main("sweep", "launch", spec_file, "--output_dir", "out")
    assert len(results.read_text().splitlines()) == len(whole.splitlines()) and (results.parent / "done").exists()


def test_a_sweep_over_the_published_images_does_not_go_on_with_others(main, tmp_path, spec_file, monkeypatch):
    make_tree(tmp_path / "data" / "PACS", environments=("art_painting", "cartoon", "photo", "sketch"))
    spec_file.write_text("{datasets: [PACS], algorithms: [ERM], test_envs: [[3]], n_hparams: 1, n_trials: 1, steps: 2}")
    launch = ("sweep", "launch", spec_file, "--data_dir", "data", "--output_dir", "out", "--command_launcher", "dummy")
    with monkeypatch.context() as patch:
        patch.setattr(get_dataset_class("PACS"), "differences", lambda data_dir: [])
        main(*launch)
    again = main(*launch, check=False)
    assert again.returncode == 2 and "holds another sweep (data of PACS 'published' there" in again.stderr


def test_numbers_in_a_spec_are_numbers(spec_file):
    spec_file.write_text("hparams: {lr: 1e-3, weight_decay: 2.5E+2, sparsity: .5, backbone: 1e-x}")
    assert read_spec(str(spec_file)).hparams == {
        "lr": 0.001,
        "weight_decay": 250.0,
        "sparsity": 0.5,
        "backbone": "1e-x",
    }


def test_shipped_specs_are_valid():
    assert {"quickstart", "pacs_small", "pacs", "vlcs", "officehome", "paper"} <= set(shipped_specs())
    counts = {}
    for name in shipped_specs():
        spec = read_spec(name)
        counts[name] = len(make_jobs(spec, None))
    paper = read_spec("paper")
    assert (paper.steps, paper.n_hparams, paper.n_trials) == (5001, 20, 3)
    assert paper.datasets == ["VLCS", "PACS", "OfficeHome"]
    assert counts["paper"] == 3 * 10 * 20 * 3 * len(paper.algorithms)
    with pytest.raises(UserError, match="neither a file"):
        read_spec("nothing")


def test_jobs_share_threads_and_gpus(monkeypatch):
    monkeypatch.setattr(capacity, "usable_cores", lambda: 16)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    seen = [capacity.job_environment(slot, 4, ["3", "7"]) for slot in range(4)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == ["3", "7", "3", "7"]
    assert {environment["OMP_NUM_THREADS"] for environment in seen} == {"4"}
    assert "CUDA_VISIBLE_DEVICES" not in capacity.job_environment(0, 1, [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert {capacity.job_environment(0, 4, [])[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"1"}


@pytest.mark.parametrize(
    "listed, there, names",
    [
        (None, 2, ["0", "1"]),
        ("5,6", 2, ["5", "6"]),
        ("5, 6 ", 2, ["5", "6"]),
        # CUDA stops at the first that is not there; torch counts those before it.
        ("0,,1", 1, ["0"]),
        ("1,-1,0", 1, ["1"]),
        ("0,99", 1, ["0"]),
        ("GPU-4d1c8f3a,GPU-77", 2, ["GPU-4d1c8f3a", "GPU-77"]),
        # One part of a divided GPU is all that a process sees.
        ("MIG-4d1c8f3a,MIG-77", 1, ["MIG-4d1c8f3a"]),
        *((none, 0, []) for none in (None, "", "-1", "NoDevFiles", "0,0", "0")),
    ],
)
def test_gpus_are_those_that_torch_sees(monkeypatch, listed, there, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(capacity.torch.cuda, "device_count", lambda: there)
    assert capacity.visible_gpus() == names
    if not names:
        why = "" if listed is None else re.escape(f" (CUDA_VISIBLE_DEVICES is {listed!r})")
        with pytest.raises(UserError, match=f"multi_gpu: no GPU is visible{why}; use local"):
            local.launch_multi_gpu([], SweepDirectory("nowhere"), 1)


def test_a_compression_that_is_drawn_is_told_at_the_launch(main, spec_file):
    text = "{{datasets: [FullColoredDigits], algorithms: [ERM, {row}, UniformQuant], n_hparams: {n}, n_trials: 1}}"
    launch = ("sweep", "launch", spec_file, "--output_dir", "out", "--command_launcher", "dummy")
    spec_file.write_text(text.format(row="SFP", n=2))
    warnings = main(*launch).stderr.splitlines()
    assert [line.split(":")[1] for line in warnings] == [
        " hparam 'sparsity' is drawn for SFP",
        " hparam 'bits' is drawn for UniformQuant",
    ]
    spec_file.write_text(text.format(row="{name: SFP, hparams: {sparsity: .5}}", n=2))
    assert [line.split(":")[1] for line in main(*launch).stderr.splitlines()] == [
        " hparam 'bits' is drawn for UniformQuant"
    ]
    spec_file.write_text(text.format(row="SFP", n=1))
    assert main(*launch).stderr == ""


def test_status_tells_why_a_run_cannot_go_on(main, spec_file):
    spec_file.write_text(
        "{datasets: [FullColoredDigits], algorithms: [{name: SFP, hparams: {flag_kappa: 1e-9}}], test_envs: [[2]], "
        "n_hparams: 1, n_trials: 1, steps: 20, hparams: {batch_size: 16}}"
    )
    sweep = (spec_file, "--output_dir", "out")
    assert main("sweep", "launch", *sweep, check=False).returncode == 1
    told = main("sweep", "status", *sweep).stdout
    assert "Failed: out/" in told and "failed at step 4: " in told and "no contrast" in told


def test_an_incomplete_copy_of_a_known_data_set_is_told_and_kept_apart(main, tmp_path, spec_file):
    make_tree(tmp_path / "data" / "PACS", environments=("art_painting", "cartoon", "photo", "sketch"), n=9)
    spec_file.write_text(
        "{datasets: [PACS], algorithms: [ERM], test_envs: [[3]], n_hparams: 1, n_trials: 1, steps: 2, checkpoint_freq: 2, "
        "skip_model_save: true, hparams: {image_size: 16, backbone: mnist_cnn, batch_size: 4}}"
    )
    done = main("sweep", "launch", spec_file, "--data_dir", "data", "--output_dir", "out")
    assert "warning: PACS is not the published data set: art_painting has 18 images of 2,048" in done.stderr
    (run,) = (tmp_path / "out").glob("*/results.jsonl")
    digest = json.loads(run.read_text().splitlines()[-1])["data_digest"]
    assert len(digest) == 16
    assert "is not the published data set" in (run.parent / "err.txt").read_text()
    assert f"data {digest}" in main("collect", "--input_dir", "out", "--selection", "training-domain").stdout


def test_delete_incomplete_says_what_it_deletes_and_leaves_what_collect_counts(
    main, tmp_path, spec_file, launched, monkeypatch
):
    one, two = job_dirs(tmp_path / "out")
    for folder in (one, two):
        text = (folder / "results.jsonl").read_text()
        (folder / "results.jsonl").write_bytes(text.removesuffix("\n").replace("\n", "\r\n").encode())
    assert "2 jobs: 2 done" in main("sweep", "status", spec_file, "--output_dir", "out").stdout
    assert "launch 0 jobs" in main("sweep", "launch", spec_file, "--output_dir", "out").stdout
    kept = main("sweep", "delete_incomplete", spec_file, "--output_dir", "out", "--skip_confirmation").stdout
    assert "About to delete 0 jobs: 0 runs, 0 steps, 0.0 MB." in kept and job_dirs(tmp_path / "out") == [one, two]
    (two / "done").unlink()
    (two / "model.pkl").write_bytes(bytes(2_500_000))
    asked = main("sweep", "delete_incomplete", spec_file, "--output_dir", "out", check=False)
    assert "1 run, 11 steps, 2.5 MB" in asked.stdout and two.name in asked.stdout
    assert_one_line_error(asked, "--skip_confirmation")

    # Another machine finishes the run while the user thinks.
    def finished_by_then(*arguments):
        (two / "done").touch()
        return contextlib.nullcontext()

    monkeypatch.setattr("domainbed_sfp.core.locks.hold", finished_by_then)
    late = main("sweep", "delete_incomplete", spec_file, "--output_dir", "out", "--skip_confirmation").stdout
    assert "Deleted 0 jobs!" in late and "Kept 1" in late and two.is_dir()


@pytest.mark.parametrize(
    "options, parts",
    [
        (("--n_trials", 10**12), ("jobs", "at most 1,000,000", "n_trials")),
        (("--n_trials", 10**30), ("--n_trials", "at most")),
        (("--steps", 2**64), ("--steps", "at most")),
        (("--jobs", 2**64), ("--jobs", "at most")),
    ],
)
def test_numbers_beyond_all_bounds(main, spec_file, options, parts):
    assert_one_line_error(main("sweep", "launch", spec_file, "--output_dir", "out", *options, check=False), *parts)


def test_multi_gpu_without_a_gpu_leaves_nothing_behind(main, tmp_path, spec_file, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(capacity.torch.cuda, "device_count", lambda: 0)
    told = main("sweep", "launch", spec_file, "--output_dir", "out", "--command_launcher", "multi_gpu", check=False)
    assert told.returncode == 2 and "no GPU is visible (CUDA_VISIBLE_DEVICES is '-1')" in told.stderr
    assert not (tmp_path / "out").exists()
