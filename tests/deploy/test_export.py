"""Dead channels physically gone: the surgery, the files, the command and its errors, latency."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as tensors_of
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.deploy import export, exported, files, finished_runs, latency, shrink
from domainbed_sfp.networks.backbones import BACKBONES
from domainbed_sfp.pruning import costs
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.pruning.masks import lower_channels
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.training import hparams
from domainbed_sfp.training import train as training

pytest.importorskip("torch_pruning", reason="the extra `export` is not installed")

CLASSES = 5
# Backbone and side of its images.
ARCHITECTURES = [
    ("mnist_cnn", 8), ("mnist_cnn_bn", 28), ("resnet18", 32), ("resnet50", 32), ("efficientnet_lite0", 33),
    ("mobilenetv3_small_100", 32), ("convnext_atto", 32),
]  # fmt: skip
# Those with residual streams that may be pruned.
STREAMS = ("resnet18", "resnet50", "efficientnet_lite0", "mobilenetv3_small_100")


def make(backbone: str, size: int, nonlinear: bool = False) -> nn.Sequential:
    """A network as `export()` gives it, with statistics and affine parameters as training leaves them: none is 0 or 1."""
    if backbone not in BACKBONES.entries:
        pytest.importorskip("timm", reason="the extra `timm` is not installed")
    torch.manual_seed(0)
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": backbone, "weights": "none"})
    featurizer = networks.make_featurizer((3, size, size), values)
    network = nn.Sequential(featurizer, networks.make_classifier(featurizer.n_outputs, CLASSES, nonlinear))
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, size, size))
    return network.eval()


def mask(
    network: nn.Sequential, alive: dict[str, torch.Tensor] | None = None, streams: bool = False
) -> dict[str, torch.Tensor]:
    """Masks that leave the channels `alive` by group name, half of them at random by default; dead weights become 0."""
    groups = channel_groups(network[0], network[1], residual_streams=streams)
    if alive is None:
        alive = {group.name: torch.rand(group.channels).argsort() < -(-group.channels // 2) for group in groups}
    parameters = dict(exported.ExportedNetwork(network[0], network[1]).named_parameters())
    shapes = {name: value.shape for name, value in parameters.items()}
    masks = lower_channels(groups, alive, shapes, torch.device("cpu"))
    with torch.no_grad():
        for name, one in masks.items():
            parameters[name].mul_(one)
    return masks


def images(size: int) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def through_a_file(network: exported.ExportedNetwork, backbone: str, size: int, **options) -> exported.ExportedNetwork:
    description = exported.Description(
        backbone, (3, size, size), CLASSES, group_norms=shrink.surviving_groups(network), **options
    )
    data = exported.to_bytes(network, description)
    return exported.rebuild(exported.Description.from_json(description.to_json()), tensors_of(data))


@pytest.mark.parametrize(
    "backbone, size, streams",
    [*((*case, False) for case in ARCHITECTURES), *((*case, True) for case in ARCHITECTURES if case[0] in STREAMS)],
)
def test_without_dead_channels_the_logits_stay_and_the_costs_are_those_claimed(backbone, size, streams):
    """Parameters by counting tensors, MACs by torch's own counter (2 FLOPs a MAC), bytes by the stored tensors."""
    network = make(backbone, size)
    masks = mask(network, streams=streams)
    pruned, dead = shrink.remove_channels(network, masks, (3, size, size))
    rebuilt = through_a_file(pruned, backbone, size)
    x = images(size)
    with torch.no_grad():
        expected = network(x)
        assert expected.abs().max() > 0.01  # not merely both zero
        assert torch.allclose(pruned(x), expected, atol=1e-5)
        assert torch.equal(rebuilt(x), pruned(x))

    plain = exported.ExportedNetwork(network[0], network[1])
    positions = costs.count_positions(plain, (3, size, size))
    claimed = costs.measure_cost(dict(plain.named_parameters()), positions, masks)
    assert sum(value.numel() for value in rebuilt.parameters()) == claimed.surviving_parameters < claimed.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rebuilt(x[:1])
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts.pop("aten.convolution") + counts.pop("aten.addmm") == 2 * claimed.macs
    # All else that is counted: which group a channel of a GroupNorm is of.
    assert sum(counts.values()) == sum(
        8 * 2 * 4 * module.num_channels for module in rebuilt.modules() if isinstance(module, exported.GroupNormOfSurvivors)
    )  # fmt: skip
    stored = sum(value.numel() * value.element_size() for value in exported.stored_tensors(rebuilt).values())
    assert shrink.exported_bytes(network, masks) == stored
    assert not any((~one).any() for one in shrink.surviving_masks(masks, dead).values())


