"""Quantized layers, bit operations, budgets, and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from quantized_runs import make, run_lsq
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.plugins import contract
from domainbed_sfp.quantization.bitops import BitOps, fit_shifts, starting_mean
from domainbed_sfp.quantization.layers import Control, QuantizedLayer, run_by_width
from domainbed_sfp.quantization.policy import (
    WIDTHS,
    Policy,
    log_probabilities,
)
from domainbed_sfp.quantization.quantizers import integer_range, to_integers
from domainbed_sfp.training import hparams

# Layers -------------------------------------------------------------------------------------------------------------


def test_samples_go_through_the_layer_with_their_own_width():
    """Grouped by width, the outputs are those of each sample alone, in the batch's order."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = QuantizedLayer(conv, "conv", Control(), policy=Policy(3))
    nn.init.normal_(layer.policy.output.weight)
    x = torch.randn(12, 3, 6, 6) + 3 * torch.randn(12, 3, 1, 1)
    layer.train()
    layer(x)
    layer.eval()
    layer.policy.start.fill_(4.5)
    with layer.control.traced() as trace:
        together = layer(x)
    index = trace["conv"][0].index
    assert len(index.unique()) > 2
    for sample in range(12):
        at = int(index[sample])
        below, top = integer_range(WIDTHS[at], True)
        step, input_step = layer.weight_steps.steps()[at], layer.input_steps.steps()[at]
        weight = (conv.weight / step).clamp(-below, top).round() * step
        value = (x[sample] / input_step).clamp(-below, top).round() * input_step
        assert torch.allclose(together[sample], F.conv2d(value, weight, conv.bias, padding=1), atol=1e-5)


def test_grouping_computes_each_sample_once():
    seen = []

    def run(group, weight):
        seen.append(len(group))
        return group * weight

    index = torch.tensor([2, 0, 2, 5, 0, 2])
    x = torch.arange(6.0)[:, None]
    out = run_by_width(index, x, 6, lambda used: used.float()[:, None, None], run)
    assert out[:, 0].tolist() == [0.0, 0.0, 4.0, 15.0, 0.0, 10.0]
    assert sorted(seen) == [1, 2, 3]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_activation_may_work_in_place_behind_groups(size, memory_format):
    """As squeeze-and-excitation does, whose maps have one position: output and gradients are those sample by sample."""
    torch.manual_seed(0)
    weights = torch.randn(2, 4, 3, 1, 1)
    x = torch.randn(4, 3, size, size).to(memory_format=memory_format).requires_grad_()
    index = torch.tensor([1, 0, 1, 1])
    out = F.relu(run_by_width(index, x, 2, lambda used: weights[used], F.conv2d), inplace=True)
    alone = x.detach().clone().requires_grad_()
    expected = torch.cat([F.conv2d(alone[i : i + 1], weights[int(at)]) for i, at in enumerate(index)]).relu()
    assert torch.allclose(out, expected, atol=1e-6)
    g = torch.randn_like(expected)
    (out * g).sum().backward()
    (expected * g).sum().backward()
    assert torch.allclose(x.grad, alone.grad, atol=1e-6)


def test_the_choice_receives_the_error_of_input_and_weights():
    """dL/dcoefficient of one linear layer: <g, W dx> for each sample plus the mean over its group of <g, dW x>."""
    torch.manual_seed(0)
    layer = QuantizedLayer(nn.Linear(5, 2, bias=False), "fc", Control(), policy=Policy(5))
    x = torch.randn(4, 5)
    layer.input_steps.initialise(x)
    index = torch.tensor([1, 0, 1, 1])
    coefficient = torch.ones(4, requires_grad=True)
    choice = type("C", (), {"index": index, "coefficient": coefficient})
    quantized = layer._quantize_input(x, index, coefficient)
    used = torch.tensor([0, 1])
    weights = layer._weights(used, choice)
    out = torch.stack([weights[int(i)] @ row for i, row in zip(index, quantized)])
    g = torch.randn(4, 2)
    (out * g).sum().backward()
    of_inputs = torch.stack([g[i] @ weights[int(index[i])] @ (quantized - x)[i] for i in range(4)])
    of_weights = torch.stack([g[i] @ (weights[int(index[i])] - layer.layer.weight) @ quantized[i] for i in range(4)])
    for position in (0, 1):
        group = index == position
        of_weights[group] = of_weights[group].mean()
    assert torch.allclose(coefficient.grad, of_inputs + of_weights, atol=1e-5)


