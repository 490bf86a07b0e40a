"""Depthwise convolutions with wide filters or on small images: PyTorch's values and gradients, first and second."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from domainbed_sfp.networks import convolutions
from domainbed_sfp.networks.convolutions import DepthwiseConv2d, SameConv2d
from domainbed_sfp.networks.efficientnet_lite0 import EfficientNetLite0


@pytest.fixture
def taken(monkeypatch):
    """The shapes of images whose weight gradient was ours."""
    shapes = []
    real = convolutions._weight_gradient

    def counted(x, *arguments):
        shapes.append(tuple(x.shape))
        return real(x, *arguments)

    monkeypatch.setattr(convolutions, "_weight_gradient", counted)
    return shapes


def both(channels, kernel, stride, padding):
    """Ours and PyTorch's layer, with the same weights."""
    ours = DepthwiseConv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
    theirs = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_values_and_gradients_are_pytorchs(data):
    kernel = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    side = st.integers(1, 9)
    height, width = (data.draw(side.filter(lambda n, k=k, p=p: n + 2 * p >= k)) for k, p in zip(kernel, padding))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    memory = data.draw(st.sampled_from([torch.channels_last, torch.contiguous_format]))
    ours, theirs = both(3, kernel, stride, padding)
    x = torch.randn(2, 3, height, width).to(memory_format=memory)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(one), theirs(other)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


def test_second_gradients_are_pytorchs(taken):
    """GraSP takes the gradient of a gradient."""
    torch.manual_seed(0)
    ours, theirs = both(4, 5, 1, 2)
    x = torch.randn(3, 4, 2, 2)
    seconds = []
    for layer in (ours, theirs):
        loss = layer(x).pow(3).sum()
        (first,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(2).sum(), layer.weight)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-3)
    assert taken


def test_only_where_it_is_slow(taken):
    def backward(layer, x):
        layer(x).sum().backward()
        return len(taken)

    narrow, _ = both(4, 3, 1, 1)
    assert backward(narrow, torch.randn(2, 4, 3, 3)) == 0  # as large as the filter
    assert backward(narrow, torch.randn(2, 4, 2, 2)) == 1
    wide, _ = both(4, 5, 1, 2)
    assert backward(wide, torch.randn(2, 4, 9, 9)) == 2
    wide.eval()
    assert backward(wide, torch.randn(2, 4, 9, 9)) == 2
    wide.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backward(wide, torch.randn(2, 4, 9, 9)) == 2
    assert backward(wide.double(), torch.randn(2, 4, 9, 9).double()) == 2


def test_lite0_takes_it_for_wide_filters_and_small_images(taken):
    network = EfficientNetLite0()
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    # Nine blocks have 5 x 5 filters, and the last one reads 2 x 2 pixels with 3 x 3.
    assert len(taken) == 10 and taken[0][2] == 2
    taken.clear()
    network(torch.randn(1, 3, 224, 224)).sum().backward()
    assert len(taken) == 9


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 2), (3, 3)])
def test_same_padding_in_training_and_evaluation(side, kernel, stride):
    """The gradient that skips the copy is that of the padding written out, the second one as well."""
    torch.manual_seed(0)
    layer = SameConv2d(2, 3, kernel, stride).double()
    x = torch.randn(2, 2, side, side, dtype=torch.double, requires_grad=True)
    assert torch.equal(layer(x), layer.eval()(x))
    assert layer(x).shape[2] == -(-side // stride)
    layer.train()
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
