"""DCWP: its losses by hand, and what it retrains."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from modular_runs import STEPS, batch, make, train, weights_of

from domainbed_sfp.algorithms.pruning.dcwp import debiased_contrastive, generalized_cross_entropy

# DCWP -----------------------------------------------------------------------------------------------------------------


def test_gce_weighs_the_cross_entropys_gradient_by_p_to_the_q():
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, 4)).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    p = F.softmax(logits, 1).gather(1, y[:, None]).squeeze(1).detach()
    loss = generalized_cross_entropy(logits, y, 0.7)
    assert loss.item() == pytest.approx(((1 - p**0.7) / 0.7).mean().item(), rel=1e-5)
    found = torch.autograd.grad(loss, logits)[0]
    expected = torch.autograd.grad((p**0.7 * F.cross_entropy(logits, y, reduction="none")).mean(), logits)[0]
    assert torch.allclose(found, expected, atol=1e-7)
    extreme = torch.tensor([[0.0, 500.0]], requires_grad=True)  # p underflows to 0
    generalized_cross_entropy(extreme, torch.tensor([0]), 0.7).backward()
    assert torch.isfinite(extreme.grad).all()


def test_debiased_contrastive_loss_by_hand():
    """Four unit vectors in the plane; sample 1 (class 0) and sample 3 (class 1) are bias-conflicting. Anchor 0 has the
    positive 1, anchor 2 has 3; anchors 1 and 3 have none, since their only classmates are aligned."""
    angles = torch.tensor([0.0, 0.4, 1.5, 2.2])
    z = torch.stack([angles.cos(), angles.sin()], 1)
    y, conflicting = torch.tensor([0, 0, 1, 1]), torch.tensor([False, True, False, True])
    weights = torch.tensor([1.0, 80.0, 3.0, 80.0])

    def term(anchor: int, positive: int) -> float:
        similar = {other: math.cos(angles[anchor] - angles[other]) / 0.5 for other in range(4) if other != anchor}
        return -(similar[positive] - math.log(sum(map(math.exp, similar.values()))))

    expected = (1 * term(0, 1) + 3 * term(2, 3)) / 4
    assert debiased_contrastive(z, y, conflicting, weights, 0.5).item() == pytest.approx(expected, rel=1e-5)
    everyone = torch.ones(4, dtype=torch.bool)
    mean = (term(0, 1) + term(1, 0) + term(2, 3) + term(3, 2)) / 4
    assert debiased_contrastive(z, y, everyone, torch.ones(4), 0.5).item() == pytest.approx(mean, rel=1e-5)
    assert debiased_contrastive(z, y, ~everyone, weights, 0.5).item() == 0
    assert debiased_contrastive(z[:1], y[:1], everyone[:1], weights[:1], 0.5).item() == 0


def test_dcwp_weighs_what_the_biased_model_gets_wrong():
    algorithm = train(make("DCWP", contrastive_weight=0.0), 9)
    assert algorithm.gates_are_open()
    biased = {name: value.clone() for name, value in algorithm.biased.state_dict().items()}
    data = batch(50)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    algorithm.biased.eval()
    wrong = algorithm.biased(x).argmax(1) != y
    assert wrong.any() and not wrong.all()
    ones = {name: torch.ones_like(gate) for name, gate in algorithm.gates.as_dict().items()}
    with algorithm.drawn(ones, algorithm.deployed_parameters()):
        loss, metrics = algorithm.compute_loss(data)
        losses = F.cross_entropy(algorithm.network(x), y, reduction="none")
    weights = torch.where(wrong, 80.0, 1.0)
    assert loss.item() == pytest.approx(((weights * losses).sum() / weights.sum()).item(), rel=1e-4)
    assert metrics["conflicting"] == pytest.approx(wrong.float().mean().item())
    train(algorithm, STEPS)
    for name, value in algorithm.biased.state_dict().items():
        assert torch.equal(value, biased[name])


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_dcwps_contrastive_loss_sees_every_mask(granularity):
    """Also that of the channels which the classifier reads: what a closed gate leaves of a feature is 0."""
    algorithm = train(make("DCWP", granularity=granularity, backbone="mnist_cnn_bn"), 10)
    assert algorithm.gates_are_open()
    gates = {name: torch.ones_like(gate).requires_grad_() for name, gate in algorithm.gates.as_dict().items()}
    x = torch.cat([x for x, _ in batch(3)])
    with algorithm.drawn(gates, {}):
        features = algorithm.features(x)
        y, conflicting = torch.arange(len(x)) % 2, torch.arange(len(x)) % 3 == 0
        loss = debiased_contrastive(F.normalize(features, dim=1), y, conflicting, torch.ones(len(x)), 0.1)
    for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values()), allow_unused=True)):
        assert gradient is not None and gradient.abs().max() > 0, name
    if granularity == "channel":
        last = algorithm.groups[-1]
        closed = {name: torch.ones_like(gate) for name, gate in gates.items()}
        closed[last.name][::2] = 0
        with torch.no_grad(), algorithm.drawn(closed, {}):
            half = algorithm.features(x)
            # The classifier's columns are not gated once more.
            assert torch.equal(algorithm.classify(half), algorithm.classifier(half))
        dead = (1 - closed[last.name]).repeat_interleave(half.shape[1] // last.channels).bool()
        assert half[:, dead].abs().max() == 0 and torch.equal(half[:, ~dead], features.detach()[:, ~dead])


@pytest.mark.parametrize("objective", ["IRM", "VREx", "GroupDRO", "CORAL", "Mixup"])
def test_any_objective_trains_mrms_masks(objective):
    """The gates' gradient is that of the objective, not of alpha alone; IRM's is ModIRM's."""
    algorithm = train(make("MRM", objective=objective, granularity="channel", mask_alpha=0.0), 9)
    assert algorithm.gates_are_open()
    torch.manual_seed(5)
    algorithm.update(batch(9))
    for name, gate in algorithm.gates.as_dict().items():
        assert gate.grad.abs().max() > 0, name
    if objective == "IRM":
        named = train(make("ModIRM", granularity="channel", mask_alpha=0.0), 9)
        torch.manual_seed(5)
        named.update(batch(9))
        assert all(torch.equal(named.gates[name].grad, gate.grad) for name, gate in algorithm.gates.as_dict().items())


def test_dcwp_retrains_from_where_it_was():
    algorithm = make("DCWP")
    boundary = algorithm.schedule.last_step(STEPS)
    assert algorithm.first_gate_step() == 9 and boundary == 18
    train(algorithm, 9)
    trained = weights_of(algorithm)
    train(algorithm, boundary + 1)
    masks = algorithm.masks()
    for name, value in weights_of(algorithm).items():
        assert torch.equal(value, trained[name] * masks.get(name, 1)), name
    assert algorithm.at_final_compression() and not algorithm.optimizer.state