def test_residual_streams_stay_whole_and_what_is_inside_blocks_is_cut():
    network = make("resnet18", 32)
    pruned, _ = shrink.remove_channels(network, mask(network), (3, 32, 32))
    block = pruned.featurizer.network.layer2[0]
    assert (block.conv1.in_channels, block.conv1.out_channels, block.bn1.num_features) == (64, 64, 64)
    assert (block.conv2.in_channels, block.conv2.out_channels, block.downsample[0].out_channels) == (64, 128, 128)
    lite = make("efficientnet_lite0", 32)
    pruned, _ = shrink.remove_channels(lite, mask(lite), (3, 32, 32))
    block = pruned.featurizer.network.blocks[1]
    assert block.depthwise_conv.weight.shape == (48, 1, 3, 3) and block.depthwise_conv.groups == 48
    assert pruned.featurizer.network.conv_stem.out_channels == 16 and pruned.classifier.in_features == 640


def test_residual_streams_are_cut_where_masks_leave_nothing_of_them():
    network = make("resnet18", 32)
    pruned, _ = shrink.remove_channels(network, mask(network, streams=True), (3, 32, 32))
    block = pruned.featurizer.network.layer2[0]
    assert (block.conv1.in_channels, block.conv1.out_channels) == (32, 64)
    assert (block.conv2.out_channels, block.downsample[0].in_channels, block.downsample[0].out_channels) == (64, 32, 64)
    assert pruned.classifier.in_features == 256


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.booleans(), st.integers(0, 2**32))
def test_any_channels_of_mnist_cnn_can_go(halvings, nonlinear, seed):
    """Groups of GroupNorm keep unequal numbers of channels, some none; the classifier may have one layer or three."""
    network = make("mnist_cnn", 8, nonlinear)
    generator = torch.Generator().manual_seed(seed)
    alive = {}
    for index, group in enumerate(channel_groups(network[0], network[1])):
        kept = torch.rand(group.channels, generator=generator) < 0.5 ** halvings[index % 3]
        kept[torch.randint(group.channels, (1,), generator=generator)] = True
        alive[group.name] = kept
    masks = mask(network, alive)
    pruned, dead = shrink.remove_channels(network, masks, (3, 8, 8))
    assert {e.group.name: (~e.dead).tolist() for e in dead} == {n: a.tolist() for n, a in alive.items() if not a.all()}
    rebuilt = through_a_file(pruned, "mnist_cnn", 8, nonlinear_classifier=nonlinear)
    with torch.no_grad():
        assert torch.allclose(rebuilt(images(8)), network(images(8)), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any), st.floats(-5, 5))
def test_group_norm_counts_what_is_gone(survivors, offset):
    """Against torch's GroupNorm over the same channels with zeros in the places of the others."""
    keep = torch.tensor([place < left for left in survivors for place in range(3)])
    x = torch.zeros(2, 12, 3, 5)
    x[:, keep] = torch.randn(2, sum(survivors), 3, 5, generator=torch.Generator().manual_seed(0)) + offset
    whole, left = nn.GroupNorm(4, 12), exported.GroupNormOfSurvivors(3, survivors, 1e-5)
    with torch.no_grad():
        whole.weight.copy_(torch.linspace(0.5, 2, 12))
        whole.bias.copy_(torch.linspace(-1, 1, 12))
        left.weight.copy_(whole.weight[keep])
        left.bias.copy_(whole.bias[keep])
        assert torch.allclose(left(x[:, keep]), whole(x)[:, keep], atol=1e-4)
        flat = x.flatten(2)
        assert torch.allclose(left(flat[:, keep]), whole(flat)[:, keep], atol=1e-4)


def test_masks_of_single_weights_take_nothing_out():
    network = make("mnist_cnn", 8)
    dense = shrink.exported_bytes(network, {})
    masks = {"featurizer.conv2.weight": torch.rand(128, 64, 3, 3) < 0.3}
    masks["featurizer.conv2.weight"][:7] = False  # whole filters even: their biases live
    pruned, dead = shrink.remove_channels(network, masks, (3, 8, 8))
    assert not dead and shrink.exported_bytes(network, masks) == dense
    assert torch.equal(shrink.surviving_masks(masks, dead)["featurizer.conv2.weight"], masks["featurizer.conv2.weight"])
    assert torch.equal(pruned(images(8)), network(images(8)))


