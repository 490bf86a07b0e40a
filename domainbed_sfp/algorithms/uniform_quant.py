"""Learned step size quantization at one bit-width (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from domainbed_sfp.algorithms.quantized import QUANTIZATION_HPARAMS, QuantizedAlgorithm
from domainbed_sfp.hparams import Hparam, Range
from domainbed_sfp.quantization.layers import quantize_layers
from domainbed_sfp.quantization.quantizers import NARROWEST, WIDEST
from domainbed_sfp.registry import register


@register(
    "UniformQuant",
    family="quantization",
    reference="Esser et al. 2020, arXiv 1902.08153",
    hparams={
        **QUANTIZATION_HPARAMS,
        "bits": Hparam(
            4,
            lambda r: r.choice([2, 3, 4, 8]),
            "bit-width of weights and inputs",
            valid=Range(f"a whole number of bits in {NARROWEST}..{WIDEST}", lambda value: NARROWEST <= value <= WIDEST),
        ),
    },
)
class UniformQuant(QuantizedAlgorithm):
    """Quantizes weights and inputs of every layer to `bits`, the first layer's and the classifier's to 8.

    The paper starts from a trained full-precision network and trains with SGD; here quantization begins with the run,
    and DomainBed's Adam trains, see `quantizers.StepSizes`.
    """

    def quantize(self, names: Sequence[str]) -> dict[str, Any]:
        return quantize_layers(self, names, self.control, None, self.hparams["bits"])
