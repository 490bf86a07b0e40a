"""A bit-width for each layer, learned with the network and alike for all samples: DQMQ's control."""

from __future__ import annotations

from domainbed_sfp.algorithms.quantization.base import POLICY_HPARAMS, POLICY_RETIRED, PolicyQuantization
from domainbed_sfp.algorithms.registry import register


@register(
    "StaticMixedPrecision",
    family="quantization",
    reference="DQMQ (arXiv 2302.04453) without its input",
    standing="reconstruction",
    hparams=POLICY_HPARAMS,
    retired=POLICY_RETIRED,
)
class StaticMixedPrecision(PolicyQuantization):
    """DQMQ with a constant in place of what its policies read: what it gains over this it gains from the input."""

    reads_input = False