def test_bitops_by_hand():
    """MNIST_CNN on 8 x 8: 3-64 at 64 positions, 64-128 (stride 2), 128-128 twice at 16, and the classifier."""
    first, inner, last = 27 * 64 * 64, [9 * 64 * 128 * 16, 9 * 128 * 128 * 16, 9 * 128 * 128 * 16], 128 * 10
    for bits in (2, 3, 4, 8):
        costs = make("UniformQuant", bits=bits).costs()
        assert costs["bitops"] == 64 * (first + last) + bits**2 * sum(inner)
        assert costs["bitops_8bit"] == 64 * (first + last + sum(inner))
        assert costs["mean_bits"] == bits
    algorithm = make("DQMQ")
    policies = list(algorithm.policies().values())
    for policy, bits in zip(policies, (2.0, 5.0, 8.0)):
        policy.start.fill_(bits)
    x = torch.rand(3, 3, 8, 8)
    algorithm.eval()
    algorithm.step = 5001  # behind the stage at 8 bits
    algorithm.predict(x)
    measured = algorithm.measurements()
    expected = 64 * (first + last) + 4 * inner[0] + 25 * inner[1] + 64 * inner[2]
    assert measured["bitops"] == pytest.approx(expected, rel=1e-12)
    assert measured["mean_bits"] == 5.0
    assert algorithm.measurements() == {}


def test_expected_bitops_by_enumeration():
    bitops = BitOps(100, {"a": 10, "b": 7}, 20)
    bits = torch.tensor([float(b) for b in WIDTHS])
    logs = {name: torch.randn(3, 6).log_softmax(1) for name in "ab"}
    trace = {name: [type("C", (), {"log_probabilities": value})] for name, value in logs.items()}
    for sample in range(3):
        total = 0.0
        for i, j in itertools.product(range(6), repeat=2):
            probability = (logs["a"][sample, i] + logs["b"][sample, j]).exp().item()
            total += probability * (100 + 10 * WIDTHS[i] ** 2 + 7 * WIDTHS[j] ** 2)
        assert bitops.expected(trace, bits)[sample].item() == pytest.approx(total, rel=1e-5)


def test_the_policy_starts_on_its_budget():
    bitops = BitOps(0, {"a": 10}, 10)
    bits = torch.tensor([float(b) for b in WIDTHS])
    for fraction in (0.2, 0.4, 0.8):
        for sigma in (0.3, 1.0):
            mean = starting_mean(bitops, fraction * 640, sigma)
            expected = log_probabilities(torch.tensor([mean]), torch.tensor([sigma]).log(), bits).exp() @ bits**2
            assert expected.item() * 10 == pytest.approx(fraction * 640, rel=1e-3)
    algorithm = make("DQMQ", target_bitops=0.3)
    for policy in algorithm.policies().values():
        mean, log_sigma = policy.distribution(torch.randn(5, policy.features, 3, 3))
        assert mean.tolist() == pytest.approx([starting_mean(algorithm.bitops, algorithm.budget, 0.5)] * 5)
        assert log_sigma.exp().tolist() == pytest.approx([0.5] * 5)


@pytest.mark.parametrize("name", ["DQMQ", "StaticMixedPrecision"])
def test_widths_settle_and_the_network_trains_as_it_is_evaluated(name):
    """From half of the run on no policy moves, batches keep to the budget, and evaluations in between change nothing."""
    algorithm, watched = (
        contract.make(name, total_steps=12, overrides={"target_bitops": 0.3, "backbone": "mnist_cnn_bn"})
        for _ in range(2)
    )  # fmt: skip
    drawing = contract.run(algorithm, 0, 6)
    contract.run(watched, 0, 6)
    before = {key: value.clone() for key, value in algorithm.named_parameters()}
    watched.prepare_evaluation(torch.cat([x for x, _ in contract.minibatches(1000 + i)]) for i in range(3))
    settled = contract.run(algorithm, 6, 12)
    assert contract.run(watched, 6, 12) == settled
    moved = {key for key, value in algorithm.named_parameters() if not torch.equal(value, before[key])}
    assert moved and not any(".policy." in key for key in moved)
    assert any(abs(step["expected_bitops"] - 0.3) > 1e-4 for step in drawing[2:])
    # Fitted to batches of 24, of which samples of the next differ.
    assert sum(step["expected_bitops"] for step in settled) / 6 == pytest.approx(0.3, rel=0.1)
    # A layer that is settled takes, of all there are, the width nearest to mu + shift.
    layer = next(layer for layer in algorithm.layers.values() if layer.policy is not None)
    x = torch.rand(4, layer.policy.features, 4, 4)
    choice = layer.policy.settled(x, 0.7)
    mean, _ = layer.policy.distribution(x)
    assert [WIDTHS[i] for i in choice.index] == [min(WIDTHS, key=lambda b: abs(b - m - 0.7)) for m in mean.tolist()]
    assert choice.coefficient is None


