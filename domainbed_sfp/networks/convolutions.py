"""Convolutions as MobileNets and their kin have them, without what is slow in PyTorch's own on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

# Filters up to this width have a fast weight gradient in oneDNN.
FAST_WIDTH = 3


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with one filter a channel, zero padding and no dilation; the same values and gradients.

    On a CPU oneDNN's weight gradient of a depthwise convolution is fast for filters of up to three columns on images
    that are at least as large as they are, and takes five to twenty times as long for wider ones, or for smaller
    images (`benchmarks/layers.py`). There, and in single precision alone, it is computed three columns at a time on the
    padded image.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Tracers (ONNX, torch-pruning) look at networks in evaluation mode and find a plain convolution.
        if self.training and _is_slow(input, weight, self.stride, self.padding):
            return _Convolution.apply(input, weight, bias, self.stride, self.padding)
        return super()._conv_forward(input, weight, bias)


class SameConv2d(nn.Conv2d):
    """A strided convolution with TensorFlow's SAME padding, which pads the far side more."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (1, 0):
            size, kernel, stride = x.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        padded = _Pad.apply(x, pads) if self.training else F.pad(x, pads)
        return self._conv_forward(padded, self.weight, self.bias)


class SameDepthwiseConv2d(SameConv2d, DepthwiseConv2d):
    """SameConv2d with one filter a channel."""


def _is_slow(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> bool:
    rows, columns = weight.shape[2:]
    outputs = [(x.shape[2 + at] + 2 * padding[at] - weight.shape[2 + at]) // stride[at] + 1 for at in (0, 1)]
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and weight.requires_grad
        and stride[1] <= FAST_WIDTH
        and min(outputs) > 0
        and (columns > FAST_WIDTH or outputs[0] < rows or outputs[1] < columns)
    )


class _Pad(torch.autograd.Function):
    """F.pad whose gradient is a view of the gradient behind it, not a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pads: list[int]) -> Tensor:
        ctx.pads = pads
        return F.pad(x, pads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        left, right, top, bottom = ctx.pads
        height, width = gradient.shape[2:]
        return gradient[:, :, top : height - bottom, left : width - right], None


class _Convolution(torch.autograd.Function):
    """F.conv2d with groups = channels. The backward pass is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(x, weight, gradient, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(x, gradient, weight.shape, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None


def _input_gradient(x: Tensor, weight: Tensor, gradient: Tensor, stride: Any, padding: Any) -> Tensor:
    """The gradient [N, C, H, W]. Without a stride it is a convolution with the filter turned round: a faster kernel."""
    around = [kernel - 1 - pad for kernel, pad in zip(weight.shape[2:], padding)]
    if tuple(stride) == (1, 1) and min(around) >= 0:
        return F.conv2d(gradient, weight.flip(2, 3), None, 1, around, 1, len(weight))
    return conv2d_input(x.shape, weight, gradient, stride, padding, groups=len(weight))


def _weight_gradient(x: Tensor, gradient: Tensor, shape: torch.Size, stride: Any, padding: Any) -> Tensor:
    """The gradient [C, 1, kh, kw], a few columns of the filter at a time.

    The columns from `start` on see what a narrow filter sees from `start` pixels further on, which is what it does
    where the outputs' gradients lie `start / stride` columns further right, between zeros.
    """
    rows, columns = shape[2:]
    # The narrow filters have no padding of columns; that of rows is slow on images of fewer rows than the filter.
    written = padding[0] if x.shape[2] < rows else 0
    if written or padding[1]:
        x = F.pad(x, (padding[1], padding[1], written, written))
    parts: list[Tensor] = []
    taken = 0
    while taken < columns:
        start = taken - taken % stride[1]
        width = min(FAST_WIDTH, columns - start)
        outputs = (x.shape[3] - width) // stride[1] + 1
        before = start // stride[1]
        moved = F.pad(gradient, (before, outputs - before - gradient.shape[3]))
        unwritten = (padding[0] - written, 0)
        narrow = conv2d_weight(x, (shape[0], 1, rows, width), moved, stride, unwritten, groups=shape[0])
        parts.append(narrow[..., taken - start :])
        taken = start + width
    return torch.cat(parts, 3)
