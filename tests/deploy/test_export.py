"""Exported files, the command and its errors."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported_networks import CLASSES, _train, images, make, mask
from safetensors.torch import load_file, save_file

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.deploy import export, exported, files, finished_runs, shrink
from domainbed_sfp.training import hparams

pytest.importorskip("torch_pruning", reason="the extra `export` is not installed")


def test_export_writes_what_a_plain_script_can_load(run, main, tmp_path):
    """No training code is imported to load it; its logits are the trained algorithm's."""
    printed = main("export", run, "--output", "net.safetensors").stdout
    assert "224 channels taken out" in printed and "96 real images" in printed
    code = (
        "import sys, torch; from domainbed_sfp.deploy import files; net = files.load('net.safetensors');"
        "loaded = [m for m in sys.modules if m.startswith(('domainbed_sfp.algorithms', 'domainbed_sfp.training.train',"
        "'torch_pruning', 'domainbed_sfp.algorithms.registry'))]; assert not loaded, loaded;"
        "torch.save(net(torch.linspace(-1, 2, 2 * 192).view(2, 3, 8, 8)), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    algorithm = finished_runs.load_run(run).algorithm
    x = torch.linspace(-1, 2, 2 * 192).view(2, 3, 8, 8)
    with torch.no_grad():
        expected = algorithm.predict(x)
    assert torch.allclose(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-4)

    record = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    description = exported.read_description(tmp_path / "net.safetensors")
    assert description.backbone == "mnist_cnn" and description.input_shape == (3, 8, 8)
    assert description.num_classes == 10 and description.normalization is None
    assert description.origin["algorithm"] == "Magnitude" and description.origin["sparsity"] == 0.5
    assert description.origin["macs"] == record["macs"]
    tensors = load_file(tmp_path / "net.safetensors")
    assert sum(value.numel() * value.element_size() for value in tensors.values()) == record["exported_bytes"]
    assert sum(value.numel() for value in tensors.values()) == record["surviving_parameters"]


def test_export_to_onnx_takes_any_batch(run, main, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    main("export", run, "--output", "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    algorithm = finished_runs.load_run(run).algorithm
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = algorithm.predict(x)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert exported.Description.from_json(properties["domainbed_sfp_export"]).backbone == "mnist_cnn"


def test_single_weights_are_exported_as_zeros_and_that_is_said(main, tmp_path):
    _train(tmp_path / "run", hparams='{"granularity": "weight"}')
    printed = main("export", "run", "--output", "net.safetensors").stdout
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    tensors = load_file(tmp_path / "net.safetensors")
    zeros = sum(int((value == 0).sum()) for value in tensors.values())
    assert zeros == record["parameters"] - record["surviving_parameters"] > 100_000
    assert f"0 channels taken out; {zeros:,} masked single weights are stored as zeros" in printed
    assert sum(value.numel() * 4 for value in tensors.values()) == record["exported_bytes"]


@pytest.mark.parametrize(
    "algorithm, file_format",
    [("UniformQuant", "safetensors"), ("UniformQuant", "onnx"), ("StaticMixedPrecision", "safetensors")],
)
def test_a_quantized_run_is_exported_as_integers(algorithm, file_format, main, tmp_path):
    if file_format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    own = {"bits": 4} if algorithm == "UniformQuant" else {}
    _train(tmp_path / "run", algorithm=algorithm, hparams=json.dumps({**own, "degraded_evaluation": False}))
    printed = main("export", "run", "--output", "net", "--format", file_format).stdout
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert f"{record['mean_bits']:.2f} bits on average" in printed and "96 real images" in printed
    assert record["mean_bits"] == 4 if algorithm == "UniformQuant" else 2 <= record["mean_bits"] < 8
    size = (tmp_path / "net").stat().st_size
    args = record["args"]
    plain = registry.get("ERM").cls((3, 8, 8), 10, 2, hparams.resolve_hparams("ERM", args["dataset"]))
    floats = 4 * sum(parameter.numel() for parameter in plain.network.parameters())
    assert f"{size:,} bytes ({floats:,} as floats)" in printed
    if file_format == "safetensors":
        tensors = load_file(tmp_path / "net")
        stored = sum(value.numel() * value.element_size() for value in tensors.values())
        assert stored == record["exported_bytes"] < size < record["parameters"]  # below a byte a weight
    refused = main("latency", "run", check=False)
    assert refused.returncode == 2
    assert "is quantized, which torch only simulates" in refused.stderr


def test_photographs_are_normalised_and_a_network_without_masks_is_whole(main, tmp_path):
    from PIL import Image

    for env in ("a", "b"):
        for name in ("cat", "dog"):
            (tmp_path / "tree" / env / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (32, 32), (60 * index, 99, 20)).save(tmp_path / "tree" / env / name / f"{index}.png")
    values = {"backbone": "efficientnet_lite0", "weights": "none", "image_size": 32, "batch_size": 2}
    main("train", "--dataset", "Folder", "--data_dir", "tree", "--algorithm", "ERM", "--steps", 1, "--hparams",
         json.dumps(values), "--output_dir", "run")  # fmt: skip
    assert "no real images" in main("export", "run", "--output", "net.safetensors").stdout
    printed = main("export", "run", "--output", "net.safetensors", "--data_dir", "tree").stdout
    assert " 0 channels taken out" in printed and "16 real images" in printed
    # As DomainBed's own loop saves it, whose hparams do not say the size.
    _edit_model(model_hparams=lambda hparams: {k: v for k, v in hparams.items() if k != "image_size"})(tmp_path / "run")
    assert "16 real images" in main("export", "run", "--output", "net.safetensors", "--data_dir", "tree").stdout
    description = exported.read_description(tmp_path / "net.safetensors")
    assert description.normalization == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    x = images(32)
    network, algorithm = files.load(tmp_path / "net.safetensors"), finished_runs.load_run(tmp_path / "run").algorithm
    with torch.no_grad():
        assert torch.allclose(network(x), algorithm.predict(x), atol=1e-5)


def test_files_that_are_no_export_are_refused(tmp_path):
    network = make("mnist_cnn", 8)
    pruned, _ = shrink.remove_channels(network, mask(network), (3, 8, 8))
    norms = shrink.surviving_groups(pruned)
    path = tmp_path / "net.safetensors"

    def written(tensors: dict, **values) -> Path:
        described = {"backbone": "mnist_cnn", "input_shape": (3, 8, 8), "num_classes": CLASSES, "group_norms": norms}
        text = json.dumps({"format": 1, **described, **values})
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, {exported.HEADER: text})
        return path

    tensors = pruned.state_dict()
    files.load(written(tensors))
    with pytest.raises(UserError, match="cannot be read"):
        files.load(tmp_path / "nothing.safetensors")
    for values, part in (
        ({"format": 2}, "expected format 1"), ({"input_shape": [3, 8]}, "input shape"), ({"num_classes": "ten"}, "whole"),
        ({"backbone": "resnet19"}, "resnet19"), ({"backbone": "resnet18", "group_norms": {}}, "fit backbone 'resnet18'"),
        ({"group_norms": {}}, "do not fit"), ({"group_norms": {"featurizer.bn9": [1] * 8}}, "'featurizer.bn9' is nothing"),
        ({"group_norms": {"featurizer.bn0": [9] * 8}}, "8 channels a group"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=part):
            files.load(written(tensors, **values))
    with pytest.raises(UserError, match=r"do not fit.*featurizer\.conv1\.bias"):
        files.load(written({name: value for name, value in tensors.items() if name != "featurizer.conv1.bias"}))
    save_file(tensors, path)
    with pytest.raises(UserError, match="not a network exported"):
        files.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a network exported"):
        files.load(path)


# Errors of the command ----------------------------------------------------------------------------------------------


def _without(name: str):
    return lambda folder: (folder / name).unlink()


def _not_final(folder: Path) -> None:
    lines = (folder / "results.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-1]), "final_compression": False}
    (folder / "results.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")


def _edit_model(**changes):
    def edit(folder: Path) -> None:
        saved = torch.load(folder / "model.pkl", weights_only=True)
        for name, change in changes.items():
            saved[name] = change(saved[name])
        torch.save(saved, folder / "model.pkl")

    return edit


class _Foreign:
    """What a file of tensors must not hold."""


def _without_lr(values: dict) -> dict:
    return {name: value for name, value in values.items() if name != "lr"}


def _mask_of_another(state: dict) -> dict:
    return {**state, "weight_masks.featurizer/conv1/bias": torch.ones(3, dtype=torch.bool)}


@pytest.mark.parametrize(
    "spoil, part",
    [
        (_without("done"), "is not finished (its last record is of step 8)"),
        (_without("model.pkl"), "no model.pkl: it was trained with --skip_model_save"),
        (_without("results.jsonl"), "expected the output folder of a run, with results.jsonl, done and model.pkl"),
        (_not_final, "ended before its final compression (sparsity 0.50 at step 8)"),
        (lambda folder: (folder / "model.pkl").write_bytes(b"x"), "cannot be read as a trained model: it is not a file of torch.save; remove"),
        (lambda folder: torch.save([1], folder / "model.pkl"), "cannot be read as a trained model: it holds a list"),
        (lambda folder: torch.save({"args": {}}, folder / "model.pkl"), "it has no 'model_input_shape'"),
        (lambda folder: torch.save({"args": _Foreign()}, folder / "model.pkl"), "_Foreign, and no code is loaded from files"),
        (_edit_model(model_dict=_mask_of_another), "is of another network than its hparams say"),
        (_edit_model(model_hparams=lambda h: {**h, "backbone": "mnist_cnn_bn"}), "is of another network"),
        (_edit_model(args=lambda a: {**a, "algorithm": "Magnitud"}), "did you mean 'Magnitude'?"),
        (_edit_model(model_hparams=_without_lr), "another version of Magnitude: it has no hparam 'lr'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [("export", "--output", "net"), ("latency",)])
def test_runs_that_cannot_be_exported(run, main, tmp_path, command, spoil, part):
    shutil.copytree(run, tmp_path / "copy")
    spoil(tmp_path / "copy")
    before = set(os.listdir(tmp_path))
    done = main(command[0], "copy", *command[1:], check=False)
    assert done.returncode == 2 and part in done.stderr and len(done.stderr.splitlines()) == 1
    assert set(os.listdir(tmp_path)) == before


def test_folders_that_are_no_run(run, main, tmp_path):
    shutil.copytree(run, tmp_path / "sweep" / "abc")
    (tmp_path / "file").write_text("")
    for folder, part in (
        ("nowhere", "there is no such folder"), ("sweep", "it holds 1 runs; choose one of them, such as 'sweep/abc'"),
        ("file", "it is a file"),
    ):  # fmt: skip
        done = main("export", folder, "--output", "net", check=False)
        assert done.returncode == 2 and part in done.stderr and len(done.stderr.splitlines()) == 1


def test_outputs_formats_and_extras_that_are_not_there(run, main, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    shutil.copytree(run, tmp_path / "run")

    def refused(part: str, *arguments: object) -> None:
        done = main("export", "run", *arguments, check=False)
        assert done.returncode == 2 and part in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

    refused("is a folder", "--output", "folder")
    refused("there is no folder", "--output", "nowhere/net")
    refused("did you mean 'onnx'? (known: safetensors, onnx)", "--output", "net", "--format", "onxx")
    refused("contradict each other", "--output", "net.onnx", "--format", "safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(
            export, "write_atomically", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        refused("cannot be written: No space left on device", "--output", "net")
    with monkeypatch.context() as patch:
        patch.setattr(shrink, "is_available", lambda: False)
        refused("pip install 'domainbed_sfp[export]'", "--output", "net")
    with monkeypatch.context() as patch:
        patch.setattr(export.importlib.util, "find_spec", lambda name: None)
        refused(
            "needs onnx, onnxscript, onnxruntime: pip install 'domainbed_sfp[export]'",
            "--output",
            "n",
            "--format",
            "onnx",
        )
    assert set(os.listdir(tmp_path)) == {"folder", "run"}


def test_other_logits_are_not_written(run, main, tmp_path, monkeypatch):
    """Were a plain GroupNorm over the survivors taken, the comparison would see it."""

    def forgets_the_dead(self, x):
        self.absent.zero_()
        return whole(self, x)

    whole = exported.GroupNormOfSurvivors.forward
    monkeypatch.setattr(exported.GroupNormOfSurvivors, "forward", forgets_the_dead)
    done = main("export", run, "--output", "net.safetensors", check=False)
    assert done.returncode == 2 and "other logits" in done.stderr and "nothing is written" in done.stderr
    assert not (tmp_path / "net.safetensors").exists()


class _Ill(torch.nn.Module):
    """Logits that are small differences of large sums, as of a network that has hardly been trained."""

    def __init__(self, order: int, error: float = 0.0) -> None:
        super().__init__()
        weights = 1e5 * torch.randn(64, generator=torch.Generator().manual_seed(0))
        self.weights = torch.nn.Parameter(torch.cat([weights, -weights + 1e-3]).roll(order) + error)
        self.order = order

    def forward(self, x):
        terms = (x.flatten(1)[:, :1] * self.weights).unbind(1)  # one after the other: `sum` and `cumsum` round less
        return functools.reduce(torch.add, terms).unsqueeze(1)

    predict = forward


def test_the_comparison_is_not_misled_by_rounding():
    """Both float32 networks differ by far more than is allowed; in float64 only the wrong one does."""
    images = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    one, other, wrong = _Ill(0), _Ill(37), _Ill(37, 0.01)
    with pytest.raises(UserError, match="other logits"):
        export.compare(one, other, images, "random")
    assert export.compare_networks(one, other, images, "random") < 1e-8
    assert one.weights.dtype == other.weights.dtype == torch.float32
    with pytest.raises(UserError, match="other logits"):
        export.compare_networks(one, wrong, images, "random")
    # What a runtime of float32 gives may be off by what float32 makes of the network itself, and no more.
    difference, rounding = export.compare_rounded(one, other.forward, images, "random")
    assert 0 < difference <= export.ROUNDINGS * rounding
    with pytest.raises(UserError, match="other logits"):
        export.compare_rounded(one, _Ill(0, 1e4).forward, images, "random")


def test_an_algorithm_that_stays_in_float32_is_compared_there():
    class Fixed(_Ill):
        def forward(self, x):
            return x.flatten(1) @ torch.ones(4, 2)

        predict = forward

    assert export.compare_networks(Fixed(0), Fixed(1), torch.ones(2, 1, 2, 2), "random") == 0
