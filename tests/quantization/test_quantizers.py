"""LSQ against the formulas of the paper: by hand and by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from quantized_runs import run_lsq

from domainbed_sfp.quantization.quantizers import StepSizes, integer_range, lsq

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
