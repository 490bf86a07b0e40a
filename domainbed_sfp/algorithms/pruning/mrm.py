"""Modular risk minimization (Zhang, Ahuja, Xu, Wang, Courville 2021, "Can subnetwork structure be the key to
out-of-distribution generalization?", ICML 2021, arXiv 2106.02890), with ERM and with invariance objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from domainbed_sfp.algorithms.objectives import groupdro, irm, vrex
from domainbed_sfp.algorithms.pruning.gated import LEARNED_MASK_HPARAMS, LEARNED_MASK_RETIRED, LearnedMaskPruning
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.pruning.state import NamedTensors

REFERENCE = "Zhang et al. 2021 (ICML), arXiv 2106.02890"
# The stages of the modular-subnetwork code: 40, 20 and 40% of the run.
MASK_START, MASK_END = 0.4, 0.6
RETIRED = {**LEARNED_MASK_RETIRED, "mask_start": MASK_START, "mask_end": MASK_END}


@register(
    "MRM",
    family="pruning",
    reference=REFERENCE,
    hparams={**LEARNED_MASK_HPARAMS, "objective": UNIT_HPARAMS["objective"]},
    retired=RETIRED,
)
class MRM(LearnedMaskPruning):
    """Modular risk minimization (algorithm 1): train, learn a mask with frozen weights, retrain from the beginning.

    Stage 1 trains the weights from w0 with the objective; stage 2 learns one logit per weight on the same objective
    plus alpha * sum(logits); stage 3 rewinds weights and normalization statistics to w0 and trains m * w0 with the
    objective, whose own state (annealing, group weights) and optimizer begin anew. 40, 20 and 40% of the run.

    Stages and constants as in the modular-subnetwork code that the paper builds on (Csordas et al. 2021, arXiv
    2010.02066) and in the MRM mode of DCWP's (Park et al. 2023). The convolutions' weights are masked; the classifier
    stays whole, as in every method here.
    """

    mask_start, mask_end = MASK_START, MASK_END

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.beginning = NamedTensors(self.network.state_dict())

    def begin_retraining(self) -> None:
        self.network.load_state_dict(self.beginning.as_dict())
        self.optimizer = self.make_optimizer()
        self.objective.load_state_dict(type(self.objective)(self.hparams, self.num_domains).state_dict())


@register(
    "ModIRM",
    family="pruning",
    reference=REFERENCE,
    hparams={**LEARNED_MASK_HPARAMS, **irm.HPARAMS},
    retired=RETIRED,
)
class ModIRM(MRM):
    """Modular risk minimization with IRMv1 in all three stages."""

    objective_name = "IRM"


@register(
    "ModREx",
    family="pruning",
    reference=REFERENCE,
    hparams={**LEARNED_MASK_HPARAMS, **vrex.HPARAMS},
    retired=RETIRED,
)
class ModREx(MRM):
    """Modular risk minimization with V-REx in all three stages."""

    objective_name = "VREx"


@register(
    "ModGroupDRO",
    family="pruning",
    reference=REFERENCE,
    hparams={**LEARNED_MASK_HPARAMS, **groupdro.HPARAMS},
    retired=RETIRED,
)
class ModGroupDRO(MRM):
    """Modular risk minimization with GroupDRO in all three stages."""

    objective_name = "GroupDRO"
