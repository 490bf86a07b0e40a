"""Learned step size quantization (LSQ; Esser, McKinstry, Bablani, Appuswamy, Modha, ICLR 2020, arXiv 1902.08153)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The narrowest and widest integers there are.
NARROWEST, WIDEST = 2, 8

# Below this a step size would be as good as none; scales are held above it after each step of the optimizer.
SMALLEST_SCALE = 1e-5


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Qn and Qp of the paper: values are quantized to the integers -Qn .. Qp."""
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


# On a CPU the rows of a tensor with more values than CACHED_VALUES are taken a few at a time, so that the dozen passes
# over them hit the cache: half the time where it was measured, 9 million values. Small tensors gain nothing by it.
CACHED_VALUES, CPU_CHUNK_VALUES = 2_000_000, 100_000


class _LSQ(torch.autograd.Function):
    """See `lsq`. One function, so that nothing but the input is kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, low: Tensor, high: Tensor, scale: Tensor, coefficient: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(values, step, low, high, scale)
        rows = (-1, *[1] * (values.dim() - 1))
        out = torch.empty_like(values)
        for part in _chunks(values):
            integers = torch.div(values[part], step[part].view(rows), out=out[part])
            _clip(integers, low[part].view(rows), high[part].view(rows), integers)
            integers.round_().mul_(step[part].view(rows))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, step, low, high, scale = ctx.saved_tensors
        (gradient,) = gradients
        rows = (-1, *[1] * (values.dim() - 1))
        gradient_values = torch.empty_like(values)
        # Inner products of each row: of the gradient with the integers, with v/step, and with v/step inside the range.
        products: list[list[Tensor]] = [[], [], []]
        for part in _chunks(values):
            ratio = values[part] / step[part].view(rows)
            clipped = _clip(ratio, low[part].view(rows), high[part].view(rows), torch.empty_like(ratio))
            # Ones and zeros in floating point, not booleans, which are multiplied several times as slowly.
            is_inside = torch.eq(ratio, clipped, out=torch.empty_like(ratio))
            inside = torch.mul(gradient[part], is_inside, out=gradient_values[part])
            products[0].append(_row_products(gradient[part], clipped.round_()))
            products[1].append(_row_products(inside, ratio))
            if ctx.needs_input_grad[5]:
                products[2].append(_row_products(gradient[part], ratio))
        integers, ratios_inside = torch.cat(products[0]), torch.cat(products[1])
        # d(step * q)/d step is q outside the range and q - v/step inside.
        gradient_step = scale * (integers - ratios_inside)
        gradient_coefficient = step * (integers - torch.cat(products[2])) if ctx.needs_input_grad[5] else None
        return gradient_values, gradient_step, None, None, None, gradient_coefficient


def _clip(values: Tensor, low: Tensor, high: Tensor, out: Tensor) -> Tensor:
    """torch.clamp with bounds for each row, which is several times slower as it is not vectorized for them."""
    torch.maximum(values, low, out=out)
    return torch.minimum(out, high, out=out)


def _chunks(values: Tensor) -> list[slice]:
    """Slices of the rows of `values`."""
    count = len(values)
    if values.device.type != "cpu" or values.numel() <= CACHED_VALUES:
        return [slice(0, count)]
    at_once = max(1, CPU_CHUNK_VALUES * count // values.numel())
    return [slice(start, start + at_once) for start in range(0, count, at_once)]


def lsq(
    values: Tensor, step: Tensor, low: Tensor, high: Tensor, gradient_scale: Tensor, coefficient: Tensor | None = None
) -> Tensor:
    """Quantizes row by row: step * round(clip(values / step, low, high)).

    Backwards, as in the paper (equations 3 and 5): the gradient passes unchanged to values inside the range (its ends
    included) and not to those outside; a step receives round(v/s) - v/s from values inside and the integer bound from
    those outside, times `gradient_scale`.

    Args:
        values: [R, ...], any number of dimensions.
        step, low, high, gradient_scale: [R], one number a row.
        coefficient: [R] or None. Ones whose value is not read: the result counts as v + coefficient * (quantized - v),
            so that a coefficient receives <gradient, quantized - v>, what the error of its row does to the loss.
    """
    return _LSQ.apply(values, step, low, high, gradient_scale, coefficient)


class StepSizes(nn.Module):
    """The step sizes of one tensor, one for every bit-width it may have.

    The paper starts a step at 2 mean|v| / sqrt(Qp) and scales its gradient by 1 / sqrt(N Qp), so that step and weights
    move at the same relative pace under SGD. DomainBed trains with Adam, to which the scale of a gradient is nothing
    and which would move a step of .004 by the learning rate, a quarter of itself, at once. Therefore the parameter is
    not the step but the `level` L in step = 2 L / sqrt(Qp), which starts at mean|v|: Adam moves it relative to itself
    as it moves the weights. The paper's gradient scale is kept.

    Args:
        widths: the bit-widths, ascending.
        signed: whether values may be negative; None finds it out from the first that come.
    """

    signed_top: Tensor
    unsigned_top: Tensor

    def __init__(self, widths: Sequence[int], signed: bool | None = None) -> None:
        super().__init__()
        self.signed = signed
        self.is_ready = False
        self.level = nn.Parameter(torch.ones(len(widths)))
        for name in ("signed_top", "unsigned_top"):
            self.register_buffer(name, torch.ones(len(widths)), persistent=False)
        self.set_widths(widths)

    def set_widths(self, widths: Sequence[int]) -> None:
        """Other widths, as many as there were."""
        self.widths = tuple(widths)
        for tops, kind in ((self.signed_top, True), (self.unsigned_top, False)):
            tops.copy_(torch.tensor([float(integer_range(bits, kind)[1]) for bits in self.widths]))

    @torch.no_grad()
    def initialise(self, values: Tensor) -> None:
        """Takes the levels from `values`, and the sign if it is not known."""
        if self.signed is None:
            self.signed = bool(values.min() < 0)
        self.level.fill_(values.abs().mean().clamp_min(SMALLEST_SCALE))
        self.is_ready = True

    def bounds(self) -> tuple[Tensor, Tensor]:
        """-Qn and Qp of every width, [widths]."""
        if self.signed:
            return -self.signed_top - 1, self.signed_top
        return torch.zeros_like(self.unsigned_top), self.unsigned_top

    def steps(self) -> Tensor:
        """The step sizes, [widths]."""
        return self.level * (2 / self.bounds()[1].sqrt())

    def quantize(self, values: Tensor, choice: Tensor, count: int, coefficient: Tensor | None = None) -> Tensor:
        """`values` [R, ...] quantized with the width of position `choice` [R] each.

        count: N of the paper's gradient scale, the number of weights, or of one sample's features.
        coefficient: see `lsq`.
        """
        low, high = self.bounds()
        scale = 1 / (count * high).sqrt()
        steps = self.steps()
        return lsq(values, steps[choice], low[choice], high[choice], scale[choice], coefficient)

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Holds the levels above zero; called after each step of the optimizer."""
        self.level.clamp_(min=SMALLEST_SCALE)

    def get_extra_state(self) -> dict[str, bool | None]:
        return {"signed": self.signed, "is_ready": self.is_ready}

    def set_extra_state(self, state: Mapping[str, bool]) -> None:
        self.signed, self.is_ready = state["signed"], state["is_ready"]


@torch.no_grad()
def to_integers(values: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """The integers that `lsq` rounds to: int16 of the shape of `values`."""
    below, top = integer_range(bits, signed)
    return (values / step).clamp(-below, top).round().to(torch.int16)


def _row_products(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of the rows of two tensors [R, ...]: [R]."""
    if one.dim() == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in (one, other)):
        one, other = one.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)
    return torch.linalg.vecdot(one.flatten(1), other.flatten(1))
