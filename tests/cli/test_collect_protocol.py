"""Environments, protocol and published rows in `collect`'s tables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs_on_disk import record, write_run
from searched_runs import GOLDEN, ROOT, accuracies, three_trials

from domainbed_sfp.analysis import published

# --- environments and protocol
# -------------------------------------------------------------------------------


def test_environments_are_named_by_the_records_then_by_domainbed(tmp_path, table):
    write_run(tmp_path, "run", [record((0.1,) * 4, environments=["ink", "oil"])])
    assert table(tmp_path)["environments"] == ["ink", "oil"]
    write_run(tmp_path, "run", [record((0.1,) * 8, dataset="PACS")])
    assert table(tmp_path)["environments"] == ["A", "C", "P", "S"]


def test_mixed_protocols_are_warned_of(tmp_path, table):
    three_trials(tmp_path)
    write_run(tmp_path, "a0", [record((0.5, 0, 0, 0.5), hparams={"image_size": 64}, precision="bf16")])
    notes = table(tmp_path)["notes"]
    assert "Warning: this table mixes protocols, image size: 224 in 5 runs, 64 in 1 runs." in notes
    assert "Warning: this table mixes protocols, precision: fp32 in 5 runs, bf16 in 1 runs." in notes


def test_the_protocol_line(tmp_path, collect):
    three_trials(tmp_path, commit="0123456789abcdef", hparams={"weights": "none", "image_size": 64})
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert (
        "Protocol: training-domain validation set selection; 301 steps; backbone resnet18; weights none; "
        "64 px images; default hparams x 3 trials (seeds 0-2); held-out fraction 0.2; precision fp32; commit "
        "0123456789ab; collected by domainbed_sfp "
    ) in out


def test_the_protocol_line_tells_the_hparams_all_runs_were_given(tmp_path, collect):
    given = '{"lr": 0.001, "image_size": 64, "sparsity": %s}'
    for number, sparsity in enumerate((0.3, 0.5)):
        for env in range(2):
            run = record((0.5, 0.6, 0.7, 0.8), test_envs=(env,))
            run["args"]["hparams"] = given % sparsity
            write_run(tmp_path, f"{number}{env}", [run])
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "default hparams with lr=0.001 x 1 trial" in out and "(sparsity=0.3)" in out


def test_input_size_is_the_networks_not_the_hparams(tmp_path, collect):
    """The hparam `image_size` says nothing about digits: the record's own shape does."""
    three_trials(tmp_path, input_shape=[3, 8, 8], hparams={"weights": "none", "image_size": 224})
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "8 px images" in out and "224 px" not in out


@pytest.mark.parametrize(
    ("dataset", "shape", "hparams", "told"),
    [
        # Named: whatever the data set and its size.
        ("PACS", None, {"backbone": "mnist_cnn"}, "backbone MNIST_CNN; weights none; 224 px"),
        (
            "PACS",
            [3, 64, 64],
            {"backbone": "mnist_cnn", "weights": "imagenet"},
            "backbone MNIST_CNN; weights none; 64 px",
        ),
        (
            "PACS",
            [3, 64, 64],
            {"backbone": "mnist_cnn", "weights": "w/begun.pt"},
            "backbone MNIST_CNN; weights begun.pt",
        ),
        # Automatic: by the recorded shape, and by the data set's name only where there is none.
        ("Folder", [3, 28, 28], {"backbone": "auto"}, "backbone MNIST_CNN; weights none; 28 px"),
        ("Tiny", [1, 8, 8], {}, "backbone MNIST_CNN; weights none; 8 px"),
        ("Folder", [3, 29, 29], {"backbone": "auto"}, "backbone resnet18; weights imagenet; 29 px"),
        ("ColoredDigits", [2, 64, 64], {}, "backbone resnet18; weights imagenet; 64 px"),
        ("ColoredDigits", None, {}, "backbone MNIST_CNN; weights none"),
        ("Folder", [3, 28, 28], {"backbone": "resnet18"}, "backbone resnet18; weights imagenet; 28 px"),
    ],
)
def test_backbone_of_small_images(tmp_path, collect, dataset, shape, hparams, told):
    facts = {} if shape is None else {"input_shape": shape}
    write_run(tmp_path, "run", [record((0.5, 0.6, 0.7, 0.8), dataset=dataset, hparams=hparams, **facts)])
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert told in out


