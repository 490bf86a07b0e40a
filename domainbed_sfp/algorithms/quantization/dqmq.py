"""DQMQ, data quality-aware mixed-precision quantization (arXiv 2302.04453; IEEE TNNLS 2024)."""

from __future__ import annotations

from domainbed_sfp.algorithms.quantization.base import POLICY_HPARAMS, POLICY_RETIRED, PolicyQuantization
from domainbed_sfp.algorithms.registry import register


@register(
    "DQMQ",
    family="quantization",
    reference="arXiv 2302.04453",
    standing="reconstruction",
    hparams=POLICY_HPARAMS,
    retired=POLICY_RETIRED,
)
class DQMQ(PolicyQuantization):
    """Chooses the bit-width of every layer from the sample itself: poor images may need other widths than good ones.

    From the paper: layer-wise bit-widths by a policy conditioned on the input, trained jointly with quantization-aware
    training; discrete choices relaxed to a continuous distribution with few parameters; an objective of task
    performance and quantization benefit; training data of mixed quality. Its method section is not available to this
    project, so everything else is a reconstruction: the policy (pooled and standardised input, 16 hidden units, a
    discretised Gaussian), LSQ with a step size for each width, draws that a batch shares and that end half way through
    the run, the budget's penalty and its calibration (`quantized.PolicyQuantization`), and the degradations
    (`data.degradations`). The gradient of a draw is not the relaxed one of straight-through Gumbel, which computes
    every width, but has its purpose: see `quantization.policy.straight_through`.

    The paper claims, on ImageNet at equal compression, 2.1 points more for ResNet-18, 1.7 for ResNet-50 and .5 for
    MobileNet-V2. None of that was tried here, and nothing of it is claimed of this reconstruction.
    """

    reads_input = True
