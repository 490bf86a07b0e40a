"""The training loop through the command line: records, interruption, resume."""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from image_trees import FOLDER_RUN, make_tree
from processes import Command
from runs_on_disk import RUN, read
from told_errors import assert_one_line_error

from domainbed_sfp.cli import main as cli_main
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.records import VOLATILE_FIELDS

SMALL_BATCHES = ("--hparams", '{"batch_size": 16}')


def stable(folder: Path) -> list[dict]:
    """Records without what may differ between two equal runs in different folders."""
    records = [{k: v for k, v in record.items() if k not in VOLATILE_FIELDS} for record in read(folder)]
    for record in records:
        record["args"] = {k: v for k, v in record["args"].items() if k != "output_dir"}
    return records


def test_files_and_record_fields(cli, tmp_path):
    cli(*RUN, "--steps", 21, "--output_dir", "run")
    folder = tmp_path / "run"
    assert (folder / "done").read_text() == "done"
    assert {"out.txt", "err.txt", "model.pkl", "results.jsonl"} <= set(os.listdir(folder))
    assert not (folder / "checkpoint.safetensors").exists()
    records = read(folder)
    assert [record["step"] for record in records] == [0, 10, 20]
    last = records[-1]
    assert list(last) == sorted(last)
    for env in range(3):
        for split in ("in", "out"):
            assert 0 <= last[f"env{env}_{split}_acc"] <= 1
    assert last["epoch"] == 20 / (480 / 64)  # 599 samples, 119 held out, batches of 64
    for field in ("loss", "step_time", "mem_gb", "wall_time", "images_per_second", "parameters", "macs"):
        assert isinstance(last[field], (int, float)), field
    assert last["args"]["algorithm"] == "Magnitude" and last["args"]["test_envs"] == [2]
    assert last["args"]["hparams"] is None and last["hparams"]["sparsity"] == 0.5
    assert last["final_compression"] is True and records[0]["final_compression"] is False
    assert last["sparsity"] == 0.5 and last["surviving_parameters"] < last["parameters"]
    assert last["environments"] == ["95%", "90%", "10%"] and last["standing"] == "published"
    assert last["environment"]["torch"] == torch.__version__


def test_model_file_loads_without_executing_anything(main, tmp_path):
    main(*RUN, "--steps", 11, "--output_dir", "run", "--save_model_every_checkpoint")
    saved = torch.load(tmp_path / "run" / "model.pkl", weights_only=True)
    assert saved["model_input_shape"] == (3, 8, 8) and saved["model_num_classes"] == 10
    assert saved["model_num_domains"] == 2 and saved["model_hparams"]["batch_size"] == 64
    assert "featurizer.conv1.weight" in saved["model_dict"]
    assert {"model_step0.pkl", "model_step10.pkl"} <= set(os.listdir(tmp_path / "run"))


