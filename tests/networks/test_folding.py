"""Frozen BatchNorm folded into convolutions: the values, gradients and training of the network as it is written."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.networks import folding
from domainbed_sfp.networks.convolutions import SameConv2d
from domainbed_sfp.training import hparams

BUILT_IN = ("resnet18", "resnet50", "efficientnet_lite0")
TIMM = ("resnet10t", "mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_b0", "regnetx_002", "regnety_002")


@contextmanager
def unfolded():
    """Networks run as they are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding.Folding, "of", lambda self, network: [])
        yield


def frozen(name, seed=0, **overrides):
    """A frozen featurizer whose BatchNorms say something: statistics, weights and biases as trained ones may be."""
    if name not in BUILT_IN:
        pytest.importorskip("timm", reason="timm is not installed")
    overrides = {"weights": "none", "backbone": name, "freeze_bn": True, "resnet_dropout": 0.0, **overrides}
    values = hparams.resolve_hparams("ERM", "PACS", overrides=overrides)
    torch.manual_seed(seed)
    net = networks.make_featurizer((3, 64, 64), values)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            speak(module)
    return net


def speak(norm):
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("name", [*BUILT_IN, *TIMM])
def test_values_and_gradients_are_those_of_the_network_as_written(name):
    net = frozen(name)
    if name in ("mobilenetv3_small_050", "efficientnet_b0"):
        net.eval()  # dropout and stochastic depth
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = net(x)
        with unfolded():
            expected = net(x)
    assert relative(found, expected) < 1e-5 and not torch.equal(found, expected)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(net.folding.of(net.network)) == len(norms)  # all of them
    # Of gradients in double precision: in single, many a ReLU is open in one and closed in the other.
    net, x = net.double(), x.double()
    net(x).square().mean().backward()
    gradients = {key: p.grad for key, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    with unfolded():
        net(x).square().mean().backward()
    for key, parameter in net.named_parameters():
        assert relative(gradients[key], parameter.grad) < 1e-9, key


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_after_ten_steps(name):
    """In double precision rounding does not grow: the two go the same way."""

    def trained():
        net = frozen(name).double()
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(10):
            x = torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.double)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return net.state_dict()

    found = trained()
    with unfolded():
        expected = trained()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert relative(found[key].double(), value.double()) < 1e-8, key


def test_training_batchnorm_is_left_alone():
    net = frozen("resnet18", freeze_bn=False)
    x = torch.randn(2, 3, 32, 32)
    found = copy.deepcopy(net)(x)
    with unfolded():
        assert torch.equal(found, copy.deepcopy(net)(x))
    one = frozen("resnet18")
    one.network.bn1.train()
    before = one.network.bn1.running_mean.clone()
    one(x)
    assert not torch.equal(one.network.bn1.running_mean, before)
    assert torch.equal(one.eval()(x), one(x))


def test_nothing_stays_behind():
    net = frozen("resnet18")
    state, x = copy.deepcopy(net.state_dict()), torch.randn(2, 3, 32, 32)
    names = [name for name, _ in net.named_parameters()]
    net(x)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 32, 32))
    for module in net.modules():
        assert not {"weight", "bias", "forward"} & set(vars(module))
    assert [name for name, _ in net.named_parameters()] == names
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    with torch.no_grad():
        twin.network.conv1.weight.zero_()
    assert not torch.equal(twin(x), net(x))


def test_dead_channels_stay_zero():
    net = frozen("resnet18")
    block = net.network.layer1[0]
    with torch.no_grad():
        for parameter in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
            parameter[:7] = 0
    seen = []
    block.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(torch.randn(2, 3, 32, 32))
    assert not seen[0][:, :7].any() and seen[0][:, 7:].any()


@pytest.mark.parametrize("place", ["conv1", "bn1"])
def test_hooks_see_what_is_written(place):
    """A hook on what passes between a convolution and its BatchNorm gets it; the others stay folded."""
    net = frozen("resnet18")
    x, seen = torch.randn(2, 3, 32, 32), []
    layer = getattr(net.network, place)
    if place == "conv1":
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    else:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(x)
    with unfolded():
        net(x)
    assert torch.equal(*seen)


def test_layers_put_in_later_are_noticed():
    """A gate, or anything else, between a convolution and its BatchNorm takes the pair apart."""
    net = frozen("resnet18")
    x = torch.randn(2, 3, 32, 32)
    net(x)
    net.network.conv1 = nn.Sequential(net.network.conv1, nn.Tanh())
    found = net(x)
    with unfolded():
        assert relative(found, net(x)) < 1e-5
    assert len(net.folding.pairs) == 19


class Branching(nn.Module):
    """Only `last` has a BatchNorm of its own: others read `first`, and `twice` is called two times."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.last = SameConv2d(4, 4, 3, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        x = self.norms[0](x) + x
        x = self.norms[1](self.twice(x)) + self.norms[2](self.twice(x))
        return self.norms[3](self.last(x)).mean((2, 3))


def test_only_what_nobody_else_reads():
    network = Branching()
    for norm in network.norms:
        speak(norm)
    assert folding.find_pairs(network) == [(network.last, network.norms[3])]
    net = networks.ImageFeaturizer(network, 4, freeze_bn=True, dropout=0.0)
    x = torch.randn(2, 3, 12, 12)
    found = net(x)
    with unfolded():
        assert relative(found, net(x)) < 1e-6


def test_a_bias_and_a_batchnorm_without_weights():
    convolution, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 7, 7)
    weight, bias = folding.folded_parameters(convolution, norm)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm(convolution(x)))


def test_bf16():
    net = frozen("resnet18")
    networks.set_precision(net, "bf16", channels_last=True)
    x = torch.randn(2, 3, 32, 32)
    found = net(x)
    with unfolded():
        assert relative(found, net(x)) < 0.02


@pytest.mark.parametrize("name", ["GlobalPru", "SparseIRM", "SFPWeighted", "DQMQ"])
def test_methods_that_change_the_network_on_the_way(name):
    """Gates, drawn masks, captured inputs and quantized layers: the loss of each step is that of the network as it is
    written."""

    def losses():
        overrides = {"weights": "none", "backbone": "efficientnet_lite0", "freeze_bn": True, "resnet_dropout": 0.0}
        values = hparams.resolve_hparams(name, "PACS", overrides=overrides)
        torch.manual_seed(0)
        algorithm = registry.get(name).cls((3, 32, 32), 4, 2, values)
        algorithm.total_steps = 6
        for module in algorithm.modules():
            if isinstance(module, nn.BatchNorm2d):
                speak(module)
        found = []
        for step in range(6):
            torch.manual_seed(step)
            batch = [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(2)]
            found.append(algorithm.update(batch)["loss"])
        return found

    found = losses()
    with unfolded():
        assert found == pytest.approx(losses(), rel=2e-3)
