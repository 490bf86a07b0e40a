"""MRM, ModIRM, ModREx and ModGroupDRO: stages, masks and their gradients."""

from __future__ import annotations

import pytest
import torch
from modular_runs import MODULAR, STEPS, batch, make, train, weights_of

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.gates import (
    logistic_noise,
)
from domainbed_sfp.training import hparams

# MRM ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULAR)
def test_stages_of_modular_risk_minimization(name):
    """Weights move in stages 1 and 3 and gates in stage 2, whose last step prunes and rewinds."""
    algorithm = make(name, granularity="channel")
    start = weights_of(algorithm)
    for step in range(STEPS):
        before, gates = weights_of(algorithm), {k: v.detach().clone() for k, v in algorithm.gates.as_dict().items()}
        open_gates = algorithm.gates_are_open()
        assert open_gates == (8 <= step <= 12)
        train(algorithm, step + 1)
        moved = any(not torch.equal(value, before[key]) for key, value in weights_of(algorithm).items())
        learned = any(not torch.equal(value, gates[key]) for key, value in algorithm.gates.as_dict().items())
        assert learned == open_gates and moved == (not open_gates or step == 12)
        assert algorithm.at_final_compression() == (step >= 12)
        assert algorithm.sparsity() == pytest.approx(0.5 if step >= 12 else 0.0, abs=0.01)
        if step == 12:
            masks = algorithm.masks()
            for key, value in weights_of(algorithm).items():
                assert torch.equal(value, start[key] * masks.get(key, 1)), key
            assert not algorithm.optimizer.state


def test_rewinding_restores_what_belongs_to_the_beginning():
    """BatchNorm's statistics, the objective's annealing and its group weights begin anew."""
    irm, dro = make("ModIRM"), make("ModGroupDRO")
    train(irm, 12), train(dro, 12)
    assert int(irm.objective.update_count) == 12 and not torch.equal(dro.objective.q, torch.ones(2))
    train(irm, 13), train(dro, 13)
    assert int(irm.objective.update_count) == 0 and torch.equal(dro.objective.q, torch.ones(2))
    values = hparams.resolve_hparams(
        "MRM", "PACS", overrides={"backbone": "resnet18", "weights": "none", "granularity": "channel"}
    )
    algorithm = registry.get("MRM").cls((3, 32, 32), 2, 2, values)
    algorithm.total_steps = 4
    start = {name: value.clone() for name, value in algorithm.featurizer.named_buffers()}
    for step in range(3):
        algorithm.update(batch(step, 4, (3, 32, 32)))
        assert algorithm.at_final_compression() == (step == 2)
        same = [torch.equal(value, start[name]) for name, value in algorithm.featurizer.named_buffers()]
        assert all(same) == (step == 2)


def test_the_pull_of_alpha_on_the_logits():
    weight = make("MRM", mask_alpha=1e-3)
    total = sum(logits.numel() for logits in weight.gates.parameters())
    assert weight.logit_penalty().item() == pytest.approx(1e-3 * 1.5 * total, rel=1e-4)
    weight.logit_penalty().backward()
    assert all(torch.allclose(logits.grad, torch.tensor(1e-3)) for logits in weight.gates.parameters())
    channel = make("MRM", mask_alpha=1e-3, granularity="channel")
    channel.logit_penalty().backward()
    # conv1: 2 x 3 x 3 weights make a channel, 128 x 3 x 3 read it. conv4: 128 x 3 x 3 make one, the classifier's 2 read it.
    gates = channel.gates
    assert gates["featurizer.conv1"].grad[0].item() == pytest.approx(1e-3 * (18 + 1152))
    assert gates["featurizer.conv4"].grad[0].item() == pytest.approx(1e-3 * (1152 + 2))


def test_logits_get_the_gradient_of_the_masked_loss():
    """The mask stage's step is Adam's on d loss / d m * sigmoid'(logit + noise) + alpha."""
    algorithm = train(make("MRM", mask_alpha=1e-4), 8)
    data = batch(99)
    name = "featurizer.conv1.weight"
    torch.manual_seed(7)
    noises = {key: logistic_noise(logits) for key, logits in algorithm.gates.as_dict().items()}
    logits = {key: value.detach() for key, value in algorithm.gates.as_dict().items()}
    masks = {key: ((logits[key] + noise) > 0).float().requires_grad_() for key, noise in noises.items()}
    parameters = {key: value.detach() for key, value in algorithm.deployed_parameters().items()}
    with algorithm.drawn(masks, parameters):
        loss, _ = algorithm.objective.loss(algorithm, data)
    p = torch.sigmoid(logits[name] + noises[name])
    expected = torch.autograd.grad(loss, masks[name])[0] * p * (1 - p) + 1e-4
    torch.manual_seed(7)
    algorithm.update(data)
    assert torch.allclose(algorithm.gates[name].grad, expected, atol=1e-7, rtol=1e-3)
    # Adam's first step goes its learning rate's length against the sign.
    lr = algorithm.gate_learning_rate()
    moved = algorithm.gates[name].detach() - 1.5
    clear = expected.abs() > 1e-5
    assert torch.allclose(moved[clear], -lr * expected[clear].sign(), rtol=1e-2)


def test_short_mask_stages_take_longer_steps():
    assert make("MRM", 5001).gate_learning_rate() == pytest.approx(0.01, rel=1e-2)
    assert make("MRM", 50_001).gate_learning_rate() == 0.01
    assert make("MRM", 300).gate_learning_rate() == pytest.approx(0.01 * 1000 / 61)


def test_mask_rules_by_hand():
    for rule, expected in (("threshold", [True, False, True, True]), ("top_k", [True, False, False, True])):
        algorithm = make("MRM", mask_rule=rule, granularity="channel")
        with torch.no_grad():
            for logits in algorithm.gates.parameters():
                logits.fill_(-1.0)
                logits[0::4], logits[2::4], logits[3::4] = 0.9, 0.1, 0.8
        for keep in algorithm.choose_alive([], 0.5).values():
            assert keep.tolist() == expected * (len(keep) // 4)
        assert algorithm.deterministic_gates()["featurizer.conv1"][:4].tolist() == [True, False, True, True]


def test_the_papers_rule_finds_its_own_sparsity():
    algorithm = train(make("MRM", mask_rule="threshold", mask_alpha=5e-6), STEPS)
    alive = sum(int((logits > 0).sum()) for logits in algorithm.gates.parameters())
    total = sum(logits.numel() for logits in algorithm.gates.parameters())
    assert 0 < alive < total and algorithm.sparsity() == pytest.approx(1 - alive / total)
    algorithm = train(make("MRM", mask_rule="threshold"), 12)  # the mask is made behind this step
    with torch.no_grad():
        for logits in algorithm.gates.parameters():
            logits.fill_(30.0)
    with pytest.raises(UserError, match="threshold' removes nothing"):
        train(algorithm, STEPS)


@pytest.mark.parametrize("name", ["MRM", "SparseIRM", "DCWP"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_prediction_under_open_gates_is_fixed_and_exported(name, granularity):
    algorithm = make(name, granularity=granularity)
    train(algorithm, algorithm.schedule.last_step(STEPS))
    assert algorithm.gates_are_open()
    algorithm.eval()
    x = torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        logits = algorithm.predict(x)
        assert torch.equal(logits, algorithm.predict(x))
        assert torch.allclose(algorithm.export()(x), logits, atol=1e-6)
        assert not torch.allclose(algorithm.network(x), logits, atol=1e-3)
    assert algorithm.sparsity() == 0 and not algorithm.at_final_compression()
