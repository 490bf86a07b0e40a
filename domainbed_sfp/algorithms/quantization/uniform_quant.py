"""Learned step size quantization at one bit-width (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.quantization.base import QUANTIZATION_HPARAMS, QuantizedAlgorithm
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.hparam import FRACTION, Hparam, Range
from domainbed_sfp.quantization.layers import QuantizedLayer, quantize_layers
from domainbed_sfp.quantization.quantizers import NARROWEST, WIDEST


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
        "quantize_start": Hparam(
            0.0, doc="fraction of the run at 8 bits, before the width is taken", valid=FRACTION, earlier=0.0
        ),
    },
)
class UniformQuant(QuantizedAlgorithm):
    """Quantizes weights and inputs of every layer to `bits`, the first layer's and the classifier's to 8.

    The paper starts from a trained full-precision network and trains with SGD; here quantization begins with the run,
    or at `quantize_start` after training at 8 bits, as the methods with a policy do, and DomainBed's Adam trains, see
    `quantizers.StepSizes`.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if self.hparams["quantize_start"]:
            self._set_bits(WIDEST)

    def quantize(self, names: Sequence[str]) -> dict[str, Any]:
        return quantize_layers(self, names, self.control, None, self.hparams["bits"])

    def first_step(self) -> int:
        """The step whose update is the first at `bits`."""
        return min(round(self.hparams["quantize_start"] * self.total_steps), self.total_steps - 1)

    def at_final_compression(self) -> bool:
        return not self.hparams["quantize_start"] or self.step > self.final_step()

    def final_step(self) -> int:
        return self.first_step()

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.hparams["quantize_start"] and self.step == self.first_step():
            self._set_bits(self.hparams["bits"])
            for layer in self._inner_layers():
                layer.start_widths()
        return super().update(minibatches, unlabeled)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self._set_bits(self.hparams["bits"] if self.at_final_compression() else WIDEST)

    def _inner_layers(self) -> list[QuantizedLayer]:
        return list(self.layers.values())[1:-1]

    def _set_bits(self, bits: int) -> None:
        for layer in self._inner_layers():
            layer.set_bits(bits)