def test_what_does_not_fit_is_refused(monkeypatch):
    network = make("mnist_cnn", 8)
    masks = mask(network)
    with pytest.raises(UserError, match=r"another network.*no parameter 'featurizer\.layer1'"):
        shrink.remove_channels(network, {"featurizer.layer1": torch.zeros(3, dtype=torch.bool)}, (3, 8, 8))
    with pytest.raises(
        UserError, match=r"another network.*'featurizer\.conv1\.bias' has shape \(3,\), expected \(64,\)"
    ):
        shrink.remove_channels(network, {"featurizer.conv1.bias": torch.zeros(3, dtype=torch.bool)}, (3, 8, 8))
    with pytest.raises(UserError, match=r"nn\.Sequential\(featurizer, classifier\).*Linear"):
        shrink.remove_channels(nn.Linear(2, 2), {}, (2,))
    groups = channel_groups(network[0], network[1])
    wrong = shrink.ChannelGroup(groups[0].name, 64, groups[0].filters, groups[0].vectors[:1], groups[0].readers)
    with monkeypatch.context() as patch:
        patch.setattr(shrink, "channel_groups", lambda *parts, **options: [wrong])
        with pytest.raises(UserError, match=r"disagree.*'featurizer\.conv1'.*featurizer\.bn0"):
            shrink.remove_channels(network, masks, (3, 8, 8))
    monkeypatch.setattr(shrink, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'domainbed_sfp\[export\]'"):
        shrink.remove_channels(network, masks, (3, 8, 8))
    assert shrink.exported_bytes(network, masks) < shrink.exported_bytes(network, {})  # the extra is not needed


def test_backbones_are_rebuilt_without_a_download(monkeypatch):
    """And with the input scaling that their weights ask for."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"resnet50_augmix": False, "resnet18": True})
    with networks.without_weights():
        networks.make_featurizer((3, 32, 32), values)
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    values["backbone"] = "tf_efficientnet_lite0"  # trained on [-1, 1]
    with networks.without_weights():
        featurizer = networks.make_featurizer((3, 32, 32), values)
    assert featurizer.rescale and featurizer.input_scale.flatten().tolist() == pytest.approx([0.458, 0.448, 0.45])


# Files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short run that pruned half of the channels."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    _train(folder)
    return folder


def _train(folder: Path, **arguments: str) -> None:
    args = RunSettings(dataset="FullColoredDigits", test_envs=[2], steps=9, checkpoint_freq=8)
    with contextlib.redirect_stdout(io.StringIO()):
        training.train(replace(args, output_dir=str(folder), **{"algorithm": "Magnitude", **arguments}))


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


# Latency ------------------------------------------------------------------------------------------------------------


def test_latency_prints_a_table_and_writes_the_numbers(run, main, tmp_path):
    done = main(
        "latency",
        run,
        "--batch_sizes",
        1,
        3,
        "--repeats",
        4,
        "--threads",
        1,
        "--output",
        "times.json",
        "--device",
        "cpu",
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[0][0] == "batch" and [row[0] for row in rows[1:3]] == ["1", "3"] and "1 threads" in rows[3][0]
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["environment"]["threads"] == 1 and report["environment"]["torch"] == torch.__version__
    assert report["macs"] < report["dense_macs"] and report["stored_zeros"] == 0
    for entry, row in zip(report["latency"], rows[1:]):
        for name in ("dense", "exported"):
            assert 0 < entry[name]["lower_quartile"] <= entry[name]["median"] <= entry[name]["upper_quartile"]
        assert entry["speedup"] == entry["dense"]["median"] / entry["exported"]["median"]
        assert row[3] == f"{entry['speedup']:.2f}"


def test_batches_of_the_two_networks_alternate():
    calls = []

    def step(name: str):
        return lambda: calls.append(name) or len(calls)

    assert latency.alternate([step("a"), step("b")], warmup=1, repeats=2) == [[4, 5], [3, 6]]
    assert "".join(calls) == "abbaab"
    timing = latency.Timing.of([0.001, 0.002, 0.003, 0.004, 0.010])
    assert (timing.lower_quartile, timing.median, timing.upper_quartile) == pytest.approx((2, 3, 4))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("--repeats", 0), "--repeats: expected whole numbers of at least 1, got 0"),
        (("--batch_sizes", 4, -1), "--batch_sizes"),
        (("--batch_sizes", 10**13), "--batch_sizes: expected whole numbers of at most 1000000, got 10000000000000"),
        (("--threads", 0), "--threads"),
        (("--device", "tpu"), "--device"),
        (("--output", "nowhere/times.json"), "--output"),
    ],
)
def test_latency_of_settings_that_cannot_be(run, main, arguments, part):
    done = main("latency", run, *arguments, check=False)
    assert done.returncode == 2 and part in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_batch_that_does_not_fit_is_named(run, main, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("cannot alloc")

    monkeypatch.setattr(latency, "alternate", full)
    done = main("latency", run, "--batch_sizes", 1000, check=False)
    assert done.returncode == 2 and "a batch of 1000 images does not fit into the memory of cpu" in done.stderr
