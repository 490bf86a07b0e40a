"""Quantized networks as files: packed integers in safetensors, and ONNX with QuantizeLinear and DequantizeLinear.

The safetensors file holds, for every quantized layer and every width it uses, `integers/LAYER/BITS` (see `packing`),
and everything else of the network in float32 (step sizes, biases, normalisation, policies) under its own name. LSQ
learns a step size for each width, so the integers of two widths differ and each is stored: a network that decides
sample by sample is about as large as the sum of the widths it uses, not smaller than a uniform one. The header, JSON
under `domainbed_sfp_quantized`, says how the network is built. No training weight is in the file.

ONNX has one width for each layer, so only networks without a policy can be written. Weights of up to 4 bits are stored
as INT4, two to a byte, wider ones as INT8; inputs of less than 8 bits pass a Clip before an 8-bit QuantizeLinear.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from domainbed_sfp import networks
from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.quantization.deployment import DeployedLayer
from domainbed_sfp.quantization.layers import make_policy
from domainbed_sfp.quantization.packing import pack, packed_bytes, unpack

if TYPE_CHECKING:
    from domainbed_sfp.algorithms.quantization.base import QuantizedAlgorithm

HEADER = "domainbed_sfp_quantized"
# 2: policies standardise what they read.
FORMAT = 2
INTEGERS = "integers/"

# What `networks` asks for; where the weights came from is no longer of interest.
NETWORK_HPARAMS = ("backbone", "freeze_bn", "nonlinear_classifier", "resnet18", "resnet50_augmix", "resnet_dropout")

# INT4 came with this version of ONNX's operators.
ONNX_OPSET = 21


def save(path: str | os.PathLike[str], algorithm: QuantizedAlgorithm, about: Mapping[str, Any] | None = None) -> None:
    """Writes the network of `algorithm` as packed integers; see the module's text. `about`: JSON values that its header
    tells besides, such as how pixels are to be normalised."""
    network = algorithm.export()
    described = {
        name: {
            "shape": list(layer.integers.shape[1:]),
            "widths": list(layer.widths),
            "signed_input": layer.signed,
            "quantizes_input": layer.input_steps is not None,
            "has_policy": layer.policy is not None,
        }
        for name, layer in deployed_layers(network).items()
    }
    header: dict[str, Any] = {
        **(about or {}),
        "format": FORMAT,
        "input_shape": list(algorithm.input_shape),
        "num_classes": algorithm.num_classes,
        "hparams": {name: algorithm.hparams[name] for name in NETWORK_HPARAMS},
        "layers": described,
    }
    featurizer = algorithm.featurizer
    if isinstance(featurizer, networks.ImageFeaturizer) and featurizer.rescale:
        # Not part of a state dict, and in timm's networks a property of the weights.
        header["input_scale"] = featurizer.input_scale.flatten().tolist()
        header["input_shift"] = featurizer.input_shift.flatten().tolist()
    write_atomically(path, save_tensors(stored_tensors(network), metadata={HEADER: json.dumps(header)}))


def stored_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a deployed network as `save` stores them, by name: packed integers, and the rest in float32."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in _unpacked(network).items()}
    for name, layer in deployed_layers(network).items():
        for integers, bits in zip(layer.integers, layer.widths):
            tensors[f"{INTEGERS}{name}/{bits}"] = pack(integers, bits)
    return tensors


def stored_bytes(network: nn.Module) -> int:
    """Bytes of `stored_tensors`, without packing anything: records ask at each evaluation."""
    plain = sum(value.numel() * value.element_size() for value in _unpacked(network).values())
    return plain + sum(
        packed_bytes(layer.integers[0].numel(), bits)
        for layer in deployed_layers(network).values()
        for bits in layer.widths
    )


def _unpacked(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a deployed network that are stored as they are."""
    packed = {f"{name}.{part}" for name in deployed_layers(network) for part in ("integers", "layer.weight")}
    return {name: value for name, value in network.state_dict().items() if name not in packed}


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network in a file of `save`, in evaluation mode: images [N, C, H, W] to the logits of the quantized network.

    Raises UserError for a file that is none of ours, or damaged.
    """
    header, tensors = _read(Path(path))
    try:
        return _build(header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{str(path)!r} is not a whole quantized network: {' '.join(str(error).split())}") from error


def deployed_layers(network: nn.Module) -> dict[str, DeployedLayer]:
    """The quantized layers of a deployed network, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, DeployedLayer)}