def test_unusual_hparams_of_the_protocol_are_told(tmp_path, table, collect):
    three_trials(tmp_path, hparams={"class_balanced": True, "data_augmentation": True})
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "; class balanced true; " in out and "data augmentation" not in out
    write_run(tmp_path, "a0", [record((0.5, 0, 0, 0.5))])
    warning = "Warning: this table mixes protocols, class balanced: true in 5 runs, false in 1 runs."
    assert warning in table(tmp_path)["notes"]


# --- published rows
# ------------------------------------------------------------------------------------------

TORCHVISION_R50 = {"resnet18": False, "resnet50_augmix": False, "freeze_bn": True, "weights": "imagenet"}


def pacs(directory: Path, hparams: dict, steps: int | None = 5001, args: dict | None = None, **fields) -> None:
    """Without steps asked for, the last record of a finished run tells them."""
    args = {"steps": steps, **(args or {})}
    for env in range(4):
        one = record((0.85,) * 8, dataset="PACS", test_envs=(env,), step=5000, hparams=hparams, args=args, **fields)
        write_run(directory, f"run{env}", [one])


@pytest.mark.parametrize("hparams", [TORCHVISION_R50, {**TORCHVISION_R50, "backbone": "resnet50", "resnet18": True}])
@pytest.mark.parametrize("steps", [5001, None])
def test_published_rows_of_the_same_protocol_are_added(tmp_path, table, collect, hparams, steps):
    pacs(tmp_path, hparams, steps)
    published = ("--published", GOLDEN / "published_sample.csv")
    only = table(tmp_path, *published)
    measured, erm, irm = only["rows"]
    assert (measured["label"], measured["source"]) == ("ERM", None)
    assert (erm["algorithm"], erm["standing"], erm["source"]) == (
        "ERM",
        "published",
        "DomainBed official results",
    )
    assert accuracies(erm) == [84.7, 80.8, 97.2, 79.3]
    assert erm["average"] == {"accuracy": 85.5, "std_err": 0.2, "trials": None}
    assert erm["worst"]["environment"] == "S"
    assert accuracies(irm) == [None] * 4 and irm["average"]["accuracy"] == 83.5
    assert only["notes"] == [
        "1 published row for PACS not added: made with resnet50 (augmix), these runs with resnet50 (tv V1, frozen BN).",
        "Our rows beside the published ones are from default hparams x 1 trial (seeds 0).",
    ]
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain", *published)
    assert "ERM [published]" in out and "[published]: as printed by DomainBed official results." in out


@pytest.mark.parametrize(
    ("hparams", "steps", "reason"),
    [
        (TORCHVISION_R50, 300, "their protocol has 5,001 steps, these runs 300."),
        ({**TORCHVISION_R50, "image_size": 64}, 5001, "their protocol has images of 224 px, these runs 64."),
        ({**TORCHVISION_R50, "freeze_bn": False}, 5001, "these runs with resnet50 (tv V1)."),
        ({**TORCHVISION_R50, "weights": "none"}, 5001, "their protocol has the weights imagenet, these runs none."),
        ({**TORCHVISION_R50, "resnet18": True}, 5001, "these runs with resnet18 (frozen BN)."),
    ],
)
def test_published_rows_of_another_protocol_are_not(tmp_path, table, hparams, steps, reason):
    pacs(tmp_path, hparams, steps)
    only = table(tmp_path, "--published", GOLDEN / "published_sample.csv")
    assert [row["standing"] for row in only["rows"]] == [None]
    assert len(only["notes"]) == 1 and "published row" in only["notes"][0] and only["notes"][0].endswith(reason)


