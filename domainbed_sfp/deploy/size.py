"""How large the exported file of an algorithm's network will be."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.algorithms.quantization.base import QuantizedAlgorithm
from domainbed_sfp.deploy import packed, shrink


def exported_bytes(algorithm: Algorithm, masks: Mapping[str, Tensor] | None = None) -> int | None:
    """Bytes of the tensors in the file that the command `export` writes; None where the algorithm has no `export`.

    Args:
        masks: bool tensors by parameter name, of a checkpoint; the algorithm's own where none are given.
    """
    if type(algorithm).export is Algorithm.export:
        return None
    if isinstance(algorithm, QuantizedAlgorithm):
        return packed.stored_bytes(algorithm.export())
    return shrink.exported_bytes(algorithm.export(), algorithm.masks() if masks is None else masks)
