"""Bases of the methods that learn by gradient descent which units live, and then keep one mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS, ScheduledPruning
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import NOT_NEGATIVE, Hparam, one_of
from domainbed_sfp.networks.recalibration import recalibrate_batchnorm
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.gates import gated_weights, logistic_noise, straight_through
from domainbed_sfp.pruning.schedules import OneShotSchedule
from domainbed_sfp.pruning.state import Gates

# The papers' learning rates of gates are meant for about this many steps; see `GatedPruning.gate_learning_rate`.
REFERENCE_STEPS = 1000

GATE_HPARAMS = {
    "sparsity": UNIT_HPARAMS["sparsity"],
    "granularity": Hparam(
        "weight", doc="weight, the method's own; channel: one gate per channel", valid=one_of("channel", "weight")
    ),
    "pruning_scope": UNIT_HPARAMS["pruning_scope"],
    "prune_residual_streams": UNIT_HPARAMS["prune_residual_streams"],
    "mask_rule": Hparam(
        "top_k",
        doc="top_k: the likeliest, at hparam sparsity; threshold: the method's own rule",
        valid=one_of("top_k", "threshold"),
    ),
}


class GatedPruning(ScheduledPruning):
    """Has a gate for every unit from `mask_start` on, which multiplies it, and prunes once, at `mask_end`, both
    fractions of the run.

    While gates are open, training draws random masks from them and prediction uses the fixed ones of
    `deterministic_gates`; masks and sparsity count as dense until the gates are settled. The step at `mask_end` is the
    last with gates: after it the mask is final and dead weights are zero.
    """

    initial_gate: float
    mask_start: float
    mask_end: float
    # Adam's learning rate for the gates, at 1,000 steps with masks.
    mask_lr: float
    schedule: OneShotSchedule

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if self.schedule.sparsity == 0 and self.hparams["mask_rule"] == "threshold":
            raise UserError("mask_rule 'threshold' finds its own sparsity: leave hparam 'sparsity' above 0")
        self.gates = Gates(self.unit_shapes, self.initial_gate)
        self.gate_optimizer = self.make_gate_optimizer()
        # The network of one training step, under the mask drawn for it; none between steps.
        self.drawn_network: _Gated | None = None

    def make_schedule(self) -> OneShotSchedule:
        return OneShotSchedule(self.hparams["sparsity"], self.mask_end)

    def make_gate_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.gates.parameters(), lr=self.mask_lr)

    def first_gate_step(self) -> int:
        """The first step with gates; the last one is `schedule.last_step`."""
        return min(round(self.mask_start * self.total_steps), self.schedule.last_step(self.total_steps))

    def gates_are_open(self) -> bool:
        """Whether the next step trains with gates, and prediction uses them."""
        return self.first_gate_step() <= self.step <= self.schedule.last_step(self.total_steps)

    def gate_learning_rate(self) -> float:
        """`mask_lr`, raised where the mask stage has fewer than 1,000 steps.

        Adam moves a gate by about its learning rate in a step: with the same rate, a stage of 60 steps would end before
        any gate has got from its initial value to where it decides something else.
        """
        steps = self.schedule.last_step(self.total_steps) - self.first_gate_step() + 1
        return self.mask_lr * max(1.0, REFERENCE_STEPS / steps)

    def deterministic_gates(self) -> dict[str, Tensor]:
        """The mask that prediction uses while gates are open: bool tensors by unit name."""
        raise TypeError(f"{type(self).__name__} does not define deterministic_gates()")

    @contextmanager
    def drawn(self, gates: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """While it lasts, the network runs with `parameters` (all, or those that differ) under `gates`."""
        self.drawn_network = self._gated(gates, parameters)
        try:
            yield
        finally:
            self.drawn_network = None

    def features(self, x: Tensor) -> Tensor:
        """Features [N, D] of images, under the gates if they are open: those of a closed channel are 0."""
        gated = self._network_in_use()
        features = _run(self.featurizer, "featurizer.", gated.weights, x)
        return features if gated.of_features is None else features * gated.of_features

    def classify(self, features: Tensor) -> Tensor:
        """Logits [N, num_classes] of features, under the gates if they are open."""
        return _run(self.classifier, "classifier.", self._network_in_use().weights, features)

    def predict(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def prepare_evaluation(self, batches: Iterable[Tensor]) -> None:
        if self.step > self.first_gate_step():
            recalibrate_batchnorm(self.network, self.predict, batches)

    def export(self) -> nn.Module:
        network, gates = super().export(), self._fixed_gates()
        weights = gated_weights(gates, self.groups, self.deployed_parameters()) if gates else {}
        with torch.no_grad():
            for name, weight in weights.items():
                part, rest = name.split(".", 1)
                # `network` is the featurizer, then the classifier.
                network.get_parameter(f"{int(part == 'classifier')}.{rest}").copy_(weight)
        return network

    def _fixed_gates(self) -> dict[str, Tensor]:
        """The gates of prediction; none where they are not open."""
        return (
            {name: gate.float() for name, gate in self.deterministic_gates().items()} if self.gates_are_open() else {}
        )

    def _network_in_use(self) -> _Gated:
        return self.drawn_network or self._gated(self._fixed_gates(), {})

    def _gated(self, gates: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> _Gated:
        """The network with the parameters `given` in place of its own, under `gates`. The channels that the classifier
        reads are gated where they leave the featurizer, so that a loss on features sees their gates too."""
        if not gates:
            return _Gated(dict(given), None)
        parameters = {**self.deployed_parameters(), **given}
        weights = {**given, **gated_weights(gates, self.groups, parameters)}
        read = {name for group in self.groups for name in group.readers if name.startswith("classifier.")}
        of_features = None
        for name in read:  # the classifier's first layer, if any
            groups = [replace(group, readers=(name,)) for group in self.groups if name in group.readers]
            of_features = gated_weights(gates, groups, {name: torch.ones_like(parameters[name][:1])})[name]
            weights[name] = parameters[name]
        return _Gated(weights, of_features)


@dataclass(frozen=True)
class _Gated:
    """Parameters that differ from the network's own, by name, and what multiplies the features, [1, D]."""

    weights: dict[str, Tensor]
    of_features: Tensor | None


