"""Quantized algorithms on small images."""

from __future__ import annotations

import functools

import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.plugins import contract
from domainbed_sfp.quantization.quantizers import integer_range, lsq
from domainbed_sfp.training import hparams


def run_lsq(values, step, bits, signed, scale=1.0, coefficient=None):
    below, top = integer_range(bits, signed)
    one = torch.ones(1, dtype=values.dtype)
    return lsq(values[None], step[None], -below * one, top * one, scale * one, coefficient)[0]


def make(name, **overrides):
    values = hparams.resolve_hparams(name, "FullColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    return registry.get(name).cls((3, 8, 8), 10, 2, values)


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