def test_same_arguments_give_the_same_records_and_another_seed_does_not(main, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(*RUN, *SMALL_BATCHES, "--steps", 11, "--seed", seed, "--skip_model_save", "--output_dir", folder)
    assert stable(tmp_path / "a") == stable(tmp_path / "b")
    assert read(tmp_path / "a")[-1]["loss"] != read(tmp_path / "c")[-1]["loss"]


KILLED = [*map(str, RUN), "--steps", "41", "--skip_model_save", *SMALL_BATCHES]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of KILLED when nobody kills it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.raises(SystemExit) as ended:
        cli_main.main([*KILLED, "--output_dir", str(folder)])
    assert ended.value.code == 0
    return stable(folder)


@pytest.mark.parametrize("kills", [(12,), (3, 25)])
def test_killed_at_any_moment_it_continues_with_identical_records(main, tmp_path, undisturbed, kills):
    """kill -9 once or twice, somewhere between checkpoints; the end is bit-identical to an undisturbed run."""
    for wait_for in kills:
        _start_and_kill(tmp_path, KILLED, "broken", signal.SIGKILL, wait_for)
    main(*KILLED, "--output_dir", "broken")
    assert stable(tmp_path / "broken") == undisturbed


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    arguments = [*map(str, RUN), "--steps", "3001", "--skip_model_save"]
    process, errors = _start_and_kill(tmp_path, arguments, "run", signal.SIGTERM, 10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors and "the same command continues" in errors
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() and not (tmp_path / "run" / "done").exists()


def _start_and_kill(cwd: Path, arguments: list[str], folder: str, number: int, step: int):
    """Starts a run, waits until the record of a step >= `step` is there, and sends it a signal."""
    results = cwd / folder / "results.jsonl"
    process = Command(*arguments, "--output_dir", folder, folder=cwd)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if results.exists() and read(results.parent) and read(results.parent)[-1]["step"] >= step // 10 * 10:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process, errors


def test_sigterm_during_preparation_stops_at_once(main, tmp_path, monkeypatch):
    """While images are decoded, or another job's decoding is waited for, nothing has to be saved."""
    from filelock import FileLock

    make_tree(tmp_path / "tree")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("DOMAINBED_SFP_CACHE", str(cache))
    main(*FOLDER_RUN)
    lock = next(cache.glob("*.lock"))
    shutil.rmtree(cache / lock.stem)
    shutil.rmtree(tmp_path / "run")
    with FileLock(lock):
        process = Command(*FOLDER_RUN, folder=tmp_path)
        out = tmp_path / "run" / "out.txt"
        deadline = time.monotonic() + 60
        while not (out.exists() and "weights:" in out.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """Arguments of a run that tests stop on its way, by its algorithm, and the records of one that nobody stops."""
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training

    @functools.cache
    def made(algorithm: str):
        own = {"backbone": "mnist_cnn_bn", "policy_lr": 0.1} if algorithm == "DQMQ" else {}
        arguments = {"dataset": "FullColoredDigits", "algorithm": algorithm, "test_envs": [2], "checkpoint_freq": 5,
                     "steps": 11, "skip_model_save": True, "hparams": json.dumps({"batch_size": 16, **own})}  # fmt: skip
        folder = tmp_path_factory.mktemp("whole") / "run"
        training.train(RunSettings(**arguments, output_dir=str(folder)))
        return arguments, stable(folder)

    return made


@pytest.mark.parametrize(
    "algorithm, moment",
    [
        *(
            ("Magnitude", moment)
            for moment in ("recorder.evaluate", "console.Console.row", "loop.update", "state.State.save")
        ),
        # Its widths of evaluation are fitted before each one, and begin from those of the last.
        ("DQMQ", "recorder.evaluate"),
    ],
)
def test_a_stop_at_any_moment_loses_and_repeats_nothing(tmp_path, monkeypatch, stopped_run, algorithm, moment):
    """SIGTERM while a step is computed, evaluated, recorded or saved: the records end as those of an undisturbed run."""
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training
    from domainbed_sfp.training.interruption import Interrupted

    arguments, whole = stopped_run(algorithm)
    place, name = moment.rsplit(".", 1)
    place = pkgutil.resolve_name(f"domainbed_sfp.training.{place}")
    plain, calls = getattr(place, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(Interrupted, match="of 11; the same command continues"):
            training.train(RunSettings(**arguments, output_dir=str(tmp_path / "broken")))
    assert (tmp_path / "broken" / "checkpoint.safetensors").exists()
    training.train(RunSettings(**arguments, output_dir=str(tmp_path / "broken")))
    assert stable(tmp_path / "broken") == whole


def test_an_unforeseen_error_is_in_err_txt(tmp_path, monkeypatch):
    from domainbed_sfp.algorithms.objectives.erm import ERM
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training

    monkeypatch.setattr(ERM, "predict", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.train(RunSettings(dataset="ColoredDigits", steps=2, output_dir=str(tmp_path / "run")))
    assert "ZeroDivisionError" in (tmp_path / "run" / "err.txt").read_text()


def test_a_torn_record_is_repaired_on_resume(main, tmp_path, undisturbed):
    _start_and_kill(tmp_path, KILLED, "broken", signal.SIGKILL, 10)
    with open(tmp_path / "broken" / "results.jsonl", "a") as file:
        file.write('{"step": 20, "los')
    main(*KILLED, "--output_dir", "broken")
    assert stable(tmp_path / "broken") == undisturbed


def test_done_is_not_done_again_and_other_arguments_are_refused(main, tmp_path):
    main(*RUN, "--steps", 11, "--output_dir", "run")
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert "already done" in main(*RUN, "--steps", 11, "--output_dir", "run").stdout
    other = main(*RUN, "--steps", 21, "--output_dir", "run", check=False)
    assert_one_line_error(other, "another run", "steps 11 there, 21 here")
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before


def _stopped_in_its_first_evaluation(monkeypatch, **arguments):
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training
    from domainbed_sfp.training.interruption import Interrupted

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr("domainbed_sfp.training.recorder.evaluate", stopped)
        with pytest.raises(Interrupted, match="stopped at step 0"):
            training.train(RunSettings(**arguments))


def test_a_run_stopped_before_its_first_record_is_known_by_its_checkpoint(tmp_path, monkeypatch):
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training

    folder = str(tmp_path / "run")
    arguments = {"dataset": "FullColoredDigits", "steps": 3, "checkpoint_freq": 2, "output_dir": folder,
                 "hparams": '{"lr": 0.01, "batch_size": 16}'}  # fmt: skip
    _stopped_in_its_first_evaluation(monkeypatch, **arguments)
    assert not (tmp_path / "run" / "results.jsonl").read_text()
    for other in (
        {"hparams": '{"lr": 0.001, "batch_size": 16}'},
        {"seed": 5},
        {"test_envs": [2]},
        {"algorithm": "Mixup"},
    ):
        with pytest.raises(UserError, match=f"holds another run .{next(iter(other))}"):
            training.train(RunSettings(**{**arguments, **other}))
    # Where a run is computed and which files it leaves does not make it another one.
    elsewhere = {"device": "cpu", "skip_model_save": True, "save_model_every_checkpoint": True}
    training.train(RunSettings(**{**arguments, **elsewhere}))
    assert [record["step"] for record in read(tmp_path / "run")] == [0, 2] and (tmp_path / "run" / "done").exists()


def test_a_run_begun_on_an_incomplete_copy_does_not_go_on_with_the_whole(tmp_path, monkeypatch):
    from domainbed_sfp.data import get_dataset_class
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training

    make_tree(tmp_path / "PACS", environments=("art_painting", "cartoon", "photo", "sketch"))
    arguments = {"dataset": "PACS", "data_dir": str(tmp_path), "steps": 2, "output_dir": str(tmp_path / "run"),
                 "hparams": FOLDER_RUN[-1]}  # fmt: skip
    _stopped_in_its_first_evaluation(monkeypatch, **arguments)
    monkeypatch.setattr(get_dataset_class("PACS"), "differences", lambda data_dir: [])
    with pytest.raises(UserError, match="a run on other images than those in"):
        training.train(RunSettings(**arguments))


def test_every_checkpoints_model_is_there_after_a_kill(tmp_path, monkeypatch):
    from domainbed_sfp.runs import checkpoints
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training

    arguments = {"dataset": "ColoredDigits", "steps": 5, "checkpoint_freq": 2, "save_model_every_checkpoint": True,
                 "output_dir": str(tmp_path / "run"), "hparams": '{"batch_size": 16}'}  # fmt: skip
    plain, calls = checkpoints.save_checkpoint, []

    def killed(*args):
        plain(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train(RunSettings(**arguments))
    training.train(RunSettings(**arguments))
    assert {path.name for path in (tmp_path / "run").glob("*.pkl")} == {
        "model_step0.pkl", "model_step2.pkl", "model_step4.pkl", "model.pkl",
    }  # fmt: skip


def test_moments_keep_their_order_in_memory(tmp_path):
    """Where parameters are channels_last, an optimizer whose moments are not is half as fast."""
    from domainbed_sfp.algorithms import registry
    from domainbed_sfp.runs import checkpoints
    from domainbed_sfp.training import hparams

    def made():
        values = hparams.resolve_hparams("ERM", "FullColoredDigits", 0, 0, {"backbone": "mnist_cnn_bn"})
        algorithm = registry.get("ERM").cls((3, 8, 8), 10, 2, values).to(memory_format=torch.channels_last)
        x = torch.rand(4, 3, 8, 8)
        return algorithm, lambda: algorithm.update([(x, torch.arange(4))] * 2)

    algorithm, update = made()
    update()
    checkpoints.save_checkpoint(tmp_path / "checkpoint", algorithm, {})
    other, _ = made()
    checkpoints.load_checkpoint(tmp_path / "checkpoint", other)
    for mine, theirs in zip(algorithm.network.parameters(), other.network.parameters()):
        for slot, value in algorithm.optimizer.state[mine].items():
            restored = other.optimizer.state[theirs][slot]
            assert torch.equal(value, restored) and value.stride() == restored.stride(), slot


def test_a_loss_that_is_not_finite_stops_the_run_with_a_record(main, tmp_path):
    failed = main("train", "--dataset", "ColoredDigits", "--steps", 50, "--checkpoint_freq", 5, "--output_dir", "run",
                 "--hparams", '{"lr": 1e30}', check=False)  # fmt: skip
    assert_one_line_error(failed, "diverged", "the loss is", "'lr'")
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["step"] >= 1 and "loss" in failure["error"]
    assert read(tmp_path / "run")[0]["step"] == 0 and not (tmp_path / "run" / "done").exists()


def test_a_run_that_cannot_go_on_says_why_where_status_looks(main, tmp_path):
    with pytest.warns(UserWarning, match="0% of the samples of training domain [01] are flagged"):
        failed = main(*RUN[:1], "--dataset", "FullColoredDigits", "--algorithm", "SFP", "--test_envs", 2, "--steps", 20,
                      "--hparams", '{"flag_kappa": 1e-9, "batch_size": 16}', "--output_dir", "run", check=False)  # fmt: skip
    assert_one_line_error(failed, "no contrast")
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["step"] == 4 and "no contrast" in failure["error"]


def test_columns_are_headed_anew_where_they_change(main):
    """SFP measures more once it prunes; numbers must stand under their own names."""
    printed = main("train", "--dataset", "FullColoredDigits", "--algorithm", "SFP", "--test_envs", 2, "--steps", 21,
                   "--checkpoint_freq", 5, "--hparams", '{"batch_size": 16}', "--output_dir", "run").stdout  # fmt: skip
    lines = [line.split() for line in printed.splitlines()]
    heads = [at for at, line in enumerate(lines) if line[:1] == ["dense_macs"]]
    assert len(heads) >= 2
    records = []
    for line in lines[heads[0] :]:
        if line[:1] == ["dense_macs"]:
            names = line
        elif line and re.fullmatch(r"[\d.]+", line[0]) and len(line) == len(names):
            records.append(dict(zip(names, line)))
    written = read(Path("run"))
    assert len(records) == len(written)
    for shown, record in zip(records, written):
        assert shown["step"] == str(record["step"])
        assert float(shown["env0_in_acc"]) == pytest.approx(record["env0_in_acc"], abs=1e-9)


def test_domain_adaptation_splits_and_class_balance(main, tmp_path):
    main("train", "--dataset", "RotatedDigits", "--steps", 3, "--test_envs", 0, 1, "--task", "domain_adaptation",
        "--uda_holdout_fraction", 0.5, "--hparams", '{"class_balanced": true, "batch_size": 16}', "--output_dir", "run")  # fmt: skip
    last = read(tmp_path / "run")[-1]
    assert {"env0_uda_acc", "env1_uda_acc"} <= set(last) and "env2_uda_acc" not in last


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_precision(main, tmp_path, precision):
    main(*RUN, *SMALL_BATCHES, "--steps", 11, "--precision", precision, "--output_dir", "run")
    last = read(tmp_path / "run")[-1]
    assert last["precision"] in (("bf16",) if precision == "bf16" else ("bf16", "fp32"))
    assert last["loss"] < read(tmp_path / "run")[0]["loss"]


@pytest.mark.parametrize("capability, expected", [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_is_bf16_where_a_gpu_computes_it(monkeypatch, capability, expected):
    from domainbed_sfp.networks.precision import choose_precision

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_precision("auto", torch.device("cuda"), torch.nn.Linear(2, 2)) == expected