DEFAULTS = {"data_augmentation": True, "class_balanced": False, "nonlinear_classifier": False}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"args": {"holdout_fraction": 0.1}}, "a held-out fraction of 0.2, these runs 0.1."),
        ({"precision": "bf16"}, "the precision fp32, these runs bf16."),
        ({"args": {"task": "domain_adaptation"}}, "the task domain_generalization, these runs domain_adaptation."),
        ({"hparams": {"data_augmentation": False}}, "data augmentation, these runs false."),
        ({"hparams": {"class_balanced": True}}, "no class balance (class_balanced false), these runs true."),
        (
            {"hparams": {"nonlinear_classifier": True}},
            "a linear classifier (nonlinear_classifier false), these runs true.",
        ),
    ],
)
def test_published_rows_match_on_the_whole_protocol(tmp_path, table, changed, reason):
    hparams = {**TORCHVISION_R50, **DEFAULTS}
    pacs(tmp_path / "same", hparams, precision="fp32")
    asked = ("--published", GOLDEN / "published_sample.csv")
    assert len(table(tmp_path / "same", *asked)["rows"]) == 3
    pacs(tmp_path / "other", {**hparams, **changed.pop("hparams", {})}, **changed)
    only = table(tmp_path / "other", *asked)
    assert [row["standing"] for row in only["rows"]] == [None]
    assert only["notes"] == [f"No published rows: 3 for PACS were not added, their protocol has {reason}"]


def test_draws_and_trials_beside_published_rows_are_told(tmp_path, table):
    for seed in range(2):
        for trial in range(3):
            for env in range(4):
                one = record((0.85,) * 8, dataset="PACS", test_envs=(env,), step=5000, hparams=TORCHVISION_R50,
                             args={"steps": 5001}, hparams_seed=seed, trial_seed=trial)  # fmt: skip
                write_run(tmp_path, f"{seed}{trial}{env}", [one])
    only = table(tmp_path, "--published", GOLDEN / "published_sample.csv")
    assert len(only["rows"]) == 3
    expected = "Our rows beside the published ones are from 2 hparams draws (seeds 0-1) x 3 trials (seeds 0-2)."
    assert expected in only["notes"]


def test_augmix_runs_stand_beside_augmix_rows_only(tmp_path, table):
    pacs(tmp_path, {**TORCHVISION_R50, "resnet50_augmix": True, "freeze_bn": False})
    rows = table(tmp_path, "--published", GOLDEN / "published_sample.csv")["rows"]
    assert [row["algorithm"] for row in rows] == ["ERM", "RDM"]


def test_published_files_that_are_none(tmp_path, collect):
    pacs(tmp_path / "sweep", TORCHVISION_R50)
    given = ("--input_dir", tmp_path / "sweep", "--published", tmp_path / "rows.csv")
    assert f"--published: no file {tmp_path / 'rows.csv'}" in collect(*given)[2]
    (tmp_path / "rows.csv").write_text("algorithm,dataset\n")
    assert "no column 'test_domain'" in collect(*given)[2]
    text = (GOLDEN / "published_sample.csv").read_text()
    (tmp_path / "rows.csv").write_text(text.replace("80.8", "many"))
    status, _, err = collect(*given)
    assert status == 2 and "rows.csv, line 3: could not convert string to float: 'many'" in err
    (tmp_path / "rows.csv").write_text(text + text.splitlines()[1] + "\n")
    status, _, err = collect(*given)
    assert status == 2 and "is given twice" in err and "rows.csv, line" in err


def test_the_default_published_file_is_the_checkouts(tmp_path, table):
    pacs(tmp_path, TORCHVISION_R50)
    rows = table(tmp_path, "--published")["rows"]
    assert ("ERM", 85.5) in [(row["algorithm"], row["average"]["accuracy"]) for row in rows if row["source"]]


def test_the_default_published_file_is_the_packages_before_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "__file__", str(tmp_path / "domainbed_sfp" / "analysis" / "published.py"))
    for place in ("results", "domainbed_sfp/published_rows"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "published.csv").write_text("")
        assert published.find_published("") == tmp_path / place / "published.csv"


def test_an_installed_package_has_the_published_rows(tmp_path):
    pytest.importorskip("setuptools")
    source, built = tmp_path / "source", tmp_path / "built"
    for folder in ("domainbed_sfp", "sweeps", "results"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "README.md"):
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)], cwd=source, check=True)
    (package,) = built.iterdir()
    assert [path.name for path in (package / "published_rows").iterdir()] == ["published.csv"]
    asked = "from domainbed_sfp.analysis.published import find_published as find; print(find(''))"
    environment = {**os.environ, "PYTHONPATH": str(built)}
    found = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert found.stdout.strip() == str(package / "published_rows" / "published.csv"), found.stderr
