"""Quantization against the formulas of the papers: by hand, by finite differences, by enumeration."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.images import degradations
from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD, normalize
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.deploy import files, packed
from domainbed_sfp.networks.precision import choose_precision
from domainbed_sfp.plugins import contract
from domainbed_sfp.quantization.bitops import BitOps, fit_shifts, starting_mean
from domainbed_sfp.quantization.layers import Control, QuantizedLayer, run_by_width
from domainbed_sfp.quantization.packing import pack, unpack
from domainbed_sfp.quantization.policy import (
    WIDTHS,
    Policy,
    _Bounded,
    common_uniforms,
    log_probabilities,
    reinforce,
    straight_through,
)
from domainbed_sfp.quantization.quantizers import StepSizes, integer_range, lsq, to_integers
from domainbed_sfp.training import hparams


def run_lsq(values, step, bits, signed, scale=1.0, coefficient=None):
    below, top = integer_range(bits, signed)
    one = torch.ones(1, dtype=values.dtype)
    return lsq(values[None], step[None], -below * one, top * one, scale * one, coefficient)[0]


# LSQ ----------------------------------------------------------------------------------------------------------------


def test_integer_ranges_are_the_papers():
    assert integer_range(2, True) == (2, 1) and integer_range(8, True) == (128, 127)
    assert integer_range(2, False) == (0, 3) and integer_range(8, False) == (0, 255)


def test_lsq_values_by_hand():
    """Two bits signed: the integers -2, -1, 0, 1 times the step; halves go to the even neighbour."""
    values = torch.tensor([-3.0, -0.8, -0.25, 0.2, 0.3, 0.49, 9.0])
    out = run_lsq(values, torch.tensor(0.5), 2, signed=True)
    assert out.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    unsigned = run_lsq(values, torch.tensor(0.5), 2, signed=False)
    assert unsigned.tolist() == [0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.5]


def test_lsq_gradients_are_equations_3_and_5():
    """Inside: dq/dv = 1, dq/ds = round(v/s) - v/s. Outside: dq/dv = 0, dq/ds = -Qn or Qp. The step's is scaled."""
    values = torch.tensor([-3.0, -0.8, 0.2, 0.3, 9.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (run_lsq(values, step, 2, signed=True, scale=0.1) * weights).sum().backward()
    assert values.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    by_hand = 1 * -2 + 2 * (-2 + 1.6) + 3 * (0 - 0.4) + 4 * (1 - 0.6) + 5 * 1
    assert step.grad.item() == pytest.approx(0.1 * by_hand, rel=1e-6)


def test_step_gradient_outside_the_range_is_the_finite_difference():
    """Where values saturate, and where they stay on their integer, the quantizer is smooth in the step."""
    values = torch.tensor([-7.0, 5.0, 6.5], dtype=torch.float64)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    run_lsq(values, step, 3, signed=True).sum().backward()
    with torch.no_grad():
        up, down = (run_lsq(values, step + delta, 3, signed=True).sum() for delta in (1e-6, -1e-6))
    assert step.grad.item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6)


def test_step_gradient_inside_is_what_the_straight_through_estimator_gives():
    """Of s * round(v/s) with the rounding passed through, written out and differentiated by torch."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(200, generator=generator, dtype=torch.float64)
    (run_lsq(values, ours, 4, signed=True) * weights).sum().backward()
    clipped = (values / theirs).clamp(-8, 7)
    ((clipped + (clipped.round() - clipped).detach()) * theirs * weights).sum().backward()
    assert ours.grad.item() == pytest.approx(theirs.grad.item(), rel=1e-9)


def test_coefficient_receives_the_effect_of_its_rows_error():
    values = torch.randn(5, 3, 4, 4)
    step, coefficient = torch.full((5,), 0.4), torch.ones(5, requires_grad=True)
    low, high = torch.full((5,), -4.0), torch.full((5,), 3.0)
    out = lsq(values, step, low, high, torch.ones(5), coefficient)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    assert torch.allclose(coefficient.grad, ((out - values) * weights).flatten(1).sum(1), atol=1e-5)


def test_memory_format_does_not_matter():
    values, weights = torch.randn(5, 3, 4, 6), torch.randn(5, 3, 4, 6)
    gradients = []
    for form in (torch.contiguous_format, torch.channels_last):
        v = values.clone(memory_format=form).requires_grad_()
        step = torch.full((5,), 0.3, requires_grad=True)
        out = lsq(v, step, torch.zeros(5), torch.full((5,), 7.0), torch.ones(5))
        (out * weights).sum().backward()
        gradients.append((out, v.grad, step.grad))
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, atol=1e-5)


def test_large_tensors_in_parts_give_the_same(monkeypatch):
    from domainbed_sfp.quantization import quantizers

    values, weights = torch.randn(11, 3, 4, 6), torch.randn(11, 3, 4, 6)
    results = []
    for limit in (10**9, 0):
        monkeypatch.setattr(quantizers, "CACHED_VALUES", limit)
        monkeypatch.setattr(quantizers, "CPU_CHUNK_VALUES", 200)  # of 792: in parts of two rows
        v = values.clone().requires_grad_()
        step = torch.linspace(0.1, 0.5, 11).requires_grad_()
        coefficient = torch.ones(11, requires_grad=True)
        out = lsq(v, step, torch.full((11,), -8.0), torch.full((11,), 7.0), torch.ones(11), coefficient)
        (out * weights).sum().backward()
        results.append((out, v.grad, step.grad, coefficient.grad))
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_step_sizes_start_as_in_the_paper():
    """2 mean|v| / sqrt(Qp), one for each width; the sign is found out from the values."""
    values = torch.tensor([0.0, 1.0, 2.0, 5.0])
    steps = StepSizes((2, 4, 8))
    steps.initialise(values)
    assert steps.signed is False
    assert steps.steps().tolist() == pytest.approx([2 * 2 / math.sqrt(top) for top in (3, 15, 255)])
    signed = StepSizes((2, 4, 8))
    signed.initialise(-values)
    assert signed.signed is True
    assert signed.steps().tolist() == pytest.approx([2 * 2 / math.sqrt(top) for top in (1, 7, 127)])


def test_gradient_scale_is_the_papers():
    """1 / sqrt(N Qp), and the chain rule of step = 2 level / sqrt(Qp)."""
    values = torch.rand(1, 10)
    steps = StepSizes((2, 4), signed=True)
    steps.initialise(values)
    steps.quantize(values, torch.tensor([1]), count=10).sum().backward()
    plain = torch.tensor(steps.steps()[1].item(), requires_grad=True)
    run_lsq(values[0], plain, 4, signed=True).sum().backward()
    expected = plain.grad / math.sqrt(10 * 7) * 2 / math.sqrt(7)
    assert steps.level.grad.tolist() == pytest.approx([0.0, expected.item()], rel=1e-5)


# The policy ---------------------------------------------------------------------------------------------------------


def test_probabilities_by_hand():
    logs = log_probabilities(torch.tensor([4.0]), torch.tensor([0.0]), torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0, 8.0]))
    weights = [math.exp(-d / 2) for d in (4, 1, 0, 1, 4, 16)]
    assert logs.exp()[0].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-5)
    narrow = log_probabilities(torch.tensor([4.0]), torch.tensor([math.log(0.5)]), torch.tensor([4.0, 5.0]))
    assert (narrow[0, 0] - narrow[0, 1]).item() == pytest.approx(1 / (2 * 0.25), rel=1e-5)


def test_policy_draws_what_it_says():
    torch.manual_seed(0)
    policy = Policy(3)
    policy.start.fill_(4.0)
    choice = policy.sample(torch.randn(40_000, 3, 2, 2), independent=True)
    frequencies = choice.index.bincount(minlength=6) / 40_000
    assert torch.allclose(frequencies, choice.log_probabilities[0].exp(), atol=0.01)
    assert len(policy.sample(torch.randn(40_000, 3, 2, 2)).index.unique()) <= 2


def test_common_draws_have_the_distribution_of_independent_ones():
    torch.manual_seed(0)
    logs = torch.randn(4, 6).log_softmax(1)
    counts = torch.zeros(4, 6)
    for _ in range(5000):
        index, _ = straight_through(logs, common_uniforms(4, logs.device))
        counts[torch.arange(4), index] += 1
    assert torch.allclose(counts / 5000, logs.exp(), atol=0.03)


def test_half_the_samples_draw_from_the_other_end():
    torch.manual_seed(0)
    uniforms = common_uniforms(9, torch.device("cpu"))
    values, counts = uniforms.unique(return_counts=True)
    assert values.sum().item() == pytest.approx(1) and sorted(counts.tolist()) == [4, 5]
    logs = torch.tensor([0.25, 0.25, 0.5, 0.0]).log().expand(4, 4)
    assert straight_through(logs, torch.tensor([0.0, 0.24, 0.25, 0.999]))[0].tolist() == [0, 0, 1, 2]


def test_evaluation_takes_the_nearest_allowed_width():
    policy = Policy(3)
    x = torch.randn(2, 3)
    for start, shift, expected in (
        (4.4, 0.0, 4),
        (4.6, 0.0, 5),
        (4.4, 3.0, 8),
        (6.9, 0.0, 6),
        (-3.0, 0.0, 2),
        (4.5, 0.0, 4),
    ):
        policy.start.fill_(start)
        policy.shift.fill_(shift)
        assert [WIDTHS[i] for i in policy.most_probable(x).index] == [expected, expected]
    policy.allowed[WIDTHS.index(4)] = False
    policy.start.fill_(4.4)
    assert WIDTHS[policy.most_probable(x).index[0]] == 5


def test_a_policy_without_input_decides_alike_for_all():
    torch.manual_seed(0)
    for reads_input, different in ((False, 1), (True, 3)):
        policy = Policy(3, reads_input)
        nn.init.normal_(policy.output.weight)
        mean, _ = policy.distribution(torch.randn(3, 3, 4, 4))
        assert len(mean.unique()) == different


def test_shifts_leave_room_around_the_widths_they_choose():
    """Nineteen layers that decide alike for all samples, too many to try every assignment: mu moved by a tenth of a bit
    either way, or by a rounding error, is still nearest to the same widths."""
    torch.manual_seed(0)
    means = (3 + 2 * torch.rand(19)).expand(8, 19)
    macs = [1 + layer for layer in range(19)]
    bits = torch.tensor(WIDTHS, dtype=torch.float64)

    def cost(shifted):
        nearest = bits[(shifted[..., None] - bits).abs().argmin(-1)]
        return float((nearest.square() * torch.tensor(macs)).sum(1).mean())

    budget = 16.0 * sum(macs)
    shifted = means.double() + fit_shifts(means, macs, budget)
    assert 0.95 * budget < cost(shifted) <= budget
    assert cost(shifted + 0.1) == cost(shifted - 0.1) == cost(shifted)
    # Samples that spread over less than a width's interval stay in it.
    spread = means + 0.3 * torch.rand(8, 1)
    shifts = fit_shifts(spread, macs, budget)
    assert cost(spread.double() + shifts) <= budget * (1 + 1e-9)


def test_a_policy_that_is_too_narrow_finds_back():
    values = torch.tensor([-3.0, -3.0, 0.0, 4.0, 4.0], requires_grad=True)
    bounded = _Bounded.apply(values)
    assert bounded.tolist() == pytest.approx([-2.0, -2.0, 0.0, 1.5, 1.5])
    (bounded * torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0])).sum().backward()
    assert values.grad.tolist() == [0.0, -1.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("name, overrides", [("UniformQuant", {"bits": 4}), ("StaticMixedPrecision", {})])
def test_quantized_layers_compute_in_full_precision_under_autocast(name, overrides):
    algorithm = trained(name, **overrides).eval()
    x = torch.rand(8, 3, 8, 8)
    layer = list(algorithm.layers.values())[1]
    shape = (4, layer.layer.in_channels, 5, 5)
    inputs = torch.randn(shape).bfloat16()
    with torch.no_grad():
        expected = layer(inputs.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(inputs)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert choose_precision("auto", torch.device("cuda"), algorithm) == "fp32"
    assert algorithm.predict(x).shape == (8, algorithm.num_classes)


def test_a_uniform_width_may_begin_later(tmp_path):
    """As the methods with a policy do: 8 bits first, then step sizes start anew from the weights as they are."""
    values = hparams.resolve_hparams("UniformQuant", "FullColoredDigits", overrides={"bits": 3, "quantize_start": 0.25})
    torch.manual_seed(0)
    algorithm = registry.get("UniformQuant").cls((3, 8, 8), 4, 2, values)
    algorithm.total_steps = 8
    final = algorithm.bitops.uniform(8)
    told = []
    for step in range(8):
        torch.manual_seed(step)
        algorithm.update([(torch.rand(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(2)])
        told.append((algorithm.at_final_compression(), algorithm.costs()["mean_bits"]))
        if step == 1:
            assert algorithm.costs()["bitops"] == algorithm.bitops.at_8_bits
    assert told == [(False, 8.0)] * 2 + [(True, 3.0)] * 6
    assert algorithm.costs()["bitops"] == final < algorithm.bitops.at_8_bits
    again = registry.get("UniformQuant").cls((3, 8, 8), 4, 2, values)
    again.total_steps = 8
    again.load_state_dict(algorithm.state_dict())
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(again.eval().predict(x), algorithm.eval().predict(x))
    assert {tuple(layer.widths) for layer in packed.deployed_layers(algorithm.export()).values()} == {(8,), (3,)}


def test_a_policy_pools_over_positions_wherever_channels_are():
    torch.manual_seed(0)
    policy, last = Policy(3), Policy(3, channels_last=True)
    last.load_state_dict(policy.state_dict())
    for one in (policy, last):
        nn.init.constant_(one.output.weight, 0.1)
    x = torch.randn(5, 3, 4, 4)
    expected = policy.distribution(x)[0]
    assert expected.std() > 0
    assert torch.allclose(last.distribution(x.permute(0, 2, 3, 1))[0], expected, atol=1e-6)
    assert torch.allclose(last.distribution(x.flatten(2).transpose(1, 2))[0], expected, atol=1e-6)


def test_dqmq_reads_linear_layers_on_maps_with_channels_last():
    pytest.importorskip("timm", reason="timm is not installed")
    overrides = {"backbone": "test_convnext", "weights": "none", "image_size": 32}
    algorithm = registry.get("DQMQ").cls(
        (3, 32, 32), 4, 2, hparams.resolve_hparams("DQMQ", "PACS", overrides=overrides)
    )
    algorithm.total_steps = 2
    for _ in range(2):
        algorithm.update([(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(2)])
    assert algorithm.at_final_compression()
    # Nobody has asked for an evaluation, as in DomainBed's own loop: the widths of the last batch are known anyway.
    assert algorithm.costs()["mean_bits"] < 8


def test_a_constant_policy_is_not_deployed():
    def deployed(name):
        algorithm = registry.get(name).cls((3, 8, 8), 4, 2, hparams.resolve_hparams(name, "FullColoredDigits"))
        return {name for name in algorithm.deployed_parameters() if ".policy." in name}

    assert deployed("DQMQ") and not deployed("StaticMixedPrecision")


def test_a_policys_widths_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    policy = Policy(8)
    nn.init.normal_(policy.output.weight)
    x = torch.randn(16, 8, 4, 4)
    expected = policy.distribution(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy.distribution(x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_what_a_policy_reads_is_standardised():
    """By the first training batch, then by running statistics: scale and offset of a channel do not matter."""
    torch.manual_seed(0)
    policy = Policy(3)
    nn.init.normal_(policy.output.weight)
    shifted = copy.deepcopy(policy)
    x, another = torch.randn(2, 64, 3, 4, 4)
    scale, offset = torch.tensor([0.01, 1.0, 40.0]).view(3, 1, 1), torch.tensor([-0.07, 0.0, 300.0]).view(3, 1, 1)
    policy.sample(x)
    pooled = x.mean((2, 3))
    assert torch.allclose(policy.pooled_mean, pooled.mean(0)) and torch.allclose(policy.pooled_variance, pooled.var(0))
    shifted.sample(x * scale + offset)
    assert torch.allclose(policy.distribution(another)[0], shifted.distribution(another * scale + offset)[0], atol=1e-2)
    before = copy.deepcopy(policy.state_dict())
    policy.most_probable(another)  # evaluation leaves no trace
    policy.sample(another[:1])  # nor does a batch that has no variance
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    policy.sample(another)
    assert torch.allclose(policy.pooled_mean, 0.9 * pooled.mean(0) + 0.1 * another.mean((2, 3, 0)))


def test_a_constant_channel_decides_nothing():
    torch.manual_seed(0)
    policy = Policy(2)
    nn.init.normal_(policy.output.weight)
    x = torch.full((8, 2, 1, 1), 0.7)
    x[:, 1] = torch.randn(8, 1, 1)
    x[::2, 0] += 1e-7
    policy.sample(x)
    other = x.clone()
    other[:, 0] = 0.7
    assert torch.allclose(policy.distribution(x)[0], policy.distribution(other)[0], atol=1e-3)


def test_straight_through_gradient_by_enumeration():
    """Over every choice, weighted by its probability: the exact gradient of sum_k P(k) L(k); and a constant that all
    branches share changes nothing."""
    bits = torch.tensor([float(b) for b in WIDTHS])
    losses = torch.tensor([1.0, 0.4, 0.15, 0.1, 0.05, 0.0])
    mean = torch.tensor([4.3], requires_grad=True)
    log_sigma = torch.tensor([0.2], requires_grad=True)
    probabilities = log_probabilities(mean, log_sigma, bits).exp()
    exact = torch.autograd.grad((probabilities * losses).sum(), (mean, log_sigma))
    torch.manual_seed(0)
    logs = log_probabilities(mean.expand(400), log_sigma.expand(400), bits)
    index, coefficient = straight_through(logs, torch.rand(400))
    assert (coefficient == 1).all() and len(index.unique()) == len(WIDTHS)
    for offset in (0.0, 3.0):
        estimate = torch.zeros(2)
        for k in range(len(WIDTHS)):
            one = coefficient[(index == k).nonzero()[0]] * (losses[k] + offset)
            gradient = torch.stack(torch.autograd.grad(one.sum(), (mean, log_sigma), retain_graph=True))
            estimate += probabilities[0, k].detach() * gradient[:, 0]
        assert estimate.tolist() == pytest.approx([value.item() for value in exact], rel=1e-4)


def test_a_linear_network_gives_the_policy_the_exact_gradient():
    """Through the layer itself: the mean over draws of the gradient of mu, against the sum over widths of P' L, for a
    loss that is linear in the outputs and weights on the grid of every width (so that no product of errors remains)."""
    torch.manual_seed(0)
    layer = QuantizedLayer(nn.Linear(3, 2, bias=False), "fc", Control("sampled", independent=True), policy=Policy(3))
    with torch.no_grad():
        layer.layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -2.0]]))
        layer.weight_steps.level.copy_(layer.weight_steps.bounds()[1].sqrt() / 2)  # steps of 1
    x = torch.tensor([[0.9, -1.7, 0.4]])
    layer.input_steps.initialise(x)
    layer.policy.start.fill_(3.5)
    g = torch.tensor([1.0, -0.5])
    errors = []
    for at in range(len(WIDTHS)):
        errors.append((layer._run_alike(x, at)[0] @ g).detach())
    bias = layer.policy.output.bias
    mean, log_sigma = layer.policy.distribution(x)
    exact = torch.autograd.grad(
        (log_probabilities(mean, log_sigma, layer.policy.bits).exp()[0] * torch.stack(errors)).sum(), bias
    )[0]
    draws = 100_000
    estimate = torch.autograd.grad((layer(x.expand(draws, 3)) @ g).mean(), bias)[0]
    assert torch.allclose(estimate, exact, atol=0.01) and exact.abs().max() > 0.05


def test_reinforce_by_enumeration():
    """The expectation over all pairs of choices of two samples is the exact gradient of the expected reward."""
    logits = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.9, -0.4]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1.0, 2.0, -1.0], [0.5, 4.0, 3.0]], dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(1) * rewards).sum(1).mean(), logits)[0]
    logs = logits.log_softmax(1)
    estimate = torch.zeros_like(logits)
    for pair in itertools.product(range(3), repeat=2):
        rows = torch.arange(2)
        log_probability, reward = logs[rows, list(pair)], rewards[rows, list(pair)]
        gradient = torch.autograd.grad(reinforce(log_probability, reward), logits, retain_graph=True)[0]
        estimate -= log_probability.sum().exp().detach() * gradient
    assert torch.allclose(estimate, exact)


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


# Bit operations and budgets -----------------------------------------------------------------------------------------


def make(name, **overrides):
    values = hparams.resolve_hparams(name, "FullColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    return registry.get(name).cls((3, 8, 8), 10, 2, values)


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


# Degradations -------------------------------------------------------------------------------------------------------


def pictures(n=6, channels=3, side=32):
    """Smooth blobs with an edge: something that every degradation can spoil."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, channels, 6, 6, generator=generator)
    images = F.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    images[:, :, side // 3 : side // 2, side // 4 : side // 2] = 0.9
    return images


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", degradations.KINDS)
def test_degradations_spoil_more_with_severity(kind, channels):
    images = pictures(channels=channels)
    before = images.clone()
    errors = []
    for severity in degradations.SEVERITIES:
        out = degradations.degrade(images, kind, torch.full((6,), severity), torch.Generator().manual_seed(0))
        assert out.shape == images.shape and out.dtype == images.dtype and out.min() >= 0 and out.max() <= 1
        errors.append(((out - images) ** 2).mean().item())
    assert torch.equal(images, before)
    assert errors[0] > 0 and errors == sorted(errors) and errors[-1] > 1.2 * errors[0]


@pytest.mark.parametrize("kind", [kind for kind in degradations.KINDS if kind != "noise"])  # drawn for a whole batch
def test_each_sample_has_its_own_severity(kind):
    images, severity = pictures(5), torch.arange(1, 6)
    together = degradations.degrade(images, kind, severity, torch.Generator())
    for i in range(5):
        alone = degradations.degrade(images[i : i + 1], kind, severity[i : i + 1], torch.Generator())
        assert torch.allclose(together[i], alone[0], atol=2e-3)


def test_contrast_by_hand():
    images = torch.tensor([0.0, 1.0, 0.5, 0.5]).view(1, 1, 2, 2)
    out = degradations.degrade(images, "contrast", torch.tensor([2]), torch.Generator())
    assert out.flatten().tolist() == pytest.approx([0.35, 0.65, 0.5, 0.5])


def test_degradations_are_drawn_evenly_and_from_the_seed():
    drawn = degradations.draw_degradations(20_000, 0.5, 7)
    assert (drawn.kind >= 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.allclose(drawn.kind[drawn.kind >= 0].bincount() / 10_000, torch.full((5,), 0.2), atol=0.02)
    assert torch.equal(drawn.severity, degradations.draw_degradations(20_000, 0.5, 7).severity)
    x = pictures(8)
    few = degradations.draw_degradations(8, 0.5, 7)
    first, again = (degradations.degrade_batch(x, few, is_normalized=False) for _ in range(2))
    assert torch.equal(first, again)
    changed = (first != x).flatten(1).any(1)
    assert torch.equal(changed, few.kind >= 0) and 0 < changed.sum() < 8


def test_normalised_images_are_degraded_as_pixels():
    levels = (pictures() * 255).round().to(torch.uint8)
    drawn = degradations.draw_degradations(6, 1.0, 0)
    ours = degradations.degrade_batch(normalize(levels), drawn, is_normalized=True)
    pixels = degradations.degrade_batch(levels / 255, drawn, is_normalized=False)
    expected = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.allclose(ours, expected, atol=0.02)


def test_an_unknown_degradation():
    with pytest.raises(UserError, match="unknown degradation 'blurr'; did you mean 'blur'"):
        degradations.degrade(pictures(), "blurr", torch.ones(6, dtype=torch.long), torch.Generator())


def test_minibatches_are_degraded_and_otherwise_the_same():
    """The same samples with the same augmentation, and of those about the given part degraded; again and again."""
    values = hparams.resolve_hparams("ERM", "FullColoredDigits")
    dataset = get_dataset_class("FullColoredDigits").build(None, values, 0, None)
    parts = [(0, np.arange(400))]

    def batch(degrade):
        loader = MinibatchLoader(dataset, parts, 200, False, 0, torch.device("cpu"), degrade=degrade)
        try:
            return loader.minibatches(3)[0]
        finally:
            loader.close()

    clean, half, again = batch(0.0), batch(0.5), batch(0.5)
    assert torch.equal(clean[1], half[1]) and torch.equal(half[0], again[0])
    changed = (clean[0] != half[0]).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.5, abs=0.15)


# Whole runs ---------------------------------------------------------------------------------------------------------


def test_records_hold_bits_by_environment_and_by_degradation(main, tmp_path):
    options = (
        "--dataset",
        "FullColoredDigits",
        "--steps",
        6,
        "--checkpoint_freq",
        3,
        "--test_envs",
        2,
        "--skip_model_save",
    )
    main("train", *options, "--algorithm", "DQMQ", "--output_dir", tmp_path / "run" / "dqmq")
    lines = (tmp_path / "run" / "dqmq" / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [("env2_degraded" in record) for record in records] == [False] * (len(records) - 1) + [True]
    last = records[-1]
    for env in range(3):
        assert 2 <= last[f"env{env}_mean_bits"] <= 8
        assert 0 < last[f"env{env}_bitops"] <= last["bitops_8bit"]
    assert last["bitops"] / last["bitops_8bit"] == pytest.approx(0.25, rel=0.05)
    cases = last["env2_degraded"]
    assert len(cases) == 1 + 5 * 5 and cases[0]["degradation"] == "none"
    assert all(0 <= case["accuracy"] <= 1 and 2 <= case["mean_bits"] <= 8 for case in cases)
    table = main("collect", "--input_dir", tmp_path / "run", "--selection", "training-domain").stdout
    assert "Bits" in table and "BitOPs (of 8 bits)" in table and "(25%)" in table


def test_evaluating_degraded_copies_changes_nothing_else(main, tmp_path):
    for wanted in ("true", "false"):
        main("train", "--dataset", "FullColoredDigits", "--algorithm", "UniformQuant", "--steps", 4, "--checkpoint_freq", 2,
             "--hparams", f'{{"degraded_evaluation": {wanted}}}', "--output_dir", tmp_path / wanted)  # fmt: skip
    models = [
        torch.load(tmp_path / wanted / "model.pkl", weights_only=True)["model_dict"] for wanted in ("true", "false")
    ]
    assert all(torch.equal(v, models[1][k]) for k, v in models[0].items() if isinstance(v, torch.Tensor))


def test_other_algorithms_can_be_degraded_too(main, tmp_path):
    options = ("--dataset", "FullColoredDigits", "--algorithm", "ERM", "--steps", 3, "--skip_model_save")
    losses = []
    for degrade in ("0.0", "1.0"):
        main("train", *options, "--hparams", f'{{"degrade": {degrade}}}', "--output_dir", tmp_path / degrade)
        losses.append(json.loads((tmp_path / degrade / "results.jsonl").read_text().splitlines()[-1])["loss"])
    assert losses[0] != losses[1]


# Export -------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_packing_round_trip(bits, data):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = data.draw(st.lists(st.integers(low, high), min_size=0, max_size=40))
    packed = pack(torch.tensor(values, dtype=torch.int16), bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert unpack(packed, bits, (len(values),)).tolist() == values


def test_packing_by_hand():
    """-2, -1, 0, 1 at two bits are 0, 1, 2, 3, lowest first: 0b11100100."""
    assert pack(torch.tensor([-2, -1, 0, 1]), 2).tolist() == [0b11100100]
    assert pack(torch.tensor([[-8, 7], [0, -1]]), 4).tolist() == [0xF0, 0x78]
    with pytest.raises(ValueError, match="do not fit into 2 bits"):
        pack(torch.tensor([2]), 2)
    with pytest.raises(ValueError, match="do not come from"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, (5,))


@functools.cache
def trained(name, **overrides):
    """A small network after a few steps; shared by tests, which leave it as it is."""
    overrides = {"backbone": "mnist_cnn_bn", **overrides}
    algorithm = contract.make(name, total_steps=4, overrides=overrides)
    contract.run(algorithm, 0, 4)
    algorithm.prepare_evaluation(torch.cat([x for x, _ in contract.minibatches(1000 + i)]) for i in range(3))
    return algorithm.eval()


def images(count=4):
    return torch.cat([x for i in range(count) for x, _ in contract.minibatches(3000 + i)])


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("UniformQuant", {"bits": 3}),
        ("UniformQuant", {"bits": 5, "nonlinear_classifier": True}),
        ("StaticMixedPrecision", {"backbone": "mnist_cnn"}),
        ("DQMQ", {}),
    ],
)
def test_the_integer_file_gives_the_logits(tmp_path, name, overrides):
    algorithm = trained(name, **overrides)
    packed.save(tmp_path / "network.safetensors", algorithm)
    network = packed.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.equal(network(images()), algorithm.predict(images()))


def test_file_size_falls_with_the_width(tmp_path):
    sizes = {}
    for bits in (2, 3, 4, 8):
        untrained = contract.make("UniformQuant", overrides={"bits": bits})
        packed.save(tmp_path / "network.safetensors", untrained)
        sizes[bits] = (tmp_path / "network.safetensors").stat().st_size
    inner = 9 * 64 * 128 + 2 * 9 * 128 * 128
    for bits in (2, 3, 4):
        assert sizes[8] - sizes[bits] == pytest.approx(inner * (8 - bits) / 8, abs=200)


def test_a_policys_file_holds_the_widths_in_use_alone(tmp_path):
    algorithm = trained("DQMQ")
    packed.save(tmp_path / "network.safetensors", algorithm)
    with safe_open(tmp_path / "network.safetensors", framework="pt") as file:
        stored = [key for key in file.keys() if key.startswith("integers/")]  # noqa: SIM118
    allowed = sum(int(policy.allowed.sum()) for policy in algorithm.policies().values())
    assert len(stored) == 2 + allowed < 2 + 3 * len(WIDTHS)


def test_one_loader_reads_pruned_and_quantized_networks(tmp_path):
    algorithm, x = trained("DQMQ"), torch.rand(4, 3, 8, 8)
    packed.save(tmp_path / "network.safetensors", algorithm)
    with torch.no_grad():
        expected = packed.load(tmp_path / "network.safetensors")(x)
        assert torch.equal(files.load(tmp_path / "network.safetensors")(x), expected)


def test_networks_that_cannot_be_quantized():
    """Weights that are standardised first, and images that are cut into windows where a width goes to an image."""
    pytest.importorskip("timm", reason="timm is not installed")

    def build(name, backbone, side):
        overrides = {"backbone": backbone, "weights": "none", "image_size": side}
        values = hparams.resolve_hparams(name, "PACS", overrides=overrides)
        return registry.get(name).cls((3, side, side), 7, 3, values)

    with pytest.raises(UserError, match="transforms its weight"):
        build("UniformQuant", "resnetv2_50x1_bit", 32)
    with pytest.raises(UserError, match="reads each in 64 windows"):
        build("DQMQ", "swin_tiny_patch4_window7_224", 224)


def test_budgets_between_two_assignments_are_refused_where_all_images_are_alike():
    for name, target, refused in (
        ("StaticMixedPrecision", 0.1566, False),
        ("StaticMixedPrecision", 0.168, True),
        ("DQMQ", 0.168, False),
    ):
        with pytest.raises(UserError, match=r"take 0\.1566 or 0\.1689 of") if refused else nullcontext():
            make(name, target_bitops=target)


def test_files_that_are_none_of_ours(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    packed.save(tmp_path / "network.safetensors", trained("UniformQuant", bits=3))
    with safe_open(tmp_path / "network.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors["integers/0.conv2/3"]
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    for name, words in (("text", "not a quantized"), ("other.safetensors", "not a quantized"), ("none", "no file"),
                        ("damaged.safetensors", "not a whole quantized network")):  # fmt: skip
        with pytest.raises(UserError, match=words) as raised:
            packed.load(tmp_path / name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, overrides",
    [("UniformQuant", {"bits": 3}), ("StaticMixedPrecision", {"target_bitops": 0.3})],
)
def test_onnx_predicts_as_we_do(tmp_path, name, overrides):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    algorithm = trained(name, **overrides)
    packed.save_onnx(tmp_path / "network.onnx", algorithm)
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    ours = algorithm.predict(images()).detach()
    theirs = torch.from_numpy(session.run(None, {"images": images().numpy()})[0])
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    assert (ours - theirs).abs().mean() < 1e-2 * ours.abs().mean()
    # Integers are stored, not floating-point weights.
    weights = sum(layer.layer.weight.numel() for layer in algorithm.layers.values())
    assert (tmp_path / "network.onnx").stat().st_size < 0.8 * weights + 100_000


def test_onnx_refuses_to_decide_by_sample(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    algorithm = contract.make("DQMQ")
    algorithm.step = contract.STEPS  # behind the stage at 8 bits
    with pytest.raises(UserError, match="chooses bit-widths sample by sample"):
        packed.save_onnx(tmp_path / "network.onnx", algorithm)
    assert not list(tmp_path.iterdir())


def test_onnx_names_the_extra_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(packed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'domainbed_sfp\[export\]'"):
        packed.save_onnx(tmp_path / "network.onnx", trained("UniformQuant", bits=3))
