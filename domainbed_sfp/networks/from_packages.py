"""Backbones of other packages: timm's, and those that an installed package declares."""

from __future__ import annotations

import difflib
import importlib.util
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp.core import crashes
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.networks.backbones import BACKBONES, Request
from domainbed_sfp.networks.featurizer import IMAGENET_SCALING, ImageFeaturizer
from domainbed_sfp.networks.weights import load_file


def declared_featurizer(entry: EntryPoint, request: Request) -> ImageFeaturizer:
    """The backbone that an installed package declares; images are normalised as ImageNet's."""
    weights, input_shape = request.weights, request.input_shape
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
        load_file(network, weights, entry.name)
    width = _output_width(network, origin, input_shape)
    return ImageFeaturizer(network, width, request.freeze_bn, request.dropout)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def timm_featurizer(backbone: str, request: Request) -> ImageFeaturizer:
    """A network of timm's; images are rescaled where it was trained with another input scaling than usual."""
    weights, input_shape = request.weights, request.input_shape
    if importlib.util.find_spec("timm") is None:
        raise UserError(
            f"backbone {backbone!r} comes from timm, which is not installed: pip install 'domainbed_sfp[timm]'; "
            f"without it choose {', '.join(BACKBONES.names())}"
        )
    import timm

    name = backbone.removeprefix("timm:")
    architecture = name.split(".")[0]
    if architecture not in timm.list_models():
        # timm knows over a thousand names: only one that is really near helps.
        near = difflib.get_close_matches(architecture.lower(), timm.list_models(), n=1, cutoff=0.8)
        valid = dict.fromkeys([*BACKBONES.names(), *near])
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
        load_file(network, weights, name, ignore=("fc.", "classifier.", "head.fc.", "head."))
    scaling = IMAGENET_SCALING
    if config is not None and input_shape[0] == 3 and request.is_pretrained:
        scaling = (tuple(config.mean), tuple(config.std))
    width = _output_width(network, f"timm's {name!r}", input_shape)
    return ImageFeaturizer(network, width, request.freeze_bn, request.dropout, scaling)


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