@pytest.mark.parametrize("seed", range(4))
def test_shifts_meet_the_budget(seed):
    """Samples that differ: closely. One decision for all: to the last assignment that fits."""
    generator = torch.Generator().manual_seed(seed)
    macs = torch.randint(1, 100, (20,), generator=generator).tolist()
    means = 4 + 1.5 * torch.randn(64, 20, generator=generator)
    bits = torch.tensor(WIDTHS, dtype=torch.float64)

    def cost(means, shifts):
        index = (bits - (means + shifts)[..., None]).abs().argmin(-1)
        return float((bits[index].square() * torch.tensor(macs[: means.shape[1]])).sum(1).mean())

    budget = 0.3 * 64 * sum(macs)
    taken = cost(means, fit_shifts(means, macs, budget))
    assert 0.99 * budget < taken <= budget * (1 + 1e-9)
    alike = means[:1].expand(64, 20)
    assert 0.95 * budget < cost(alike, fit_shifts(alike, macs, budget)) <= budget * (1 + 1e-9)


def test_few_layers_alike_for_all_are_searched_exhaustively():
    means, macs = torch.tensor([[4.1, 3.0, 6.0]]), [5, 9, 4]
    budget = 5 * 25 + 9 * 9 + 4 * 36 + 0.5
    shifts = fit_shifts(means, macs, budget)
    assert (means[0] + shifts).tolist() == pytest.approx([5.0, 3.0, 6.0]) or (
        sum(m * b**2 for m, b in zip(macs, (means[0] + shifts).tolist())) <= budget
    )
    best = min(
        (a for a in itertools.product(WIDTHS, repeat=3)
         if 0.95 * budget <= sum(m * b**2 for m, b in zip(macs, a)) <= budget),
        key=lambda a: sum((b - m) ** 2 for b, m in zip(a, means[0].tolist())),
    )  # fmt: skip
    assert (means[0] + shifts).tolist() == pytest.approx(list(best))


@pytest.mark.parametrize("name", ["DQMQ", "StaticMixedPrecision"])
def test_budget_is_met_on_held_out_data(name):
    values = hparams.resolve_hparams(
        name, "FullColoredDigits", overrides={"backbone": "mnist_cnn_bn", "target_bitops": 0.3}
    )
    torch.manual_seed(0)
    algorithm = registry.get(name).cls(contract.INPUT_SHAPE, contract.CLASSES, contract.DOMAINS, values)
    algorithm.total_steps = 40
    contract.run(algorithm, 0, 40)
    algorithm.prepare_evaluation(torch.cat([x for x, _ in contract.minibatches(1000 + i)]) for i in range(5))
    algorithm.eval()
    for i in range(4):
        algorithm.predict(torch.cat([x for x, _ in contract.minibatches(2000 + i)]))
    fraction = algorithm.measurements()["bitops"] / algorithm.bitops.at_8_bits
    assert fraction == pytest.approx(0.3, rel=0.05)
    assert algorithm.costs()["bitops"] / algorithm.bitops.at_8_bits == pytest.approx(0.3, rel=0.05)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("UniformQuant", {"bits": 1}, "a whole number of bits in 2..8, got 1"),
        ("UniformQuant", {"bits": 9}, "a whole number of bits in 2..8, got 9"),
        ("DQMQ", {"target_bitops": 0.05}, "no assignment takes 0.05"),
        ("DQMQ", {"target_bitops": 1.5}, r"a fraction in (0, 1], got 1.5"),
        ("DQMQ", {"reinforce": 0.1, "objective": "Mixup"}, "objective 'Mixup' does not minimise"),
        ("DQMQ", {"policy_end": 0.6}, "'policy_end' of DQMQ is 0.6: it is built in as 0.5 now"),
        ("DQMQ", {"policy_lr": 0.0}, "'policy_lr'"),
        ("DQMQ", {"degrade": 1.5}, "a probability in [0, 1], got 1.5"),
    ],
)
def test_bad_hparams_are_one_line(name, overrides, words):
    with pytest.raises(UserError) as raised:
        make(name, **overrides)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_network_with_nothing_to_quantize():
    from domainbed_sfp.quantization.layers import quantize_layers

    with pytest.raises(UserError, match=r"nothing to quantize.*found: 0, 1"):
        quantize_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), ["0", "1"], Control(), None, 4)


def test_integers_are_what_lsq_rounds_to():
    values = torch.randn(50)
    for bits, signed in itertools.product((2, 4, 8), (True, False)):
        step = torch.tensor(0.21)
        assert torch.equal(to_integers(values, step, bits, signed) * step, run_lsq(values, step, bits, signed))
