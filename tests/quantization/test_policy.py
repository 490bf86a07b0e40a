"""The policy of bit-widths: its draws, its gradients by enumeration."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from quantized_runs import trained
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.deploy import packed
from domainbed_sfp.networks.precision import choose_precision
from domainbed_sfp.quantization.bitops import fit_shifts
from domainbed_sfp.quantization.layers import Control, QuantizedLayer
from domainbed_sfp.quantization.policy import (
    WIDTHS,
    Policy,
    _Bounded,
    common_uniforms,
    log_probabilities,
    reinforce,
    straight_through,
)
from domainbed_sfp.training import hparams

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
