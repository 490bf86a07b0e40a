"""From a finished run to a file to deploy: dead channels gone, quantized weights packed, and logits compared before
anything is written."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from torch import Tensor, nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.algorithms.quantization.base import QuantizedAlgorithm
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.core.version import __version__
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD
from domainbed_sfp.deploy import shrink
from domainbed_sfp.deploy.exported import HEADER, Description, ExportedNetwork, rebuild, to_bytes
from domainbed_sfp.deploy.finished_runs import TrainedRun, load_run
from domainbed_sfp.networks.channel_gates import fold_constant_gates, gate_widths
from domainbed_sfp.pruning import costs

FORMATS = ("safetensors", "onnx")

# How far logits of the exported network may be from the masked network's; of the larger of 1 and the largest logit.
TOLERANCE = 1e-4
# Where only float32 can be compared, they may also differ by this many times what float32's rounding does to them.
ROUNDINGS = 10
RANDOM_IMAGES = 8
# Where predictions must agree and there are no real images: 1 / (1 - AGREEMENT).
VOTING_IMAGES = 100
REAL_IMAGES = 32  # of every environment

# Share of images on which ONNX's integers must predict what the simulation of training does.
AGREEMENT = 0.99


@dataclass(frozen=True)
class Compact:
    """A run's network, masked as it was trained and with its dead channels gone.

    cost: of the masked network, whose surviving parameters and MACs are those of `network` where whole channels are
    masked, but for gates that became constant: those count here and are in the weights of `network`. stored_zeros:
    masked weights that are in the tensors of `network` still.
    """

    run: TrainedRun
    masked: nn.Module
    network: ExportedNetwork
    description: Description
    cost: costs.Cost
    removed: int
    stored_zeros: int


def compact(run: TrainedRun) -> Compact:
    """Takes the dead channels out of a run's network.

    Raises UserError where the algorithm has no export, masks are of another network, or torch-pruning is needed and
    cannot do it.
    """
    algorithm, shape = run.algorithm, run.algorithm.input_shape
    if type(algorithm).export is Algorithm.export:
        raise UserError(f"algorithm {run.args['algorithm']} defines no export(): there is no plain network to take")
    masked, masks = algorithm.export().requires_grad_(False), algorithm.masks()
    network, dead = shrink.remove_channels(masked, masks, shape)
    network.requires_grad_(False)
    fold_constant_gates(network)
    positions = costs.count_positions(algorithm, shape, algorithm.predict)
    cost = costs.measure_cost(algorithm.deployed_parameters(), positions, masks)
    zeros = sum(int((~mask).sum()) for mask in shrink.surviving_masks(masks, dead).values())
    description = Description(
        backbone=networks.backbone_name(shape, run.hparams),
        input_shape=shape,
        num_classes=algorithm.num_classes,
        nonlinear_classifier=bool(run.hparams.get("nonlinear_classifier", False)),
        normalization=_normalization(run),
        group_norms=shrink.surviving_groups(network),
        gates=gate_widths(network),
        origin={
            **_origin(run),
            "sparsity": algorithm.sparsity(),
            "parameters": cost.surviving_parameters,
            "macs": cost.macs,
        },
    )
    removed = sum(int(entry.dead.sum()) for entry in dead)
    return Compact(run, masked, network, description, cost, removed, zeros)


def export(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    file_format: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> str:
    """Writes the network of the run in `folder` to the file `output`, and returns a line that tells about it.

    Without a `file_format` it is "onnx" where the name ends in .onnx, else "safetensors".

    Before that, the contents of the file are turned into a network again and compared with the masked network on random
    images, and on real ones where the data set needs no files or `data_dir` says where they are.

    Raises:
        UserError: for a run that is not finished or has no model, an unknown format or one that the name contradicts,
            a file that cannot be written, an extra that is missing, or logits that differ. Nothing is written then.
    """
    output = Path(output)
    file_format = _checked_format(output, file_format)
    run = load_run(folder)
    if isinstance(run.algorithm, QuantizedAlgorithm):
        data, told = _quantized(run, run.algorithm, file_format, real_images(run, data_dir, cache_dir))
        _write(output, data)
        return f"{output}: {told}"
    made = compact(run)
    data = to_bytes(made.network, made.description)
    # As a loader will do it, the description too through its text.
    rebuilt = rebuild(Description.from_json(made.description.to_json()), tensors_of(data))
    images = {
        "random": torch.randn(RANDOM_IMAGES, *made.description.input_shape, generator=torch.Generator().manual_seed(0))
    }
    real = real_images(run, data_dir, cache_dir)
    if real is not None:
        images["real"] = real
    # What was evaluated, which for another's algorithm need not be what its `export` gives.
    rounding = 0.0
    difference = max(compare_networks(run.algorithm, rebuilt, x, kind) for kind, x in images.items())
    if file_format == "onnx":
        data = _onnx_bytes(made)
        predict = _onnx_predictor(data)
        difference, rounding = map(
            max, zip(*(compare_rounded(rebuilt, predict, x, kind) for kind, x in images.items()))
        )
    _write(output, data)
    compared = f"{RANDOM_IMAGES} random and {'no' if real is None else len(real)} real images"
    within = f"logits within {difference:.1e} of the masked network's on {compared}"
    if difference > TOLERANCE:
        within += f", where float32's rounding alone makes {rounding:.1e}"
    return f"{output}: {_told(made)}; {len(data):,} bytes; {within}"


def _checked_format(output: Path, file_format: str | None) -> str:
    """The format of the file to be written. Raises UserError where name and format do not agree, the file cannot be
    written there, or what the format needs is not installed."""
    named = output.suffix[1:].lower()
    if file_format is None:
        file_format = named if named in FORMATS else "safetensors"
    if file_format not in FORMATS:
        raise unknown_name("--format", file_format, FORMATS)
    if named in FORMATS and named != file_format:
        raise UserError(f"--output {str(output)!r} and --format {file_format} contradict each other; give one of them")
    if output.is_dir():
        raise UserError(f"--output {str(output)!r} is a folder; expected the name of a file")
    if not output.parent.is_dir():
        raise UserError(f"--output {str(output)!r}: there is no folder {str(output.parent)!r}")
    if file_format == "onnx":
        _require_onnx()
    return file_format


def _write(output: Path, data: bytes) -> None:
    try:
        write_atomically(output, data)
    except OSError as error:
        raise UserError(f"--output {str(output)!r} cannot be written: {error.strerror or error}") from error


@torch.no_grad()
def _quantized(
    run: TrainedRun, algorithm: QuantizedAlgorithm, file_format: str, real: Tensor | None
) -> tuple[bytes, str]:
    """The file of a quantized run, and what there is to tell about it.

    Integers with their scales give the very logits of training's simulation, and are held to it. A runtime of ONNX
    rounds elsewhere where a value lies on the edge between two steps: there predictions must agree on AGREEMENT of the
    images, of which there are enough for one to differ, and the difference of the logits is told.
    """
    from domainbed_sfp.deploy import packed as quantized

    count = VOTING_IMAGES if file_format == "onnx" and real is None else RANDOM_IMAGES
    random = torch.randn(count, *algorithm.input_shape, generator=torch.Generator().manual_seed(0))
    about = {"normalization": _normalization(run), "origin": _origin(run)}
    images = random if real is None else torch.cat([random, real])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        if file_format == "onnx":
            quantized.save_onnx(path, algorithm, about)
            predict = _onnx_predictor(path.read_bytes())
        else:
            quantized.save(path, algorithm, about)
            loaded = quantized.load(path)
        data = path.read_bytes()
    if file_format == "onnx":
        exported, expected = predict(images), algorithm.predict(images)
        agreement = float((exported.argmax(1) == expected.argmax(1)).float().mean())
        if not agreement >= AGREEMENT:
            raise UserError(
                f"onnxruntime's predictions agree with the simulated network's on {agreement:.1%} of {len(images)} "
                f"images, {AGREEMENT:.0%} is asked for; nothing is written. The two round values between two steps to "
                "different sides: networks of fewer bits or less training have more of these; safetensors is exact"
            )
        difference = float((exported - expected).abs().max())
        compared = f"predictions agree on {agreement:.1%}, logits within {difference:.1e}"
    else:
        compared = f"logits within {compare_networks(algorithm, loaded, images, 'the'):.1e} of the simulated network's"
    # What no unquantized network has, policies and step sizes, is no part of its size.
    floats = sum(
        4 * parameter.numel()
        for name, parameter in algorithm.deployed_parameters().items()
        if not {"policy", "weight_steps", "input_steps"} & set(name.split("."))
    )
    told = (
        f"{networks.backbone_name(algorithm.input_shape, run.hparams)}, {algorithm.costs()['mean_bits']:.2f} bits on "
        f"average; {len(data):,} bytes ({floats:,} as floats); {compared} ({count} random and "
        f"{0 if real is None else len(real)} real images)"
    )
    return data, told


@torch.no_grad()
def compare_networks(algorithm: Algorithm, network: nn.Module, images: Tensor, kind: str) -> float:
    """The largest difference between the logits of an algorithm and of its exported network on images [N, C, H, W].

    Both compute in float64: in float32 a network that has hardly been trained can differ from itself by more than
    TOLERANCE, when its sums are only taken in another order. Raises UserError as `compare` does.
    """
    modules = (algorithm, network)
    try:
        for module in modules:
            module.double()
        return compare(algorithm.predict, network, images.double(), kind)
    except (RuntimeError, TypeError):  # another's algorithm may hold tensors of its own, which stay float32
        for module in modules:
            module.float()
        return compare(algorithm.predict, network, images, kind)
    finally:
        for module in modules:
            module.float()


@torch.no_grad()
def compare_rounded(
    network: nn.Module, predict: Callable[[Tensor], Tensor], images: Tensor, kind: str
) -> tuple[float, float]:
    """The largest difference between the logits of a network and of a runtime that knows float32 alone, and what
    float32 does to the network's own logits, of which ROUNDINGS times as much is allowed. Raises UserError as
    `compare` does."""
    rounded = network(images)
    exact = network.double()(images.double())
    network.float()
    rounding = float((rounded - exact).abs().max())
    return compare(lambda _: rounded, predict, images, kind, ROUNDINGS * rounding), rounding


@torch.no_grad()
def compare(
    masked: Callable[[Tensor], Tensor],
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    kind: str,
    rounding: float = 0.0,
) -> float:
    """The largest difference between two networks' logits on images [N, C, H, W].

    Raises UserError where it is more than `rounding` and than TOLERANCE (of the largest logit, where that is above 1),
    or not a number.
    """
    expected = masked(images)
    difference = float((predict(images) - expected).abs().max())
    allowed = max(rounding, TOLERANCE * max(1.0, float(expected.abs().max())))
    if not difference <= allowed or not math.isfinite(allowed):
        raise UserError(
            f"the exported network would have other logits than the masked one: they differ by {difference:.2e} on "
            f"{kind} images, {allowed:.1e} is allowed; nothing is written"
        )
    return difference


def real_images(run: TrainedRun, data_dir: str | None, cache_dir: str | None) -> Tensor | None:
    """The first images of every environment of a run's data set, [N, C, H, W]; None where it needs files and
    `data_dir` is not given. Raises UserError where the data are not there or have another shape."""
    dataset_class = get_dataset_class(run.args["dataset"])
    if data_dir is None and not dataset_class.EMBEDDED:
        return None
    # Records of DomainBed's own loop, whose loaders fix the size, do not say it.
    hparams = {"image_size": run.algorithm.input_shape[-1], **run.hparams}
    dataset = dataset_class.build(data_dir, hparams, run.args["seed"], Path(cache_dir) if cache_dir else None)
    if dataset.input_shape != run.algorithm.input_shape:
        raise UserError(f"images have shape {dataset.input_shape}, the run's had {run.algorithm.input_shape}")
    cpu = torch.device("cpu")
    return torch.cat([next(dataset.evaluation_batches(i, cpu, REAL_IMAGES))[0] for i in range(len(dataset))])


def _origin(run: TrainedRun) -> dict[str, Any]:
    return {
        "algorithm": run.args["algorithm"],
        "dataset": run.args["dataset"],
        "test_envs": run.args["test_envs"],
        "domainbed_sfp": __version__,
        "torch": str(torch.__version__),
    }


def _normalization(run: TrainedRun) -> dict[str, tuple[float, ...]] | None:
    if get_dataset_class(run.args["dataset"]).SMALL_IMAGES or run.algorithm.input_shape[0] != 3:
        return None
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _told(made: Compact) -> str:
    cost = made.cost
    sizes = (
        f"{cost.parameters:,} -> {cost.surviving_parameters:,} parameters, {cost.dense_macs:,} -> {cost.macs:,} MACs"
    )
    if made.stored_zeros:
        return (
            f"{made.description.backbone}, {made.removed} channels taken out; {made.stored_zeros:,} masked single "
            f"weights are stored as zeros, which saves neither bytes nor time (without them {sizes})"
        )
    return f"{made.description.backbone}, {made.removed} channels taken out: {sizes}"


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'domainbed_sfp[export]'")


def _onnx_bytes(made: Compact) -> bytes:
    """The network as an ONNX model of any batch size, `images` to `logits`, with the description in its metadata."""
    example = torch.zeros(2, *made.description.input_shape)
    try:
        program = torch.onnx.export(
            made.network.eval(),
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
        entry = model.metadata_props.add()
        entry.key, entry.value = HEADER, made.description.to_json()
        return model.SerializeToString()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{made.description.backbone!r} cannot be written as ONNX ({type(error).__name__}: {reason})"
        ) from error


def _onnx_predictor(data: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])
