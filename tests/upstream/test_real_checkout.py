"""The bridge into the DomainBed checkout that DOMAINBED_ROOT names."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from made_checkout import NOT_DOMAINBEDS

from domainbed_sfp.training import hparams
from domainbed_sfp.upstream import bridge as upstream
from domainbed_sfp.upstream.checkout import opened
from domainbed_sfp.upstream.registration import own_names, register_algorithms

# On a real checkout -----------------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def write_small_mnist(data_dir: Path) -> None:
    """A few hundred noisy squares in MNIST's files; a digit's square lies at a place of its own."""
    rng = np.random.default_rng(0)
    for half, n in (("train", 400), ("t10k", 200)):
        digits = rng.integers(10, size=n)
        images = rng.integers(60, size=(n, 28, 28))
        for image, digit in zip(images, digits):
            image[4 + digit * 2 :][:6, 8:20] = 255
        write_idx(data_dir / "MNIST" / "raw" / f"{half}-images-idx3-ubyte", images)
        write_idx(data_dir / "MNIST" / "raw" / f"{half}-labels-idx1-ubyte", digits)


@pytest.fixture(scope="module")
def their_sweep(bridge, domainbed_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DomainBed's sweep over its ERM and our Magnitude, by its local launcher, test environment 0 only."""
    folder = tmp_path_factory.mktemp("theirs")
    sweep = [
        "launch", "--datasets", "Debug28", "--algorithms", "ERM", "Magnitude", "--data_dir", "none",
        "--output_dir", str(folder / "sweep"), "--n_hparams", "1", "--n_trials", "1", "--single_test_envs",
        "--steps", "12", "--hparams", '{"batch_size": 4}', "--skip_confirmation", "--command_launcher",
    ]  # fmt: skip
    # A dry run makes the folders of all jobs; jobs without a folder are those that the next one launches.
    with redirect_stdout(StringIO()) as shown:
        upstream.run(str(domainbed_root), "sweep", [*sweep, "dummy"])
    for line in shown.getvalue().splitlines():
        words = shlex.split(line)
        if line.startswith("Dummy launcher:") and words[words.index("--test_envs") + 1] == "0":
            Path(words[words.index("--output_dir") + 1]).rmdir()
    assert "Launched 2 jobs!" in bridge("sweep", *sweep, "local", cwd=folder)
    for job in (folder / "sweep").iterdir():
        if not any(job.iterdir()):
            job.rmdir()
    return folder / "sweep"


