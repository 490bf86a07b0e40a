"""SparseIRM (Zhou, Lin, Zhang, Zhang 2022, "Sparse Invariant Risk Minimization", ICML 2022, PMLR 162)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.gated import GATE_HPARAMS, GatedPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.hparam import Hparam, one_of
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.gates import binary_concrete, log_odds, logistic_noise, projection_shift
from domainbed_sfp.pruning.schedules import CubicSchedule
from domainbed_sfp.pruning.state import NamedTensors

# Fractions of the run, as in the authors' code: until when the network is dense, and when the budget of scores has
# reached its final size. The mask is drawn at the end there; here a tenth of the run trains on under it.
MASK_START, RAMP_END, MASK_END = 0.28, 0.6, 0.9
# Adam's learning rate for the scores, as in the authors' code.
MASK_LR = 6e-3


@register(
    "SparseIRM",
    family="pruning",
    reference="Zhou et al. 2022 (ICML), PMLR 162:27222-27244",
    hparams={
        **GATE_HPARAMS,
        "pruning_scope": Hparam(
            "global",
            doc="global: one budget for all layers, the paper's; layer: one for each",
            valid=one_of("layer", "global"),
        ),
        "objective": Hparam("IRM", doc="IRM (IRMv1) or VREx, whose penalty it minimises", valid=one_of("IRM", "VREx")),
    },
    retired={"mask_lr": MASK_LR, "mask_start": MASK_START, "ramp_end": RAMP_END, "mask_end": MASK_END},
)
class SparseIRM(GatedPruning):
    """Weights and the probabilities s of a sparse random mask, trained together under an invariance penalty.

    Algorithm 1: dense until `mask_start`. Then each step draws m = sigmoid(T (logit s + logistic noise)), takes the
    gradient of the penalised risk of the network m * w with respect to w and s, and projects s onto {0 <= s <= 1,
    sum s <= keep * n}. keep falls from 1 to 1 - sparsity on a cubic ramp until .6 K; T = 1 / (.97 (1 - p) + .03)
    rises from 1 to 33 with p, the progress of the run until the mask is drawn.

    The network that is tested has one draw of the mask, m = 1[logit s + noise > 0], which is Bernoulli(s). Its noise is
    drawn once, at the beginning, so that prediction is a function of the weights and scores at any time. At `mask_end`
    the draw becomes the mask of the run: dead weights are zeroed and the rest is trained on under it. `mask_rule`
    threshold is that draw as it is; `top_k` moves its threshold from 0 to where exactly keep * n units live: the
    units whose score and noise add up to most.
    """

    initial_gate = 1.0
    mask_start, mask_end, mask_lr = MASK_START, MASK_END, MASK_LR
    spares_best = True

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.budget = CubicSchedule(self.hparams["sparsity"], MASK_START, RAMP_END)
        self.noise = NamedTensors({name: logistic_noise(score) for name, score in self.gates.as_dict().items()})

    def sharpness(self) -> float:
        """T at this step."""
        progress = min(1.0, self.step / max(1, self.schedule.last_step(self.total_steps)))
        return 1 / (0.97 * (1 - progress) + 0.03)

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        if not self.gates_are_open():
            return super().compute_loss(minibatches)
        self.gate_optimizer.zero_grad()
        sharpness = self.sharpness()
        masks = {
            name: binary_concrete(log_odds(score), logistic_noise(score), sharpness)
            for name, score in self.gates.as_dict().items()
        }
        with self.drawn(masks, self.deployed_parameters()):
            return super().compute_loss(minibatches)

    def after_backward(self) -> None:
        # Where the penalty jumps the scores' Adam begins anew, as that of the weights does.
        if self.objective.wants_fresh_optimizer():
            self.gate_optimizer = self.make_gate_optimizer()

    def before_masks(self) -> None:
        if not self.gates_are_open():
            return
        for group in self.gate_optimizer.param_groups:
            group["lr"] = self.gate_learning_rate()
        self.gate_optimizer.step()
        self._project()

    def deterministic_gates(self) -> dict[str, Tensor]:
        return {name: odds > 0 for name, odds in self._drawn_odds().items()}

    def score(self, minibatches: Minibatches) -> scores.Scores:
        return self._drawn_odds()

    def choose_alive(self, minibatches: Minibatches, sparsity: float) -> dict[str, Tensor]:
        if self.hparams["mask_rule"] == "threshold":
            return self.deterministic_gates()
        return super().choose_alive(minibatches, sparsity)

    @torch.no_grad()
    def _drawn_odds(self) -> dict[str, Tensor]:
        return {name: log_odds(score) + self.noise[name] for name, score in self.gates.as_dict().items()}

    @torch.no_grad()
    def _project(self) -> None:
        keep = 1 - self.budget.at(self.step, self.total_steps)
        values = list(self.gates.as_dict().values())
        shared = [values] if self.hparams["pruning_scope"] == "global" else [[value] for value in values]
        for budgeted in shared:
            together = torch.cat([value.flatten() for value in budgeted])
            shift = projection_shift(together, keep * together.numel())
            for value in budgeted:
                value.sub_(shift).clamp_(0, 1)