def _run(part: nn.Module, prefix: str, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return functional_call(part, own, (x,)) if own else part(x)


# What earlier records name: the one value that it has now.
LEARNED_MASK_RETIRED = {"mask_density": "free", "mask_lr": 1e-2}

LEARNED_MASK_HPARAMS = {
    **GATE_HPARAMS,
    "mask_alpha": Hparam(
        1e-8,
        lambda r: 10 ** r.uniform(-9, -5.3),
        "weight of the sum of logits; each counts the weights behind it",
        valid=NOT_NEGATIVE,
    ),
}


class LearnedMaskPruning(GatedPruning):
    """Trains weights, then one logit per unit with the weights frozen, then the weights that the logits keep.

    In the mask stage each step draws a straight-through binary-concrete mask (see `pruning.gates`) and minimises the
    loss of the masked network plus alpha * sum(logits). Logits begin at 1.5. A mask keeps what has a positive logit
    (`mask_rule` threshold, the papers' rule, by which the sparsity is what it is) or the largest logits at hparam
    `sparsity` (`top_k`, for comparisons at equal sparsity), layer by layer unless `pruning_scope` says otherwise; the
    papers' rule is one threshold for all layers. Subclasses say what happens before retraining. A unit lives with
    probability sigmoid(logit), as in Csordas et al.'s code (see `pruning.gates`); in DCWP's it is the sigmoid of that,
    which no logit can bring below a half or above .73.

    As published, how dense the masks of the stage are is what the logits make of it: in runs of a few hundred steps far
    denser than the mask that `top_k` keeps.

    The pull of alpha on a logit is the same in every network, but the loss's gradient is spread over all the weights:
    the useful alpha falls with their number, which is why it is searched over several orders of magnitude. For channels
    (this project's extension: one logit per channel) a logit counts as many times as weights go with it, so that the
    same range serves.
    """

    initial_gate = 1.5
    mask_lr = 1e-2

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        shapes = {name: value.shape for name, value in self.named_parameters()}
        self.weights_per_unit = {
            group.name: sum(shapes[name].numel() for name in (*group.filters, *group.readers)) // group.channels
            for group in self.groups
        }

    def begin_retraining(self) -> None:
        """Called when the mask is final, before dead weights are zeroed."""

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if not self.gates_are_open():
            return super().update(minibatches, unlabeled)
        metrics = self._learn_gates(minibatches)
        if self.mask_is_due():
            self.renew_masks(minibatches)
            self.begin_retraining()
            self.apply_masks()
        self.step += 1
        return metrics

    def deterministic_gates(self) -> dict[str, Tensor]:
        return {name: logits > 0 for name, logits in self.gates.as_dict().items()}

    def score(self, minibatches: Minibatches) -> scores.Scores:
        return {name: logits.detach() for name, logits in self.gates.as_dict().items()}

    def choose_alive(self, minibatches: Minibatches, sparsity: float) -> dict[str, Tensor]:
        if self.hparams["mask_rule"] == "top_k":
            return super().choose_alive(minibatches, sparsity)
        alive = self.deterministic_gates()
        if all(keep.all() for keep in alive.values()):
            raise UserError(
                "mask_rule 'threshold' removes nothing: no mask logit fell to 0; raise hparam 'mask_alpha', train for "
                "more steps, or choose 'top_k'"
            )
        return alive

    def logit_penalty(self) -> Tensor:
        """alpha * sum of all logits, each as often as it has weights."""
        sums = [logits.sum() * self.weights_per_unit.get(name, 1) for name, logits in self.gates.as_dict().items()]
        return self.hparams["mask_alpha"] * torch.stack(sums).sum()

    def _learn_gates(self, minibatches: Minibatches) -> dict[str, float]:
        gates = self.gates.as_dict()
        masks = {name: straight_through(logits, logistic_noise(logits)) for name, logits in gates.items()}
        frozen = {name: value.detach() for name, value in self.deployed_parameters().items()}
        with self.drawn(masks, frozen):
            loss, metrics = self.compute_loss(minibatches)
        if self.objective.wants_fresh_optimizer():
            self.gate_optimizer = self.make_gate_optimizer()
        for group in self.gate_optimizer.param_groups:
            group["lr"] = self.gate_learning_rate()
        penalty = self.logit_penalty()
        self.gate_optimizer.zero_grad()
        (loss + penalty).backward()
        self.gate_optimizer.step()
        self.objective.finish_step()
        positive = sum(int((logits > 0).sum()) for logits in gates.values())
        units = sum(shape.numel() for shape in self.unit_shapes.values())
        return {**metrics, "mask_penalty": penalty.item(), "mask_density": positive / units}
