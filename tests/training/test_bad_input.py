"""What a run refuses in one line, and users' own folders of images."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from image_trees import FOLDER_RUN, make_tree
from runs_on_disk import RUN, read
from told_errors import assert_one_line_error


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (("--algorithm", "Magnitud"), ("unknown algorithm", "did you mean 'Magnitude'")),
        (("--algorithm", "path/to/method.py"), ("`domainbed-sfp new`", "works with `domainbed-sfp check` only")),
        (("--dataset", "pacs"), ("unknown data set", "did you mean 'PACS'")),
        (("--hparams", '{"sparsty": 0.5}', "--algorithm", "Magnitude"), ("unknown hparam", "did you mean 'sparsity'")),
        (("--hparams", '{"lr": 0.1'), ("--hparams", "not valid JSON", "character")),
        (("--hparams", "[1]"), ("--hparams", "object")),
        (("--hparams", '{"lr": "fast"}'), ("'lr'", "expected a number", "'fast'")),
        (("--hparams", '{"sparsity": 1.0}', "--algorithm", "Magnitude"), ("'sparsity'", "[0, 1)", "1.0")),
        (("--hparams", '{"prune_start": 0.9}', "--algorithm", "Magnitude"), ("ends before it begins",)),
        (("--hparams", '{"objective": "VRE"}', "--algorithm", "Magnitude"), ("unknown objective", "'VREx'")),
        (("--hparams", '{"batch_size": 5000}'), ("fewer than", "batch_size 5000", "environment 1")),
        (("--hparams", '{"backbone": "resnet19"}'), ("backbone", "resnet19")),
        (("--hparams", '{"weights": "nowhere.pth", "backbone": "resnet18"}'), ("weights", "nowhere.pth")),
        (("--hparams", '{"sparsity": 0.001}', "--algorithm", "Magnitude"), ("removes nothing", "sparsity")),
        (("--test_envs", "7"), ("--test_envs", "no environment 7", "0 +90%")),
        (("--test_envs", "0", "1", "2"), ("leaves no environment",)),
        (("--seed", str(2**64)), ("--seed", "at most", str(2**64))),
        (("--trial_seed", str(2**64)), ("--trial_seed", "at most")),
        (("--hparams_seed", str(-(2**64))), ("--hparams_seed", "at least")),
        (("--checkpoint_freq", str(2**64)), ("--checkpoint_freq", "at most")),
        (("--steps", "0"), ("--steps", "at least 1", "0")),
        (("--holdout_fraction", "0"), ("--holdout_fraction", "(0, 1)")),
        (("--dataset", "PACS"), ("--data_dir",)),
        (("--dataset", "PACS", "--data_dir", "nowhere"), ("nowhere/PACS", "domainbed-sfp download PACS")),
        (("--dataset", "RotatedMNIST", "--data_dir", "nowhere"), ("train-images-idx3-ubyte", "download MNIST")),
        (("--device", "cuda:99"), ("--device", "0 CUDA devices")),
        (("--device", "mps"), ("--device", "auto, cpu")),
        (("--hparams", '{"lr": -1}'), ("'lr'", "at least 0", "-1")),
        (("--hparams", '{"lr": NaN}'), ("'lr'", "a number", "nan")),
        (("--hparams", '{"batch_size": 0}'), ("'batch_size'", "at least 1", "0")),
        (("--hparams", '{"weight_decay": -1}'), ("'weight_decay'", "at least 0")),
        (("--hparams", '{"resnet_dropout": 2}'), ("'resnet_dropout'", "[0, 1)")),
        (("--hparams", '{"mixup_alpha": 0}', "--algorithm", "Mixup"), ("'mixup_alpha'", "above 0")),
        (("--hparams", '{"objective": ["ERM"]}', "--algorithm", "Magnitude"), ("'objective'", "['ERM']")),
        (("--hparams", '{"pruning_scope": "x"}', "--algorithm", "Magnitude"), ("unknown pruning_scope of Magnitude 'x'", "layer, global")),
        (("--hparams", '{"granularity": "block"}', "--algorithm", "Magnitude"), ("unknown granularity of Magnitude 'block'", "channel, weight")),
        (("--hparams", '{"lars": true}'), ("'lars' cannot be set",)),
        (("--hparams", '{"removal_layers": "frist"}', "--algorithm", "SFP"), ("unknown removal_layers of SFP", "did you mean 'first'")),
        (("--hparams", '{"mask_end": 1.5}', "--algorithm", "MRM"), ("'mask_end' of MRM is 1.5", "built in as 0.6")),
        (("--hparams", '{"prune_end": 1.5}', "--algorithm", "LotteryTicket"), ("'prune_end' of LotteryTicket", "fraction of the run in [0, 1)", "1.5")),
        (("--hparams", '{"rounds": 0}', "--algorithm", "LotteryTicket"), ("'rounds'", "at least 1", "0")),
    ],
)  # fmt: skip
def test_bad_input(main, tmp_path, arguments, parts):
    failed = main("train", "--dataset", "ColoredDigits", "--steps", 12, "--output_dir", "run", *arguments, check=False)
    assert_one_line_error(failed, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm, hparams, part", [
    ("RigL", {"granularity": "channel"}, "'weight'"), ("EVIL", {"granularity": "channel"}, "'weight'"),
    ("NetworkSlimming", {"granularity": "weight"}, "'channel'"), ("SFP", {"granularity": "weight"}, "'channel'"),
    ("EVIL", {"objective": "Mixup"}, "Mixup"), ("SFP", {"objective": "Mixup"}, "Mixup"),
    ("Magnitude", {"prune_start": 0.9, "prune_end": 0.5}, "ends before it begins"),
    ("ERM", {"backbone": "resnet18", "weights": "nowhere.pth"}, "no file 'nowhere.pth'"),
    ("ERM", {"backbone": "mnist_cnn_bn", "batch_size": 100000}, "lower batch_size"),
])  # fmt: skip
def test_a_refused_run_leaves_no_folder(main, tmp_path, algorithm, hparams, part):
    refused = main(
        "train", "--dataset", "ColoredDigits", "--algorithm", algorithm, "--hparams", json.dumps(hparams),
        "--steps", 4, "--output_dir", "new/run", check=False,
    )  # fmt: skip
    assert_one_line_error(refused, part)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("algorithm, test_envs", [("ERM", [1, 2]), ("CORAL", [0]), ("Mixup", [0])])
def test_batchnorm_on_single_values_is_refused_before_the_run(main, tmp_path, algorithm, test_envs):
    def train(**hparams):
        chosen = {"backbone": "resnet18", "weights": "none", "batch_size": 1, **hparams}
        return main(
            "train", "--dataset", "ColoredDigits", "--algorithm", algorithm, "--hparams", json.dumps(chosen), "--steps", 1,
            "--test_envs", *test_envs, "--output_dir", "run", "--skip_model_save", check=False,
        )  # fmt: skip

    assert_one_line_error(train(), "BatchNorm 'featurizer.network.layer", "batch_size", "freeze_bn")
    assert not (tmp_path / "run").exists()


def test_a_mistyped_name_leaves_no_directory(main, tmp_path):
    main("train", "--algorithm", "Nope", "--output_dir", "run", check=False)
    assert not (tmp_path / "run").exists()


def test_output_dir_that_cannot_be_written(main, tmp_path):
    (tmp_path / "file").write_text("")
    failed = main(*RUN, "--steps", 2, "--output_dir", "file/run", check=False)
    assert_one_line_error(failed, "file/run", "cannot be written")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("options", ["size=200k", "ro"])
def test_full_or_read_only_disk(main, tmp_path, options):
    """A run that meets a full disk ends with one line, and goes on where it was once there is room."""
    mount = tmp_path / "small"
    mount.mkdir()
    arguments = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)]
    if subprocess.run(arguments, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        failed = main(*RUN, "--steps", 21, "--output_dir", mount / "run", check=False)
        assert_one_line_error(failed, "small/run", "No space left" if options != "ro" else "Read-only file system")
        if options != "ro":
            assert not list((mount / "run").glob(".*.tmp")) and not list((mount / "run").glob(".checkpoint*"))
            subprocess.run(["mount", "-o", "remount,size=50m", str(mount)], check=True)
            main(*RUN, "--steps", 21, "--output_dir", mount / "run")
            assert [record["step"] for record in read(mount / "run")] == [0, 10, 20]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_users_own_folder(main, tmp_path):
    make_tree(tmp_path / "tree")
    main(*FOLDER_RUN)
    assert read(tmp_path / "run")[-1]["environments"] == ["a", "b", "c"]


def test_a_file_name_need_not_be_unicode(main, tmp_path):
    make_tree(tmp_path / "tree")
    image = tmp_path / "tree" / "a" / "cat" / "0.png"
    try:
        os.rename(os.fsencode(image), os.fsencode(image.parent) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system wants Unicode")
    main(*FOLDER_RUN)
    assert len(read(tmp_path / "run")[-1]["data_digest"]) == 16


def test_a_run_on_other_images_is_not_continued(main, tmp_path, monkeypatch):
    """`Folder` is whatever a user has: a checkpoint made on one folder must not go on with another."""

    make_tree(tmp_path / "tree")
    make_tree(tmp_path / "other", n=9)
    monkeypatch.setattr(
        "domainbed_sfp.training.state.State.save_model", lambda self: 1 / 0
    )  # dies with its last checkpoint saved
    monkeypatch.chdir(tmp_path)
    died = main(*[part for part in FOLDER_RUN if part != "--skip_model_save"], check=False)
    assert died.returncode == 1 and "ZeroDivisionError" in died.stderr
    other = ["other" if part == "tree" else part for part in FOLDER_RUN if part != "--skip_model_save"]
    assert_one_line_error(main(*other, check=False), "on other images", "'other'", "--output_dir")


def test_a_corrupt_image_is_named(main, tmp_path):
    make_tree(tmp_path / "tree")
    damaged = tmp_path / "tree" / "b" / "dog" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:90])
    assert_one_line_error(main(*FOLDER_RUN, check=False), "tree/b/dog/3.png", "cannot be decoded")
    assert not list((tmp_path / "run").glob("results.jsonl"))


def test_an_empty_class_and_a_missing_class_are_named(main, tmp_path):
    make_tree(tmp_path / "tree")
    (tmp_path / "tree" / "b" / "dog").rename(tmp_path / "tree" / "b" / "dogs")
    assert_one_line_error(main(*FOLDER_RUN, check=False), "disagree on their classes", "'dog'")
    (tmp_path / "tree" / "b" / "dogs").rename(tmp_path / "tree" / "b" / "dog")
    for image in (tmp_path / "tree" / "c" / "cat").iterdir():
        image.unlink()
    assert_one_line_error(main(*FOLDER_RUN, check=False), "tree/c/cat", "holds no image")