@pytest.fixture(scope="module")
def both_sweeps(their_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their sweep's runs, and those of our sweep on ColoredMNIST, in one folder."""
    folder = tmp_path_factory.mktemp("ours")
    write_small_mnist(folder)
    (folder / "spec.yaml").write_text(
        "{datasets: [ColoredMNIST], algorithms: [ERM, Magnitude], test_envs: [[0]], n_hparams: 1, "
        "n_trials: 1, steps: 6, checkpoint_freq: 3, skip_model_save: true}"
    )
    words = "-m domainbed_sfp sweep launch spec.yaml --data_dir . --output_dir sweep --skip_confirmation --jobs 2"
    subprocess.run([sys.executable, *words.split()], cwd=folder, check=True, timeout=240, capture_output=True)
    for job in their_sweep.iterdir():
        shutil.copytree(job, folder / "sweep" / job.name)
    return folder / "sweep"


def runs_of(sweep: Path, algorithm: str) -> list[Path]:
    return [
        results.parent
        for results in sorted(sweep.glob("*/results.jsonl"))
        if json.loads(results.read_text().splitlines()[0])["args"]["algorithm"] == algorithm
    ]


def test_their_train_really_prunes(their_sweep: Path) -> None:
    (run,) = runs_of(their_sweep, "Magnitude")
    assert (run / "done").exists()
    saved = torch.load(run / "model.pkl", weights_only=True)
    convolutions = {k: w for k, w in saved["model_dict"].items() if k.startswith("featurizer.conv") and w.ndim == 4}
    assert len(convolutions) == 4
    for name, weight in convolutions.items():
        dead = weight.flatten(1).eq(0).all(1)
        assert dead.float().mean() == 0.5, name
    expected = hparams.resolve_hparams("Magnitude", "RotatedMNIST", overrides={"batch_size": 4})
    for name in NOT_DOMAINBEDS:
        del expected[name]
    assert saved["model_hparams"] == expected
    last = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    assert last["hparams"] == expected
    assert last["step"] == 11


def test_their_train_runs_gates_and_votes(bridge, tmp_path: Path) -> None:
    """GlobalPru adds layers to the network and hooks to its forward pass; their loop copies and saves it."""
    bridge("train", "--algorithm", "GlobalPru", "--dataset", "Debug28", "--data_dir", "none", "--test_envs", 0, "--steps",
           12, "--checkpoint_freq", 4, "--output_dir", "run", "--hparams", '{"batch_size": 4}', cwd=tmp_path)  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert "rank_tau_env1" in records[1] and "rank_loss" in records[2] and "rank_loss" not in records[0]
    weights = torch.load(tmp_path / "run" / "model.pkl", weights_only=True)["model_dict"]
    dead = weights["featurizer.conv2.weight"].flatten(1).eq(0).all(1)
    assert dead.float().mean() == 0.5 and not weights["featurizer.bn1.gate.expand.weight"][dead].any()
    assert not weights["featurizer.bn1.gate.reduce.weight"][:, dead].any()


def test_their_train_quantizes(bridge, tmp_path: Path) -> None:
    """DQMQ reads its inputs, draws, settles and is fitted to its budget without our loop's help."""
    bridge("train", "--algorithm", "DQMQ", "--dataset", "Debug28", "--data_dir", "none", "--test_envs", 0, "--steps", 12,
           "--checkpoint_freq", 4, "--output_dir", "run", "--hparams", '{"batch_size": 4, "target_bitops": 0.25}',
           cwd=tmp_path)  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 4, 8, 11]
    assert "drawn_bits" not in records[0] and 2 <= records[1]["drawn_bits"] <= 8
    assert records[-1]["expected_bitops"] == pytest.approx(0.25, rel=0.05)  # widths have settled
    weights = torch.load(tmp_path / "run" / "model.pkl", weights_only=True)["model_dict"]
    # The first layer keeps 8 bits.
    assert weights["featurizer.conv2.policy.allowed"].any() and "featurizer.conv1.policy.start" not in weights


def test_their_erm_is_theirs(their_sweep: Path) -> None:
    (run,) = runs_of(their_sweep, "ERM")
    record = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    assert "backbone" not in record["hparams"]
    assert record["hparams"]["batch_size"] == 4


def test_both_collects_read_both_sweeps_alike(bridge, cli, both_sweeps: Path) -> None:
    theirs = bridge("collect_results", "--input_dir", both_sweeps, cwd=both_sweeps.parent)
    assert cli("collect", "--input_dir", both_sweeps, "--format", "domainbed").stdout == theirs
    for name in ("Debug28", "ColoredMNIST", "ERM", "Magnitude"):
        assert name in theirs


def test_the_default_sweep_offers_our_algorithms(domainbed_root: Path) -> None:
    before = sorted(path for path in domainbed_root.rglob("*.py"))
    with opened(domainbed_root) as checkout:
        ours = own_names(checkout)
        register_algorithms(checkout, ours, None)
        assert {"Magnitude", "Random"} <= set(ours)
        assert not {"ERM", "IRM", "VREx", "GroupDRO", "CORAL", "Mixup"} & set(ours)
        assert checkout.algorithms.ALGORITHMS[-len(ours) :] == ours
        assert checkout.algorithms.get_algorithm_class("Magnitude").total_steps == 5001
    assert sorted(path for path in domainbed_root.rglob("*.py")) == before
    assert os.fspath(domainbed_root) not in sys.path
