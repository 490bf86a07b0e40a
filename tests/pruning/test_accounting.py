"""Parameters and MACs by hand and against torch's counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import _featurizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed_sfp.pruning.costs import count_positions, measure_cost
from domainbed_sfp.pruning.scores import prunable_weights


def test_costs_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 16, 2))
    positions = count_positions(net, (3, 4, 4))
    assert positions == {"0.weight": 16, "2.weight": 1}
    parameters = dict(net.named_parameters())
    dense = measure_cost(parameters, positions, {})
    assert (dense.parameters, dense.surviving_parameters) == (108 + 128 + 2,) * 2
    assert dense.dense_macs == dense.macs == 108 * 16 + 128
    dead = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    dead[0] = False
    masked = measure_cost(parameters, positions, {"0.weight": dead})
    assert masked.surviving_parameters == dense.parameters - 27
    assert masked.macs == dense.macs - 27 * 16 and masked.dense_macs == dense.dense_macs


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0", "mnist_cnn"])
def test_macs_agree_with_torchs_counter(backbone):
    featurizer = _featurizer(backbone).eval()
    ours = sum(
        dict(featurizer.named_parameters())[name].numel() * used
        for name, used in count_positions(featurizer, (3, 32, 32)).items()
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        featurizer(torch.zeros(1, 3, 32, 32))
    assert 2 * ours == counter.get_total_flops()  # torch counts a multiply-accumulate as two


class _Attention(nn.Module):
    """A ViT's block on 16 tokens: its linear layers work on every token."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv, self.out = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.head((x + self.down(F.gelu(self.up(x))))[:, 0])


class _ConvNeXt(nn.Module):
    """A ConvNeXt's block: its linear layers work on maps with channels last."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(self.depthwise(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class _Windows(nn.Module):
    """Halves of an image as a batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stem(torch.cat(x.chunk(2, 2))).mean((2, 3)))


@pytest.mark.parametrize("kind", [_Attention, _ConvNeXt, _Windows])
def test_macs_of_linear_layers_on_maps_and_tokens(kind):
    net = kind().eval()
    parameters = dict(net.named_parameters())
    ours = sum(parameters[name].numel() * used for name, used in count_positions(net, (3, 8, 8)).items())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 8, 8))
    counted = counter.get_flop_counts()["Global"]
    # Attention's own products (bmm) multiply no weights.
    layers = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
    assert 2 * ours == sum(flops for operation, flops in counted.items() if operation in layers)


def test_prunable_weights():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    assert list(prunable_weights(net)) == ["0.weight", "3.weight"]
