"""Bases of the algorithms that quantize while they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches, ObjectiveAlgorithm
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import NOT_NEGATIVE, POSITIVE, PROBABILITY, Hparam, Range
from domainbed_sfp.networks.recalibration import recalibrate_batchnorm
from domainbed_sfp.pruning.costs import count_positions, rows_of_an_image
from domainbed_sfp.quantization.bitops import BitOps, fit_shifts, starting_mean
from domainbed_sfp.quantization.deployment import deploy
from domainbed_sfp.quantization.layers import (
    MOST_PROBABLE,
    SAMPLED,
    SETTLED,
    WIDEST_ONLY,
    Control,
    Trace,
    make_policy,
    mean_bits,
    quantize_layers,
)
from domainbed_sfp.quantization.policy import WIDTHS, Policy, reinforce
from domainbed_sfp.quantization.quantizers import WIDEST, StepSizes

UP_TO_ALL = Range("a fraction in (0, 1]", lambda value: 0 < value <= 1)

QUANTIZATION_HPARAMS = {
    "objective": Hparam("ERM", doc="training objective: ERM, IRM, VREx, GroupDRO, CORAL or Mixup"),
    "degrade": Hparam(0.5, doc="probability with which a training sample is degraded", valid=PROBABILITY),
    "degraded_evaluation": Hparam(True, doc="evaluate the finished model on degraded copies of the test environments"),
}

POLICY_HPARAMS = {
    **QUANTIZATION_HPARAMS,
    "target_bitops": Hparam(
        0.25,
        lambda r: r.choice([0.15, 0.25, 0.4]),
        "budget: fraction of the 8-bit network's BitOPs",
        valid=UP_TO_ALL,
    ),
    "budget_weight": Hparam(
        1.0, lambda r: 10 ** r.uniform(-1, 1), "beta, the weight of relu(BitOPs / budget - 1)", valid=NOT_NEGATIVE
    ),
    "policy_lr": Hparam(
        1e-2, lambda r: 10 ** r.uniform(-3, -1.5), "Adam's learning rate for the policy", valid=POSITIVE
    ),
    "reinforce": Hparam(
        0.0,
        doc="the paper's policy optimization: weight of a REINFORCE term; 0: the straight-through gradient alone",
        valid=NOT_NEGATIVE,
    ),
}

# Fractions of the run: until when all have 8 bits, and from when widths are settled and the network trains as it is
# evaluated. Half of the run is for that: a network of many layers has to meet the one assignment that it will have.
POLICY_START, POLICY_END = 0.1, 0.5
# Sigma of the policies at first, in bits: draws reach the neighbouring widths and hardly further.
POLICY_SIGMA = 0.5
# What earlier records name: the one value that it has now.
POLICY_RETIRED = {"policy_start": POLICY_START, "policy_end": POLICY_END, "policy_sigma": POLICY_SIGMA}

# Batches of training images from which the widths of evaluation are calibrated.
CALIBRATION_BATCHES = 4
# Where nobody calls prepare_evaluation (DomainBed's own loop), they are fitted to training batches, this often in a
# run.
FITS = 50


class QuantizedAlgorithm(ObjectiveAlgorithm):
    """Trains a network whose weights and inputs are quantized in every convolution and linear layer.

    The first layer and the classifier have 8 bits, as is usual (LSQ does so too). BatchNorm's statistics are shared by
    all widths, and taken afresh from training images before an evaluation. Quantized layers compute in full precision.
    """

    full_precision = True

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.control = Control()
        self.step = 0
        positions = count_positions(self, self.input_shape, self.network)
        weights = dict(self.named_parameters())
        macs = {name.removesuffix(".weight"): weights[name].numel() * used for name, used in positions.items()}
        self.macs = macs
        self.layers = self.quantize(list(macs))
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = self.make_optimizer()
        chosen = {name: macs[name] for name, layer in self.layers.items() if layer.policy is not None}
        pinned = sum(macs[name] * layer.widths[0] ** 2 for name, layer in self.layers.items() if name not in chosen)
        self.bitops = BitOps(pinned, chosen, sum(macs.values()))
        # Sums over what `predict` has seen in evaluation mode: samples, mean bits, BitOPs.
        self.seen = [0.0, 0.0, 0.0]

    def quantize(self, names: Sequence[str]) -> dict[str, Any]:
        """Puts quantized layers into featurizer and classifier, in the place of `names`; returns them by name."""
        raise TypeError(f"{type(self).__name__} does not define quantize(names)")

    def evaluation_mode(self) -> str:
        """How layers with a policy choose, when predicting."""
        return MOST_PROBABLE

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam; step sizes and policies have no weight decay, and policies learning rates of their own.

        Adam moves every weight by about its rate, and a unit that reads F inputs by up to F times as much. The weights
        of a policy therefore have `policy_lr` over the number of their inputs (as in muP; Yang et al. 2022, arXiv
        2203.03466), so that it says how fast mu moves, in bits a step, in wide layers as in narrow ones.
        """
        rates: dict[int, tuple[float, float]] = {}
        for module in self.network.modules():
            if isinstance(module, StepSizes):
                rates.update({id(parameter): (self.hparams["lr"], 0.0) for parameter in module.parameters()})
            elif isinstance(module, Policy):
                for parameter in module.parameters():
                    inputs = parameter.shape[1] if parameter.dim() == 2 else 1
                    rates[id(parameter)] = (self.hparams["policy_lr"] / inputs, 0.0)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.network.parameters():
            key = rates.get(id(parameter), (self.hparams["lr"], self.hparams["weight_decay"]))
            groups.setdefault(key, []).append(parameter)
        return torch.optim.Adam(
            [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]
        )

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        metrics = super().update(minibatches, unlabeled)
        for layer in self.layers.values():
            layer.weight_steps.keep_positive()
            layer.input_steps.keep_positive()
        self.step += 1
        return metrics

    def predict(self, x: Tensor) -> Tensor:
        if self.control.trace is not None:  # within a training step
            return self.network(x)
        with self.control.traced(self.evaluation_mode()) as trace:
            logits = self.network(x)
        if not self.training:
            bits, bitops = self._taken(trace, len(x))
            self.seen = [self.seen[0] + len(x), self.seen[1] + bits * len(x), self.seen[2] + bitops * len(x)]
        return logits

    def prepare_evaluation(self, batches: Iterable[Tensor]) -> None:
        with self.control.traced(self.evaluation_mode()):
            recalibrate_batchnorm(self.network, self.network, batches)

    def measurements(self) -> dict[str, float]:
        samples, bits, bitops = self.seen
        self.seen = [0.0, 0.0, 0.0]
        return {"mean_bits": bits / samples, "bitops": bitops / samples} if samples else {}

    def costs(self) -> dict[str, float]:
        bits, bitops = self._taken({}, 0)
        return {"bitops": bitops, "bitops_8bit": float(self.bitops.at_8_bits), "mean_bits": bits}

    def export(self) -> nn.Module:
        self.control.mode = self.evaluation_mode()
        return deploy(self.network, self.control)

    def get_extra_state(self) -> dict[str, Any]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def _taken(self, trace: Trace, samples: int) -> tuple[float, float]:
        """Mean bit-width of the layers between the first and the last, and BitOPs, averaged over the samples."""
        if trace:
            policy = next(layer.policy for layer in self.layers.values() if layer.policy is not None)
            bits, bitops = mean_bits(trace, policy.bits), self.bitops.chosen(trace, policy.bits)
            return float(bits.double().mean()), float(bitops.mean())
        inner = list(self.layers.values())[1:-1]
        # Without choices every layer is at its widest.
        bits_alike = sum(layer.widths[-1] for layer in inner) / len(inner)
        return bits_alike, float(sum(self.macs[name] * layer.widths[-1] ** 2 for name, layer in self.layers.items()))