def save_onnx(
    path: str | os.PathLike[str], algorithm: QuantizedAlgorithm, about: Mapping[str, Any] | None = None
) -> None:
    """Writes the network of `algorithm` as ONNX: `images` [batch, C, H, W] to `logits` [batch, classes]. `about`: JSON
    values for the metadata entry `HEADER`.

    Raises UserError for a network that decides sample by sample or that torch cannot write as ONNX, and where the extra
    `export` is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX export needs {' and '.join(missing)}: pip install 'domainbed_sfp[export]'")
    import onnx

    network = algorithm.export().cpu()
    layers = deployed_layers(network)
    deciding = [name for name, layer in layers.items() if layer.policy is not None]
    if deciding:
        raise UserError(
            f"{type(algorithm).__name__} chooses bit-widths sample by sample, and ONNX has one for each layer "
            f"({len(deciding)} of {len(layers)} layers choose); export to safetensors, or train StaticMixedPrecision"
        )
    example = torch.zeros(2, *algorithm.input_shape)
    try:
        program = torch.onnx.export(
            _with_plain_layers(network, layers),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=ONNX_OPSET,
            dynamo=True,
            # Folding BatchNorm into the weights would take them off their grid.
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the network cannot be written as ONNX ({type(error).__name__}: {reason})") from error
    assert program is not None
    model = program.model_proto
    for name, layer in layers.items():
        _quantize_node(model.graph, f"{name}.weight", layer)
    if about:
        entry = model.metadata_props.add()
        entry.key, entry.value = HEADER, json.dumps(about)
    onnx.checker.check_model(model)
    write_atomically(path, model.SerializeToString())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = strict_json.parse((file.metadata() or {})[HEADER])
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"there is no file {str(path)!r}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a quantized network of this package ({error})") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} has format {header.get('format')!r}; this version reads {FORMAT}")
    return header, tensors


def _build(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    hparams = {**header["hparams"], "weights": "none"}
    featurizer = networks.make_featurizer(tuple(header["input_shape"]), hparams)
    classifier = networks.make_classifier(
        featurizer.n_outputs, header["num_classes"], header["hparams"]["nonlinear_classifier"]
    )
    if "input_scale" in header:
        assert isinstance(featurizer, networks.ImageFeaturizer)
        featurizer.rescale = True
        for name in ("input_scale", "input_shift"):
            featurizer.register_buffer(name, torch.tensor(header[name]).view(1, -1, 1, 1), persistent=False)
    network = nn.Sequential(featurizer, classifier)
    for name, described in header["layers"].items():
        layer = network.get_submodule(name)
        widths, shape = described["widths"], tuple(described["shape"])
        steps = torch.empty(len(widths))
        replacement = DeployedLayer(
            layer,
            widths,
            torch.stack([unpack(tensors[f"{INTEGERS}{name}/{bits}"], bits, shape) for bits in widths]),
            steps,
            steps.clone() if described["quantizes_input"] else None,
            described["signed_input"],
            make_policy(layer) if described["has_policy"] else None,
        )
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, replacement)
    state = {name: value for name, value in tensors.items() if not name.startswith(INTEGERS)}
    for name, layer in deployed_layers(network).items():
        state[f"{name}.integers"] = layer.integers
        state[f"{name}.layer.weight"] = torch.empty(0)
    network.load_state_dict(state)
    return network.eval()


def _with_plain_layers(network: nn.Module, layers: Mapping[str, DeployedLayer]) -> nn.Module:
    """A copy with the layers themselves, their weights on the grid and their inputs as they come."""
    plain = copy.deepcopy(network)
    for name, layer in layers.items():
        inner = copy.deepcopy(layer.layer)
        inner.weight = nn.Parameter(layer.weight(0).detach(), requires_grad=False)
        parent, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, inner)
    return plain.eval()


def _quantize_node(graph: Any, weight: str, layer: DeployedLayer) -> None:
    """Stores the initializer `weight` as integers, and quantizes the input of the node that multiplies by it."""
    from onnx import TensorProto, helper, numpy_helper

    (initializer,) = (item for item in graph.initializer if item.name == weight)
    bits = layer.widths[0]
    stored = layer.integers[0].flatten().numpy()
    if bits <= 4:  # two to a byte, in two's complement, the first in the lower half
        kind, stored = TensorProto.INT4, np.append(stored, np.zeros(len(stored) % 2, np.int8)).view(np.uint8) & 15
        stored = stored[::2] | stored[1::2] << 4
    else:
        kind = TensorProto.INT8
    integers = helper.make_tensor(f"{weight}.integers", kind, initializer.dims, stored.tobytes(), raw=True)
    graph.initializer.remove(initializer)
    scale = numpy_helper.from_array(layer.weight_steps[0].numpy(), f"{weight}.step")
    graph.initializer.extend([integers, scale])
    graph.node.insert(0, helper.make_node("DequantizeLinear", [integers.name, scale.name], [weight]))
    if layer.input_steps is None:
        return
    position, node = _multiplying_node(graph, weight)
    step = layer.input_steps[0]
    low, high = float(layer.low[0] * step), float(layer.high[0] * step)
    zero_kind = TensorProto.INT8 if layer.signed else TensorProto.UINT8
    constants = {
        "step": numpy_helper.from_array(step.numpy(), f"{weight}.input_step"),
        "zero": helper.make_tensor(f"{weight}.input_zero", zero_kind, [], [0]),
    }
    source, new = node.input[0], []
    if bits < 8:
        constants["low"] = helper.make_tensor(f"{weight}.input_low", TensorProto.FLOAT, [], [low])
        constants["high"] = helper.make_tensor(f"{weight}.input_high", TensorProto.FLOAT, [], [high])
        clipped = f"{weight}.input_clipped"
        new.append(helper.make_node("Clip", [source, constants["low"].name, constants["high"].name], [clipped]))
        source = clipped
    grid = [constants["step"].name, constants["zero"].name]
    quantized, result = f"{weight}.input_integers", f"{weight}.input_quantized"
    new.append(helper.make_node("QuantizeLinear", [source, *grid], [quantized]))
    new.append(helper.make_node("DequantizeLinear", [quantized, *grid], [result]))
    graph.initializer.extend(constants.values())
    node.input[0] = result
    for made in reversed(new):
        graph.node.insert(position, made)


def _multiplying_node(graph: Any, weight: str) -> tuple[int, Any]:
    """The node that multiplies by a weight, and its place: it may read it transposed."""
    for position, node in enumerate(graph.node):
        if weight in list(node.input)[1:] and node.op_type in ("Conv", "Gemm", "MatMul"):
            return position, node
        if weight in node.input and node.op_type == "Transpose":
            return _multiplying_node(graph, node.output[0])
    raise UserError(f"ONNX export: no Conv, Gemm or MatMul reads {weight!r}")
