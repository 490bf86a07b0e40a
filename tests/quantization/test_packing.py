"""Integers in files: round trips, logits, ONNX."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_runs import images, make, trained
from safetensors import safe_open
from safetensors.torch import save_file

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.deploy import files, packed
from domainbed_sfp.plugins import contract
from domainbed_sfp.quantization.packing import pack, unpack
from domainbed_sfp.quantization.policy import (
    WIDTHS,
)
from domainbed_sfp.training import hparams

# Export -------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_packing_round_trip(bits, data):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = data.draw(st.lists(st.integers(low, high), min_size=0, max_size=40))
    packed = pack(torch.tensor(values, dtype=torch.int16), bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert unpack(packed, bits, (len(values),)).tolist() == values


def test_packing_by_hand():
    """-2, -1, 0, 1 at two bits are 0, 1, 2, 3, lowest first: 0b11100100."""
    assert pack(torch.tensor([-2, -1, 0, 1]), 2).tolist() == [0b11100100]
    assert pack(torch.tensor([[-8, 7], [0, -1]]), 4).tolist() == [0xF0, 0x78]
    with pytest.raises(ValueError, match="do not fit into 2 bits"):
        pack(torch.tensor([2]), 2)
    with pytest.raises(ValueError, match="do not come from"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, (5,))


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("UniformQuant", {"bits": 3}),
        ("UniformQuant", {"bits": 5, "nonlinear_classifier": True}),
        ("StaticMixedPrecision", {"backbone": "mnist_cnn"}),
        ("DQMQ", {}),
    ],
)
def test_the_integer_file_gives_the_logits(tmp_path, name, overrides):
    algorithm = trained(name, **overrides)
    packed.save(tmp_path / "network.safetensors", algorithm)
    network = packed.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.equal(network(images()), algorithm.predict(images()))


def test_file_size_falls_with_the_width(tmp_path):
    sizes = {}
    for bits in (2, 3, 4, 8):
        untrained = contract.make("UniformQuant", overrides={"bits": bits})
        packed.save(tmp_path / "network.safetensors", untrained)
        sizes[bits] = (tmp_path / "network.safetensors").stat().st_size
    inner = 9 * 64 * 128 + 2 * 9 * 128 * 128
    for bits in (2, 3, 4):
        assert sizes[8] - sizes[bits] == pytest.approx(inner * (8 - bits) / 8, abs=200)


def test_a_policys_file_holds_the_widths_in_use_alone(tmp_path):
    algorithm = trained("DQMQ")
    packed.save(tmp_path / "network.safetensors", algorithm)
    with safe_open(tmp_path / "network.safetensors", framework="pt") as file:
        stored = [key for key in file.keys() if key.startswith("integers/")]  # noqa: SIM118
    allowed = sum(int(policy.allowed.sum()) for policy in algorithm.policies().values())
    assert len(stored) == 2 + allowed < 2 + 3 * len(WIDTHS)


def test_one_loader_reads_pruned_and_quantized_networks(tmp_path):
    algorithm, x = trained("DQMQ"), torch.rand(4, 3, 8, 8)
    packed.save(tmp_path / "network.safetensors", algorithm)
    with torch.no_grad():
        expected = packed.load(tmp_path / "network.safetensors")(x)
        assert torch.equal(files.load(tmp_path / "network.safetensors")(x), expected)


def test_networks_that_cannot_be_quantized():
    """Weights that are standardised first, and images that are cut into windows where a width goes to an image."""
    pytest.importorskip("timm", reason="timm is not installed")

    def build(name, backbone, side):
        overrides = {"backbone": backbone, "weights": "none", "image_size": side}
        values = hparams.resolve_hparams(name, "PACS", overrides=overrides)
        return registry.get(name).cls((3, side, side), 7, 3, values)

    with pytest.raises(UserError, match="transforms its weight"):
        build("UniformQuant", "resnetv2_50x1_bit", 32)
    with pytest.raises(UserError, match="reads each in 64 windows"):
        build("DQMQ", "swin_tiny_patch4_window7_224", 224)


def test_budgets_between_two_assignments_are_refused_where_all_images_are_alike():
    for name, target, refused in (
        ("StaticMixedPrecision", 0.1566, False),
        ("StaticMixedPrecision", 0.168, True),
        ("DQMQ", 0.168, False),
    ):
        with pytest.raises(UserError, match=r"take 0\.1566 or 0\.1689 of") if refused else nullcontext():
            make(name, target_bitops=target)


def test_files_that_are_none_of_ours(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    packed.save(tmp_path / "network.safetensors", trained("UniformQuant", bits=3))
    with safe_open(tmp_path / "network.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors["integers/0.conv2/3"]
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    for name, words in (("text", "not a quantized"), ("other.safetensors", "not a quantized"), ("none", "no file"),
                        ("damaged.safetensors", "not a whole quantized network")):  # fmt: skip
        with pytest.raises(UserError, match=words) as raised:
            packed.load(tmp_path / name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, overrides",
    [("UniformQuant", {"bits": 3}), ("StaticMixedPrecision", {"target_bitops": 0.3})],
)
def test_onnx_predicts_as_we_do(tmp_path, name, overrides):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    algorithm = trained(name, **overrides)
    packed.save_onnx(tmp_path / "network.onnx", algorithm)
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    ours = algorithm.predict(images()).detach()
    theirs = torch.from_numpy(session.run(None, {"images": images().numpy()})[0])
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    assert (ours - theirs).abs().mean() < 1e-2 * ours.abs().mean()
    # Integers are stored, not floating-point weights.
    weights = sum(layer.layer.weight.numel() for layer in algorithm.layers.values())
    assert (tmp_path / "network.onnx").stat().st_size < 0.8 * weights + 100_000


def test_onnx_refuses_to_decide_by_sample(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    algorithm = contract.make("DQMQ")
    algorithm.step = contract.STEPS  # behind the stage at 8 bits
    with pytest.raises(UserError, match="chooses bit-widths sample by sample"):
        packed.save_onnx(tmp_path / "network.onnx", algorithm)
    assert not list(tmp_path.iterdir())


def test_onnx_names_the_extra_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(packed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'domainbed_sfp\[export\]'"):
        packed.save_onnx(tmp_path / "network.onnx", trained("UniformQuant", bits=3))
