"""What a network costs that is built anew, and between what bounds it lies where training has decided it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.algorithms.quantization.base import QuantizedAlgorithm
from domainbed_sfp.deploy.size import exported_bytes
from domainbed_sfp.quantization.policy import WIDTHS
from domainbed_sfp.quantization.quantizers import WIDEST

# From, to: of a cost, by its name in a record.
Limits = Mapping[str, tuple[float, float]]


def settle(algorithm: Algorithm) -> Mapping[str, float]:
    """Brings a quantized algorithm as it begins to the widths that its hparams give the finished model; its `costs()`
    then."""
    if isinstance(algorithm, QuantizedAlgorithm):
        algorithm.set_extra_state({**algorithm.get_extra_state(), "step": algorithm.total_steps})
        for layer in algorithm.layers.values():  # as the first batch leaves it: its step size is exported too
            layer.input_steps.is_ready = True
    return algorithm.costs()


def settled(
    algorithm: Algorithm, costs: Mapping[str, float], masks: Mapping[str, Tensor]
) -> dict[str, float | int | None]:
    """The costs beyond parameters and MACs that architecture, hparams and masks determine, by their names in a record.

    Bit-widths that are learned lie in weights that no bundle holds: what follows from them is not among these.

    Args:
        algorithm: as `settle` leaves it.
        costs: what that gave.
        masks: of the checkpoint in question.
    """
    found: dict[str, float | int | None] = {}
    if isinstance(algorithm, QuantizedAlgorithm):
        found["bitops_8bit"] = costs["bitops_8bit"]
        if not _chooses_widths(algorithm):
            found |= {"bitops": costs["bitops"], "mean_bits": costs["mean_bits"]}
            found["exported_bytes"] = exported_bytes(algorithm)
    else:
        found["exported_bytes"] = exported_bytes(algorithm, masks)
    return found


def limits(algorithm: Algorithm, costs: Mapping[str, float], is_final: bool) -> Limits:
    """The least and the most that a quantized network can cost, by names in a record; none where that is not known.

    Widths are learned, or fixed by the hparams at final compression; until then all layers have WIDEST bits.

    Args:
        algorithm: as `settle` leaves it.
        costs: what that gave.
        is_final: whether it is about a checkpoint at final compression.
    """
    if not isinstance(algorithm, QuantizedAlgorithm):
        return {}
    eight = (costs["bitops_8bit"], costs["bitops_8bit"])
    if not is_final:
        return {"bitops_8bit": eight, "bitops": eight, "mean_bits": (float(WIDEST), float(WIDEST))}
    if not _chooses_widths(algorithm):
        return {"bitops_8bit": eight} | {name: (costs[name], costs[name]) for name in ("bitops", "mean_bits")}
    bitops = algorithm.bitops
    packed = sum(layer.layer.weight.numel() for layer in algorithm.layers.values()) * WIDTHS[0] // 8
    return {
        "bitops_8bit": eight,
        "bitops": (float(bitops.uniform(WIDTHS[0])), float(bitops.uniform(WIDEST))),
        "mean_bits": (float(WIDTHS[0]), float(WIDTHS[-1])),
        "exported_bytes": (float(packed), math.inf),
    }


def _chooses_widths(algorithm: QuantizedAlgorithm) -> bool:
    return any(layer.policy is not None for layer in algorithm.layers.values())
