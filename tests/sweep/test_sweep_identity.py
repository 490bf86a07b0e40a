"""What makes two jobs, runs and rows the same: names frozen by golden files, settings by value and not by spelling."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from told_errors import assert_one_line_error

from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.networks import MNIST_CNN
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs, read_spec, shipped_specs

RESULTS = Path(__file__).parents[2] / "results"


def _digest(names) -> str:
    return hashlib.md5(" ".join(names).encode()).hexdigest()


def test_jobs_of_the_shipped_specs_keep_their_names_and_folders(golden):
    frozen = golden("job_names.json")["specs"]
    assert set(frozen) <= set(shipped_specs())
    for name, expected in frozen.items():
        jobs = make_jobs(read_spec(name), "/data")
        assert {
            "jobs": len(jobs),
            "names": _digest(job.name for job in jobs),
            "domainbed_names": _digest(job.domainbed_name("/data") for job in jobs),
        } == expected, name


@pytest.mark.parametrize("manifest", sorted(RESULTS.glob("*/sweep.json")), ids=lambda path: path.parent.name)
def test_committed_sweeps_keep_their_folders(manifest):
    directory = SweepDirectory(manifest.parent)
    listed = [entry["name"] for entry in json.loads(manifest.read_text())["jobs"]]
    jobs = directory.listed()
    assert [directory.job_dir(job).name for job in jobs] == listed
    assert [job.name for job in jobs] == listed


@pytest.mark.parametrize("records", sorted(RESULTS.glob("*/packed-*/results.jsonl")), ids=lambda path: path.parts[-3])
def test_committed_records_name_no_place_of_a_machine(records):
    for line in records.read_text(encoding="utf-8").splitlines():
        args = json.loads(line)["args"]
        for name in ("data_dir", "output_dir"):
            assert not Path(args.get(name) or "").is_absolute(), f"{name} {args[name]}: run from the checkout's root"


def _job(hparams: dict, **changes):
    spec = SweepSpec(["RotatedDigits"], ["ERM"], test_envs=[[0]], n_hparams=1, n_trials=1, steps=2, hparams=hparams)
    (job,) = make_jobs(spec.updated(**changes), None)
    return job


SPELLINGS = [{"weight_decay": w, "batch_size": b} for w in (0, 0.0, -0.0) for b in (8, 8.0)]


def test_a_job_is_named_by_values_not_by_how_they_are_written():
    jobs = [_job(hparams) for hparams in SPELLINGS]
    assert len({job.name for job in jobs}) == 1 and len(set(jobs)) == 1
    assert jobs[0].hparams == '{"batch_size": 8, "weight_decay": 0.0}'
    assert _job({"batch_size": 16}).name != _job({"batch_size": 8}).name
    assert _job({}, uda_holdout_fraction=0).name == _job({}, uda_holdout_fraction=0.0).name


@pytest.mark.parametrize("kind", ["name", "domainbed_name"])
def test_folders_of_earlier_versions_are_found_however_their_numbers_were_written(golden, tmp_path, kind):
    for text, frozen in golden("job_names.json")["spelled"].items():
        folder = tmp_path / frozen[kind]
        folder.mkdir()
        (folder / "results.jsonl").write_text("{}")
        (folder / "done").touch()
        given = json.loads(text)
        for spelled in (given, {name: float(value) for name, value in given.items()}):
            assert SweepDirectory(tmp_path).job_dir(_job(spelled)) == folder, text
            assert SweepDirectory(tmp_path).state(_job(spelled)).value == "Done"
        shutil.rmtree(folder)


def test_the_same_settings_are_not_computed_again_and_are_one_row(main, tmp_path):
    sweep = ("sweep", "launch", "--datasets", "ColoredDigits", "--algorithms", "ERM", "--single_test_envs",
             "--n_hparams", 1, "--n_trials", 1, "--steps", 1, "--skip_model_save", "--output_dir", "out")  # fmt: skip
    main(*sweep, "--hparams", '{"weight_decay": 0, "batch_size": 8}', "--jobs", 2)
    again = main(*sweep, "--hparams", '{"weight_decay": 0.0, "batch_size": 8.0}').stdout
    assert "About to launch 0 jobs." in again
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["jobs"]) == 3
    # A run of an earlier version, which recorded what it was given.
    run = next((tmp_path / "out").glob("*/results.jsonl"))
    records = [json.loads(line) for line in run.read_text().splitlines()]
    for record in records:
        record["args"]["hparams"] = '{"batch_size": 8.0, "weight_decay": 0}'
    run.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = main("collect", "--input_dir", "out", "--selection", "training-domain").stdout
    assert table.count("\n| ERM") == 1 and "missing" not in table and " X " not in table


def test_a_run_goes_on_under_other_words_for_the_same(main, tmp_path):
    run = ("train", "--dataset", "ColoredDigits", "--skip_model_save", "--output_dir", "run", "--test_envs")
    main(*run, 0, 2, "--steps", 1, "--hparams", '{"batch_size": 8.0, "weight_decay": 0}')
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    assert json.loads(record["args"]["hparams"]) == {"batch_size": 8, "weight_decay": 0.0}
    assert '"weight_decay": 0.0' in record["args"]["hparams"] and type(record["hparams"]["weight_decay"]) is float
    same = ("--steps", 1, "--hparams", '{"weight_decay": 0.0, "batch_size": 8}')
    assert "already done" in main(*run, 2, 0, *same).stdout
    steps = get_dataset_class("ColoredDigits").N_STEPS
    record["args"]["steps"] = steps
    (tmp_path / "run" / "results.jsonl").write_text(json.dumps(record))
    assert "already done" in main(*run, 0, 2, *same[2:]).stdout
    other = main(*run, 0, 2, "--hparams", '{"batch_size": 9, "weight_decay": 0}', check=False)
    assert_one_line_error(other, "holds another run", "hparams")


@pytest.mark.parametrize(
    "text, name",
    [
        ("n_trials: 1\nn_trials: 2", "'n_trials' is given twice (lines 4 and 5)"),
        ("hparams: {lr: 0.1}\nhparams: {batch_size: 8}", "'hparams' is given twice"),
        ("hparams: {lr: 0.1, lr: 0.2}", "'lr' is given twice (line 4)"),
        ("algorithms: [ERM, {name: SFP, hparams: {sparsity: 0.1, 'sparsity': 0.2}}]", "'sparsity' is given twice"),
        ("algorithms: [{name: ERM, name: Random}]", "'name' is given twice"),
        ("hparams:\n  lr: 0.1\n  # later\n  lr: 0.2", "'lr' is given twice (lines 5 and 7)"),
        ("algorithms: [{name: ERM, hparams: {batch_size: 8}}, {name: ERM, hparams: {batch_size: 8.0}}]", "algorithms holds ERM"),
        ("algorithms: [ERM, {name: ERM}]", "algorithms holds ERM twice"),
        ("datasets: [ColoredDigits, ColoredDigits]", "datasets holds ColoredDigits twice"),
        ("test_envs: [[0], [0]]", "test_envs holds [0] twice"),
        ("test_envs: [[0, 1], [2], [1, 0]]", "test_envs holds [0, 1] twice"),
        ("steps: " + "9" * 5000, "not valid YAML"),
    ],
)  # fmt: skip
def test_what_a_spec_says_twice_is_an_error(main, tmp_path, text, name):
    lines = {"datasets": "[ColoredDigits]", "algorithms": "[ERM]", "single_test_envs": "true"}
    given = text.split(":")[0]
    spec = "".join(f"{key}: {value}\n" for key, value in lines.items() if key != given) + "# more\n" * (given in lines)
    (tmp_path / "spec.yaml").write_text(spec + text + "\n")
    refused = main("sweep", "launch", "spec.yaml", "--output_dir", "out", check=False)
    assert_one_line_error(refused, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, parts",
    [
        ('{"lr": 0.1, "lr": 0.2}', ("--hparams", "'lr'", "twice")),
        ('{"lr": 1' + "0" * 5000 + "}", ("--hparams",)),
        ('{"lr": 1' + "0" * 400 + "}", ("'lr'", "expected a number")),
        ('{"batch_size": 1e30}', ("'batch_size'", "at most")),
        ('{"lr": ' * 20000 + "1" + "}" * 20000, ("--hparams",)),
        ('{"lr": "1e-3"}', ("'lr'", "expected a number", "'1e-3'")),
        ('{"lr": true}', ("'lr'", "expected a number", "True")),
        ('{"data_augmentation": 1}', ("'data_augmentation'", "true or false")),
    ],
)
def test_hparams_that_cannot_be(main, text, parts):
    for command in (("train", "--dataset", "ColoredDigits"), ("sweep", "launch", "quickstart")):
        refused = main(*command, "--hparams", text, "--output_dir", "out", check=False)
        assert_one_line_error(refused, *parts)


@pytest.mark.parametrize(
    "flag, values", [("--hparams", ['{"lr": 0.1}', '{"batch_size": 8}']), ("--algorithms", ["ERM", "SFP"])]
)
def test_flags_that_would_replace_each_other_are_refused(main, flag, values):
    repeated = [word for value in values for word in (flag, value)]
    refused = main("sweep", "launch", "--datasets", "ColoredDigits", *repeated, "--output_dir", "out", check=False)
    assert refused.returncode == 2 and f"argument {flag}: given twice" in refused.stderr


def test_counts_may_be_whole_floats(tmp_path):
    text = "{datasets: [ColoredDigits], algorithms: [ERM], test_envs: [[0.0]], n_hparams: 1, n_trials: 1.0, steps: 2e0}"
    (tmp_path / "spec.yaml").write_text(text)
    (job,) = make_jobs(read_spec(str(tmp_path / "spec.yaml")), None)
    assert (job.test_envs, job.steps) == ([0], 2) and type(job.steps) is int


def test_weights_replaced_under_the_same_path_are_noticed(main, tmp_path):
    def write(seed: int) -> None:
        network = MNIST_CNN((2, 8, 8))
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data.normal_(generator=generator)
        torch.save(network.state_dict(), tmp_path / "w.pth")

    write(0)
    sweep = ("sweep", "launch", "--datasets", "ColoredDigits", "--algorithms", "ERM", "--steps", 1, "--n_hparams", 1,
             "--single_test_envs", "--hparams", '{"weights": "w.pth"}', "--output_dir", "out", "--n_trials")  # fmt: skip
    main(*sweep, 1)
    run = next((tmp_path / "out").glob("*/results.jsonl"))
    record = json.loads(run.read_text())
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:12]
    assert record["weights_digest"] == digest
    assert f"weights w.pth (hash {digest})" in main("collect", "--input_dir", "out").stdout
    write(1)
    assert_one_line_error(main(*sweep, 2, check=False), "holds another sweep", "weights w.pth", digest)
    args = record["args"]
    again = main(
        "train", "--dataset", "ColoredDigits", "--steps", 1, "--seed", args["seed"], "--test_envs", *args["test_envs"],
        "--hparams", '{"weights": "w.pth"}', "--output_dir", run.parent, check=False,
    )  # fmt: skip
    assert_one_line_error(again, "began from other weights", digest)