class PolicyQuantization(QuantizedAlgorithm):
    """Learns with the network which width each layer takes, under a budget of bit operations.

    8 bits everywhere for the first tenth of the run; then every layer but the first and the last draws a width
    for each sample from its policy, until half of it. From then on policies rest, and each layer takes the width that
    evaluation would give it: a network of many layers that has met only draws is not trained for any one assignment,
    and a draw of few bits in some of fifty layers spoils all it computes.

    While policies learn, the loss is the objective + beta * relu(BitOPs / budget - 1), in which BitOPs are the
    *expected* ones, known in closed form from the probabilities: no sampling, no variance. The objective reaches the
    policy through the straight-through gradient of what was drawn (`policy.straight_through`).

    `reinforce` adds the score-function gradient of the reward -(cross-entropy + beta * cost), sample by sample with the
    others' mean as baseline. It is off by default: one number for all layers' draws together is far noisier than the
    straight-through gradient, which knows each layer's error.

    The likeliest widths, which evaluation takes, need not cost what the draws cost. Before an evaluation mu is
    therefore shifted (`bitops.fit_shifts`) so that they meet the budget on training images. The widths found in use
    there are the only ones evaluation may choose, and the only ones that are exported. Draws do not see shifts; settled
    widths have their own, fitted to training batches, so that evaluating changes nothing about training.
    """

    reads_input: bool

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if self.hparams["reinforce"] and self.hparams["objective"] != "ERM":
            raise UserError(
                f"hparam 'reinforce' rewards each sample by its cross-entropy, which objective "
                f"{self.hparams['objective']!r} does not minimise; set objective to ERM or reinforce to 0"
            )
        # REINFORCE holds a sample's reward against the others', which must not have drawn with it.
        self.control.independent = bool(self.hparams["reinforce"])
        self.bitops.check_budget(self.hparams["target_bitops"], alike=not self.reads_input)
        self.budget = self.hparams["target_bitops"] * self.bitops.at_8_bits
        for policy in self.policies().values():
            policy.begin(starting_mean(self.bitops, self.budget, POLICY_SIGMA), POLICY_SIGMA)
        # What the widths of evaluation take on training images: mean bits and BitOPs.
        self.calibrated = self._taken({}, 0)

    def quantize(self, names: Sequence[str]) -> dict[str, Any]:
        for name, rows in rows_of_an_image(self.network, self.input_shape).items():
            if rows != 1:
                raise UserError(
                    f"{type(self).__name__} chooses widths for images, and layer {name} of this network reads each in "
                    f"{rows} windows; choose another backbone, or UniformQuant"
                )

        return quantize_layers(self, names, self.control, lambda layer: make_policy(layer, self.reads_input), WIDEST)

    def policies(self) -> dict[str, Policy]:
        """The policies by the names of their layers."""
        return {name: layer.policy for name, layer in self.layers.items() if layer.policy is not None}

    def deployed_parameters(self) -> dict[str, Tensor]:
        """Without the policies of a constant input: their one decision is in the weights."""
        deployed = super().deployed_parameters()
        return {name: value for name, value in deployed.items() if self.reads_input or ".policy." not in name}

    def first_policy_step(self) -> int:
        return min(round(POLICY_START * self.total_steps), self.total_steps - 1)

    def first_settled_step(self) -> int:
        """The first step of settled widths; at least one draws before it."""
        return max(round(POLICY_END * self.total_steps), self.first_policy_step() + 1)

    def evaluation_mode(self) -> str:
        return MOST_PROBABLE if self.at_final_compression() else WIDEST_ONLY

    def at_final_compression(self) -> bool:
        return self.step > self.final_step()

    def final_step(self) -> int:
        return self.first_policy_step()

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        first = self.first_policy_step()
        if self.step < first:
            with self.control.traced(WIDEST_ONLY):
                return super().compute_loss(minibatches)
        if self.step == first:
            for name in self.policies():
                self.layers[name].start_widths()
        settled = self.step >= self.first_settled_step()
        logits: list[Tensor] = []
        listener = self.network.register_forward_hook(lambda module, inputs, output: logits.append(output))
        try:
            with self.control.traced(SETTLED if settled else SAMPLED) as trace:
                loss, metrics = super().compute_loss(minibatches)
        finally:
            listener.remove()
        bits = next(iter(self.policies().values())).bits
        chosen = self.bitops.chosen(trace, bits).float()
        expected = (chosen if settled else self.bitops.expected(trace, bits)).mean()
        cost = F.relu(expected / self.budget - 1)
        metrics["expected_bitops"] = expected.item() / self.bitops.at_8_bits
        metrics["drawn_bits"] = mean_bits(trace, bits).mean().item()
        metrics["budget_excess"] = cost.item()
        if not settled:
            loss = loss + self.hparams["budget_weight"] * cost
        if self.hparams["reinforce"] and not settled:
            y = torch.cat([y for _, y in minibatches])
            excess = F.relu(chosen / self.budget - 1)
            reward = -F.cross_entropy(logits[0], y, reduction="none") - self.hparams["budget_weight"] * excess
            log_probability = torch.stack(
                [c.log_probabilities.gather(1, c.index[:, None])[:, 0] for cs in trace.values() for c in cs]
            ).sum(0)
            loss = loss + self.hparams["reinforce"] * reinforce(log_probability, reward)
        every = max(1, (self.total_steps - first) // FITS)
        ends = (self.first_settled_step() - 1, self.total_steps - 1)
        if (self.step - first) % every == 0 or self.step in ends:
            self._fit(trace)
            self._keep_shifts()
        return loss, metrics

    @torch.no_grad()
    def prepare_evaluation(self, batches: Iterable[Tensor]) -> None:
        batches = iter(batches)
        if self.evaluation_mode() == WIDEST_ONLY:
            super().prepare_evaluation(batches)
            return
        kept = list(islice(batches, CALIBRATION_BATCHES))
        self._fit(self._traced(kept))
        super().prepare_evaluation(chain(kept, batches))
        # Again with the statistics of evaluation, which change what the policies read; and what a layer decides changes
        # what those behind it read.
        self.eval()
        for _ in range(3):
            self._fit(self._traced(kept))
        trace = self._traced(kept)
        for name, policy in self.policies().items():
            used = torch.cat([choice.index for choice in trace[name]]).bincount(minlength=len(WIDTHS))
            policy.allowed.copy_(used > 0)
        self.calibrated = self._taken(trace, 0)
        self.train()

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "calibrated": list(self.calibrated), "shifts": dict(self.control.shifts)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.calibrated = tuple(state["calibrated"])
        self.control.shifts = dict(state["shifts"])

    def costs(self) -> dict[str, float]:
        bits, bitops = self.calibrated if self.at_final_compression() else self._taken({}, 0)
        return {"bitops": bitops, "bitops_8bit": float(self.bitops.at_8_bits), "mean_bits": bits}

    def _keep_shifts(self) -> None:
        self.control.shifts = {name: float(policy.shift) for name, policy in self.policies().items()}

    def _traced(self, batches: Iterable[Tensor]) -> Trace:
        with self.control.traced(MOST_PROBABLE) as trace:
            for batch in batches:
                self.network(batch)
        return trace

    @torch.no_grad()
    def _fit(self, trace: Trace) -> None:
        """Sets the shifts so that the nearest widths meet the budget on the samples of `trace`."""
        policies = self.policies()
        means = torch.stack([torch.cat([choice.mean for choice in trace[name]]) for name in policies], dim=1)
        macs = [self.bitops.macs[name] for name in policies]
        for policy, shift in zip(policies.values(), fit_shifts(means, macs, self.budget - self.bitops.pinned)):
            policy.shift.fill_(float(shift))
            policy.allowed.fill_(True)
        nearest = {name: [policies[name].nearest(c) for c in choices] for name, choices in trace.items()}
        self.calibrated = self._taken(nearest, 0)
