"""What a network costs that is built anew, and between what bounds it lies where training has decided it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.algorithms.quantized import QuantizedAlgorithm
from domainbed_sfp.pruning import surgery
from domainbed_sfp.quantization.policy import WIDTHS
from domainbed_sfp.quantization.quantizers import WIDEST


def settled(
    algorithm: Algorithm, costs: Mapping[str, float], masks: Mapping[str, Tensor]
) -> dict[str, float | int | None]:
    """The costs beyond parameters and MACs that architecture, hparams and masks determine, by their names in a record.

    Bit-widths that are learned lie in weights that no bundle holds: what follows from them is not among these.

    Args:
        algorithm: as it begins.
        costs: what its `costs()` gave then.
        masks: of the checkpoint in question.
    """
    found: dict[str, float | int | None] = {}
    if "bitops_8bit" in costs:
        found["bitops_8bit"] = costs["bitops_8bit"]
    if isinstance(algorithm, QuantizedAlgorithm):
        if not _chooses_widths(algorithm):
            found |= {"bitops": costs["bitops"], "mean_bits": costs["mean_bits"]}
            for layer in algorithm.layers.values():  # as the first batch leaves it: its step size is exported too
                layer.input_steps.is_ready = True
            found["exported_bytes"] = algorithm.exported_bytes()
    elif type(algorithm).exported_bytes is Algorithm.exported_bytes:
        exports = type(algorithm).export is not Algorithm.export
        found["exported_bytes"] = surgery.exported_bytes(algorithm.export(), masks) if exports else None
    return found


def limits(algorithm: Algorithm) -> dict[str, tuple[float, float]]:
    """The least and the most that learned bit-widths can cost, by their names in a record."""
    if not (isinstance(algorithm, QuantizedAlgorithm) and _chooses_widths(algorithm)):
        return {}
    bitops = algorithm.bitops
    return {
        "bitops": (float(bitops.uniform(WIDTHS[0])), float(bitops.uniform(WIDEST))),
        "mean_bits": (float(WIDTHS[0]), float(WIDTHS[-1])),
    }


def _chooses_widths(algorithm: QuantizedAlgorithm) -> bool:
    return any(layer.policy is not None for layer in algorithm.layers.values())
