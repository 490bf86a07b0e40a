"""Depthwise convolutions whose weight gradient is not slow where the image is smaller than the kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with one filter a channel and no bias; the same values and gradients.

    On a CPU oneDNN has no kernel for the weight gradient of an image smaller than the filter, which is what the last
    layers of a network see at a low resolution, and takes ten times as long for it as a plain sum over the filter's
    taps: two fifths of EfficientNet-Lite0's training step at 64 px where it was measured. There, and in single
    precision alone, the sum is taken.
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
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


class SameDepthwiseConv2d(SameConv2d, DepthwiseConv2d):
    """SameConv2d with one filter a channel."""


def _is_slow(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> bool:
    sides = [_outputs(x.shape[2 + at], weight.shape[2 + at], stride[at], padding[at]) for at in (0, 1)]
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and weight.requires_grad
        and all(0 < side < kernel for side, kernel in zip(sides, weight.shape[2:]))
    )


def _outputs(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


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
            of_x = conv2d_input(x.shape, weight, gradient, ctx.stride, ctx.padding, groups=len(weight))
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(x, gradient, weight.shape, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None


def _weight_gradient(x: Tensor, gradient: Tensor, shape: torch.Size, stride: Any, padding: Any) -> Tensor:
    """The gradient [C, 1, kh, kw]: every tap's is the product of the outputs' gradients with the pixels it reads."""
    taps = []
    for row in range(shape[2]):
        outputs_y, inputs_y = _reached(row, x.shape[2], gradient.shape[2], stride[0], padding[0])
        for column in range(shape[3]):
            outputs_x, inputs_x = _reached(column, x.shape[3], gradient.shape[3], stride[1], padding[1])
            products = x[:, :, inputs_y, inputs_x] * gradient[:, :, outputs_y, outputs_x]
            taps.append(products.sum((0, 2, 3)))
    return torch.stack(taps, 1).view(shape)


def _reached(tap: int, inputs: int, outputs: int, stride: int, padding: int) -> tuple[slice, slice]:
    """The outputs for which a tap lies on the image and not on its padding, and the pixels it reads for them."""
    first = max(0, -((tap - padding) // stride))
    last = min(outputs - 1, (inputs - 1 + padding - tap) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + tap - padding
    return slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride)
