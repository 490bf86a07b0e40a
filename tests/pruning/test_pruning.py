"""Schedules, scores, masks, structure and accounting on cases small enough to do by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.convolutions import SameConv2d
from domainbed_sfp.pruning.costs import count_positions, measure_cost, sparsities_of
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups
from domainbed_sfp.pruning.masks import keep_highest, lower_channels
from domainbed_sfp.pruning.schedules import CubicSchedule
from domainbed_sfp.pruning.scores import by_group, channel_magnitude, prunable_weights, random_like, weight_magnitude
from domainbed_sfp.pruning.state import Masks
from domainbed_sfp.training import hparams


def test_cubic_schedule_by_hand():
    schedule = CubicSchedule(0.8, 0.1, 0.5)
    assert [schedule.at(step, 100) for step in (0, 10, 50, 99)] == [0.0, 0.0, 0.8, 0.8]
    assert schedule.at(30, 100) == pytest.approx(0.8 * (1 - 0.5**3))
    assert schedule.at(20, 100) == pytest.approx(0.8 * (1 - 0.75**3))


@given(st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1), st.integers(1, 400))
def test_cubic_schedule_rises_and_arrives_within_the_run(sparsity, a, b, total):
    schedule = CubicSchedule(sparsity, min(a, b), max(a, b))
    values = [schedule.at(step, total) for step in range(total)]
    assert values == sorted(values) and values[-1] == sparsity and all(0 <= v <= sparsity for v in values)


@pytest.mark.parametrize(
    "overrides, part",
    [
        ({"sparsity": 1.0}, "'sparsity'.*1.0"),
        ({"sparsity": -0.1}, "'sparsity'.*-0.1"),
        ({"prune_start": 0.6, "prune_end": 0.5}, "ends before"),
        ({"prune_end": 1.5}, "'prune_end'.*1.5"),
    ],
)
def test_impossible_schedules_are_refused(overrides, part):
    with pytest.raises(UserError, match=part):
        _train("Magnitude", 1, **overrides)


def test_keep_highest_by_hand():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0, 4.0]), "b": torch.tensor([[0.1, 0.3], [0.2, 0.4]])}
    layer = keep_highest(scores, 0.5, "layer")
    assert layer["a"].tolist() == [True, False, False, True]
    assert layer["b"].tolist() == [[False, True], [False, True]]
    scores["b"] += 0.9
    everything = keep_highest(scores, 0.5, "global")
    assert everything["a"].tolist() == [True, False, True, True]  # 1.0, 1.1 x, 1.2, 1.3 x are the lowest
    assert everything["b"].tolist() == [[False, False], [False, True]]


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_keep_highest_removes_the_lowest_fraction(n, sparsity):
    scores = {"a": torch.rand(n, generator=torch.Generator().manual_seed(n))}
    keep = keep_highest(scores, sparsity)["a"]
    removed = n - int(keep.sum())
    assert removed == min(round(sparsity * n), n - 1)
    if removed:
        assert scores["a"][~keep].max() < scores["a"][keep].min()


def test_global_pruning_that_wipes_out_a_layer_names_it():
    with pytest.raises(UserError, match="'small'"):
        keep_highest({"small": torch.zeros(3), "large": torch.ones(9)}, 0.5, "global")


def test_masks_check_themselves():
    masks = Masks({"conv.weight": torch.Size([2, 2])})
    masks.set("conv.weight", torch.tensor([[True, False], [True, True]]))
    weight = torch.full((2, 2), 3.0)
    masks.zero_dead({"conv.weight": weight})
    assert weight.tolist() == [[3, 0], [3, 3]]
    with pytest.raises(UserError, match=r"another network.*\(3,\).*\(2, 2\)"):
        masks.set("conv.weight", torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="no such parameter"):
        masks.set("other", torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(UserError, match=r"wipe out 'conv\.weight'"):
        masks.set("conv.weight", torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        masks.set("conv.weight", torch.ones(2, 2))
    assert masks.as_dict()["conv.weight"].tolist() == [[True, False], [True, True]]


def test_scores_by_hand():
    weight = torch.tensor([[[[3.0]], [[-4.0]]], [[[0.0]], [[1.0]]]])
    group = ChannelGroup("c", 2, ("c.weight", "dw.weight"), (), ())
    norms = by_group(
        channel_magnitude, [group], {"c.weight": weight, "dw.weight": torch.tensor([[[[0.0]]], [[[2.0]]]])}
    )
    assert norms["c"].tolist() == pytest.approx([5.0, 5**0.5])
    assert weight_magnitude(weight).flatten().tolist() == [3, 4, 0, 1]
    torch.manual_seed(0)
    first = random_like({"a": torch.Size([5])}, torch.device("cpu"))["a"]
    assert first.min() >= 0 and first.max() <= 1 and len(set(first.tolist())) == 5


def _featurizer(backbone: str) -> networks.Featurizer:
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": backbone, "weights": "none"})
    torch.manual_seed(0)
    return networks.make_featurizer((3, 32, 32), values)


# Channels that structured pruning may remove, counted by hand from the architectures: the convolutions inside ResNet's
# blocks (and ResNet-50's stem, which no addition reaches); Lite0's stem, hidden channels, and the outputs that no
# addition reaches (16, 320, 1280).
BLOCK_INTERNAL = {
    "mnist_cnn": [64, 128, 128, 128],
    "resnet18": [64, 64, 128, 128, 256, 256, 512, 512],
    "resnet50": [64, *[64] * 6, *[128] * 8, *[256] * 12, *[512] * 6],
    "efficientnet_lite0": [32, 16, 96, 144, 144, 240, 240, *[480] * 3, *[672] * 3, *[1152] * 4, 320, 1280],
}

# The same with residual streams, each where its first convolution stands: a stream is what the stages of a network pass
# from block to block.
WITH_STREAMS = {
    "resnet18": [64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512],
    "resnet50": [64, 64, 64, 256, *[64] * 4, 128, 128, 512, *[128] * 6, 256, 256, 1024, *[256] * 10, 512, 512, 2048, *[512] * 4],
    "efficientnet_lite0": [32, 16, 96, 24, 144, 144, 40, 240, 240, 80, *[480] * 3, 112, *[672] * 3, 192, *[1152] * 4, 320, 1280],
}  # fmt: skip


@pytest.mark.parametrize("backbone", BLOCK_INTERNAL)
def test_channel_groups(backbone):
    featurizer = _featurizer(backbone)
    groups = channel_groups(featurizer, nn.Linear(featurizer.n_outputs, 7))
    assert [group.channels for group in groups] == BLOCK_INTERNAL[backbone]
    if backbone == "efficientnet_lite0":
        hidden = groups[2]
        assert hidden.filters == (
            "featurizer.network.blocks.1.expand_conv.weight",
            "featurizer.network.blocks.1.depthwise_conv.weight",
        )
        assert hidden.readers == ("featurizer.network.blocks.1.project_conv.weight",)
        assert groups[-1].readers == ("classifier.weight",)


@pytest.mark.parametrize("backbone", WITH_STREAMS)
def test_channel_groups_with_residual_streams(backbone):
    featurizer = _featurizer(backbone)
    classifier = nn.Linear(featurizer.n_outputs, 7)
    groups = channel_groups(featurizer, classifier, residual_streams=True)
    assert [group.channels for group in groups] == WITH_STREAMS[backbone]
    assert [group for group in groups if not group.is_residual] == channel_groups(featurizer, classifier)
    if backbone == "resnet18":
        stem, last = groups[0], groups[-2]
        assert set(stem.filters) == {
            f"featurizer.network.{name}.weight" for name in ("conv1", "layer1.0.conv2", "layer1.1.conv2")
        }
        assert stem.readers == tuple(
            f"featurizer.network.{name}.weight"
            for name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
        )
        assert set(last.vectors) == {
            f"featurizer.network.layer4.{name}.{part}"
            for name in ("0.bn2", "0.downsample.1", "1.bn2")
            for part in ("weight", "bias")
        }
        assert last.readers == ("featurizer.network.layer4.1.conv1.weight", "classifier.weight")


@pytest.mark.parametrize(
    "backbone, streams", [*((name, False) for name in BLOCK_INTERNAL), *((name, True) for name in WITH_STREAMS)]
)
def test_a_dead_channel_cannot_be_heard(backbone, streams):
    """After masking, whatever the dead filters, their normalization's statistics and the weights that read them were,
    the logits are those of a network in which they are different: nothing passes through a dead channel."""
    featurizer, classifier = _featurizer(backbone), nn.Linear(_featurizer(backbone).n_outputs, 7)
    model = nn.ModuleDict({"featurizer": featurizer, "classifier": classifier}).eval()
    groups = channel_groups(featurizer, classifier, residual_streams=streams)
    alive = {group.name: torch.arange(group.channels) % 2 == 0 for group in groups}
    parameters = dict(model.named_parameters())
    shapes = {name: value.shape for name, value in parameters.items()}
    masks = lower_channels(groups, alive, shapes, torch.device("cpu"))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
        x = torch.randn(2, 3, 32, 32)
        expected = classifier(featurizer(x))
        for group in groups:  # the weights that read dead channels are dead; change them, nothing may happen
            for name in group.readers:
                columns = (~alive[group.name]).repeat_interleave(shapes[name][1] // group.channels)
                parameters[name][:, columns] = 100.0
        assert torch.allclose(classifier(featurizer(x)), expected, atol=1e-4)
        assert not torch.allclose(expected, torch.zeros_like(expected))


def test_channel_groups_of_a_traced_timm_network():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert timm
    featurizer = _featurizer("mobilenetv2_100")
    groups = channel_groups(featurizer, nn.Linear(featurizer.n_outputs, 7))
    assert len(groups) > 16 and all(len(group.readers) for group in groups)


def test_a_network_that_cannot_be_followed_is_refused():
    class Untraceable(networks.Featurizer):
        def features(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    class NoChannels(networks.Featurizer):
        def features(self, x):
            return x.mean((2, 3))

    with pytest.raises(UserError, match="granularity 'weight'"):
        channel_groups(Untraceable(), nn.Linear(3, 2))
    with pytest.raises(UserError, match="no channels"):
        channel_groups(NoChannels(), nn.Linear(3, 2))


class _Net(networks.Featurizer):
    """Layers by name, and what the features are made of them."""

    def __init__(self, features, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.made = features

    def features(self, x):
        return self.made(self, x)


class _Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=self.padding)


def _removable(features, head=8, **layers):
    """The names of the groups of a network, which runs on images of 8 x 8."""
    net, classifier = _Net(features, **layers), nn.Linear(head, 2)
    classifier(net(torch.randn(2, 3, 8, 8)))
    try:
        return [group.name.removeprefix("featurizer.") for group in channel_groups(net, classifier)]
    except UserError as error:
        assert "no channels" in str(error)
        return []


def _conv(inputs=3, outputs=8, kind=nn.Conv2d, **options):
    return kind(inputs, outputs, 3, padding=1, **options)


def _pool(x):
    return x.mean((2, 3))


def test_a_transformed_weight_is_not_prunable():
    """Zeros in a weight that is standardised on its way are no zeros in the arithmetic."""

    def chain(n, x):
        return _pool(n.c(n.b(n.a(x))))

    assert _removable(chain, a=_conv(), b=_conv(8), c=_conv(8)) == ["a", "b", "c"]
    assert _removable(chain, a=_conv(), b=_conv(8, kind=_Standardised), c=_conv(8)) == ["c"]
    assert _removable(chain, a=_conv(), b=nn.utils.parametrizations.weight_norm(_conv(8)), c=_conv(8)) == ["c"]
    assert _removable(chain, a=_conv(), b=SameConv2d(8, 8, 3), c=_conv(8)) == ["a", "b", "c"]
    net = _Net(chain, a=_conv(), b=_conv(8, kind=_Standardised), c=SameConv2d(8, 8, 3))
    assert list(prunable_weights(net)) == ["a.weight", "c.weight"]
    with pytest.raises(UserError, match=r"^Sequential has no weights"):
        prunable_weights(nn.Sequential(_conv(kind=_Standardised), nn.ReLU()))


def test_timms_convolutions():
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d

    same, *standardised = [nn.Sequential(kind(3, 4, 3)) for kind in (Conv2dSame, StdConv2d, ScaledStdConv2d)]
    assert list(prunable_weights(same)) == ["0.weight"]
    for net in standardised:
        with pytest.raises(UserError, match="no weights"):
            prunable_weights(net)
    featurizer = _featurizer("nf_resnet26")
    with pytest.raises(UserError, match="no channels"):
        channel_groups(featurizer, nn.Linear(featurizer.n_outputs, 7))


def test_layers_used_twice_stay_whole():
    assert _removable(lambda n, x: _pool(n.c(n.b(n.b(n.a(x))))), a=_conv(), b=_conv(8), c=_conv(8)) == ["c"]
    norm = nn.BatchNorm2d(8)
    assert _removable(lambda n, x: _pool(n.c(n.n(n.b(n.n(n.a(x)))))), a=_conv(), b=_conv(8), c=_conv(8), n=norm) == [
        "c"
    ]
    tied = _conv(8)
    tied.weight = (first := _conv(8)).weight
    assert _removable(lambda n, x: _pool(n.c(n.t(n.b(n.a(x))))), a=_conv(), b=first, t=tied, c=_conv(8)) == ["c"]
    relu = nn.ReLU()  # owns nothing: may be used often
    assert _removable(lambda n, x: _pool(n.r(n.b(n.r(n.a(x))))), a=_conv(), b=_conv(8), r=relu) == ["a", "b"]


@pytest.mark.parametrize(
    "join",
    [lambda x, y: x * y, lambda x, y: y * x, lambda x, y: x + y, torch.mul, lambda x, y: x.mul(y)],
)
def test_broadcast_operands_stay_whole(join):
    def gated(n, x):
        y = n.a(x)
        return _pool(n.c(join(y, n.gate(y))))

    assert _removable(gated, a=_conv(), gate=_conv(8, 1), c=_conv(8)) == ["c"]


def test_products_with_as_many_channels_are_followed():
    def gated(n, x):
        y = n.a(x)
        return _pool(n.c(y * torch.sigmoid(n.gate(y.mean((2, 3), keepdim=True)))))

    assert _removable(gated, a=_conv(), gate=nn.Conv2d(8, 8, 1), c=_conv(8)) == ["a", "c"]


@pytest.mark.parametrize("shape, followed", [((8, 1, 1), True), ((1,), True), ((1, 8, 1, 1), True), ((1, 1, 1, 1, 1), False)])  # fmt: skip
def test_products_with_parameters(shape, followed):
    """A parameter may scale channels, but not spread a channel over others or move it."""
    scale = nn.Parameter(torch.ones(shape))
    ends = _pool if len(shape) < 5 else lambda x: x[0].mean((2, 3))
    layers = {"a": _conv(), "b": _conv(8), "scale": scale}
    assert _removable(lambda n, x: ends(n.b(n.a(x)) * n.scale), **layers) == (["a", "b"] if followed else ["a"])
    one = {"a": _conv(3, 1), "b": _conv(8), "scale": nn.Parameter(torch.ones(8, 1, 1))}
    assert _removable(lambda n, x: _pool(n.b(n.a(x) * n.scale)), **one) == ["b"]


# What follows a convolution of 8 channels on maps of 8 x 8, the features that come out, and whether the channels can be
# told apart in them.
ENDS = {
    "mean": (lambda x: x.mean((2, 3)), 8, True),
    "mean by name": (lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1), 8, True),
    "mean twice": (lambda x: x.mean(3).mean(2), 8, True),
    "mean over channels": (lambda x: x.mean((1, 2)), 8, False),
    "mean over channels, from behind": (lambda x: x.mean((-3, -1)), 8, False),
    "mean, then over channels": (lambda x: x.mean(3).mean(1), 8, False),
    "flatten": (lambda x: torch.flatten(x, 1), 512, True),
    "flatten by name": (lambda x: x.flatten(start_dim=1), 512, True),
    "flatten the map": (lambda x: x.flatten(2).mean(2), 8, True),
    "flatten the batch": (lambda x: torch.flatten(x, 0, 1).mean((1, 2))[:2, None].expand(2, 8), 8, False),
    "view": (lambda x: x.view(x.size(0), -1), 512, True),
    "reshape": (lambda x: x.reshape(x.shape[0], -1), 512, True),
    "reshape to a tuple": (lambda x: torch.reshape(x, (x.size()[0], -1)), 512, True),
    "view of numbers": (lambda x: x.view(2, -1), 512, False),
    "view that splits channels": (lambda x: x.view(x.size(0), 64, -1).mean(2), 64, False),
    "view of another size": (lambda x: x.reshape(x.shape[2] // 4, -1), 512, False),
    "squeeze": (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), 8, True),
    "squeeze anything": (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(), 8, False),
    "squeeze channels": (lambda x: x.squeeze(1).mean((2, 3)), 8, False),
    "permute the map": (lambda x: x.permute(0, 1, 3, 2).mean((2, 3)), 8, True),
    "permute channels": (lambda x: x.permute(0, 2, 1, 3).mean((2, 3)), 8, False),
    "transposed map": (lambda x: x.permute(0, 2, 3, 1).flatten(1), 512, False),
    "pad the map": (lambda x: F.pad(x, (1, 1, 1, 1)).mean((2, 3)), 8, True),
    "pad channels": (lambda x: F.pad(x, (0, 0, 0, 0, 8, 0)).mean((2, 3)), 16, False),
    "softmax": (lambda x: F.softmax(x, 1).mean((2, 3)), 8, False),
}


@pytest.mark.parametrize("end", ENDS)
def test_dimensions_that_move(end):
    features, width, followed = ENDS[end]
    try:
        torch.fx.symbolic_trace(features)
    except TypeError as error:  # `torch.reshape` to a tuple, by torch 2.4
        pytest.skip(f"torch.fx {torch.__version__} does not trace it: {error}")
    found = _removable(lambda n, x: features(n.b(n.a(x))), head=width, a=_conv(), b=_conv(8))
    assert found == (["a", "b"] if followed else ["a"])


@pytest.mark.parametrize(
    "module, width",
    [
        (nn.Softmax(1), 8),
        (nn.LogSoftmax(1), 8),
        (nn.Softmax2d(), 8),
        (nn.GLU(1), 4),
        (nn.Flatten(0, 1), 8),
        (nn.BatchNorm2d(8, affine=False), 8),
    ],
)
def test_modules_that_keep_channels_whole(module, width):
    def features(n, x):
        out = n.m(n.b(n.a(x)))
        return out.mean((2, 3)) if width == 4 or not isinstance(n.m, nn.Flatten) else out[:2, 0]

    assert _removable(features, head=width, a=_conv(), b=_conv(8), m=module) == ["a"]


def test_attention_and_tokens():
    def attended(n, x):
        tokens = n.fc2(F.gelu(n.fc1(n.patch(x).flatten(2).transpose(1, 2))))
        return n.attention(tokens, tokens, tokens)[0].mean(1)

    layers = {"patch": nn.Conv2d(3, 8, 4, 4), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)}
    # Between the two linear layers channels come last, whatever the tensor's other dimensions are.
    assert _removable(attended, **layers, attention=nn.MultiheadAttention(8, 2, batch_first=True)) == ["fc1"]


def test_layers_that_do_not_fit_what_they_read_keep_it_whole():
    # a linear layer along the rows of a map reads no channels, though the numbers agree
    assert _removable(lambda n, x: _pool(n.fc(n.a(x))), a=_conv(), fc=nn.Linear(8, 8)) == []
    # a normalization of flattened maps has a weight for every number, not for every channel
    norm = nn.BatchNorm1d(512)
    assert _removable(lambda n, x: n.n(n.b(n.a(x)).flatten(1)), head=512, a=_conv(), b=_conv(8), n=norm) == ["a"]
    tokens = nn.BatchNorm1d(64)  # tokens in the place of channels
    assert _removable(
        lambda n, x: n.fc2(n.n(n.fc1(n.a(x).flatten(2).transpose(1, 2)))).mean(1), a=_conv(), n=tokens,
        fc1=nn.Linear(8, 64), fc2=nn.Linear(64, 8),
    ) == []  # fmt: skip


def test_outputs_that_are_several_tensors_stay_whole():
    class Pair(networks.Featurizer):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = _conv(), _conv(8), _conv(8)

        def features(self, x):
            x = self.b(self.a(x))
            return _pool(x), _pool(self.c(x))

    assert [group.name for group in channel_groups(Pair(), nn.Linear(8, 2))] == ["featurizer.a"]


def test_the_classifiers_first_linear_layer_reads_the_features():
    net = _Net(lambda n, x: _pool(n.n(n.a(x))), a=_conv(), n=nn.GroupNorm(2, 8))
    (group,) = channel_groups(net, nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    assert group.vectors == ("featurizer.a.bias", "featurizer.n.weight", "featurizer.n.bias")
    assert group.readers == ("classifier.1.weight",)
    for classifier in (nn.Identity(), nn.Linear(12, 2)):  # none, or of something else
        with pytest.raises(UserError, match="no channels"):
            channel_groups(net, classifier)


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


def _train(name: str, steps: int, **overrides):
    values = hparams.resolve_hparams(name, "ColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).cls((2, 8, 8), 2, 2, values)
    algorithm.total_steps = steps
    history = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = [(torch.randn(8, 2, 8, 8), torch.randint(0, 2, (8,))) for _ in range(2)]
        algorithm.update(batch)
        history.append((algorithm.sparsity(), algorithm.masks(), algorithm.at_final_compression()))
    return algorithm, history


@pytest.mark.parametrize("name", ["Magnitude", "Random"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_pruning_follows_the_schedule_and_never_revives(name, granularity):
    algorithm, history = _train(name, 30, granularity=granularity, sparsity=0.5)
    for step, (sparsity, _, final) in enumerate(history):
        assert sparsity == pytest.approx(algorithm.schedule.at(step, 30), abs=0.01)
        assert final == (step >= 24)
    for (_, earlier, _), (_, later, _) in itertools.pairwise(history):
        for key, mask in later.items():
            assert not (mask & ~earlier[key]).any()
    assert all(torch.equal(mask, history[-1][1][key]) for key, mask in history[25][1].items())


def test_magnitude_prunes_the_smallest():
    algorithm, _ = _train("Magnitude", 2, granularity="weight", sparsity=0.6, prune_start=0.0, prune_end=0.0)
    dense, _ = _train("Magnitude", 1, granularity="weight", sparsity=0.0)
    for key, mask in algorithm.masks().items():
        magnitude = dict(dense.named_parameters())[key].detach().abs()
        assert magnitude[~mask].max() <= magnitude[mask].min()


def test_magnitude_and_random_differ():
    (_, a), (_, b) = _train("Magnitude", 4, prune_end=0.5), _train("Random", 4, prune_end=0.5)
    assert any(not torch.equal(a[-1][1][key], b[-1][1][key]) for key in a[-1][1])


def test_masked_channels_stay_silent_in_the_network():
    algorithm, _ = _train("Magnitude", 12, granularity="channel", sparsity=0.5)
    alive = algorithm.unit_masks["featurizer.conv2"]
    out = F.relu(
        algorithm.featurizer.conv2(
            algorithm.featurizer.bn0(F.relu(algorithm.featurizer.conv1(torch.randn(2, 2, 8, 8))))
        )
    )
    assert not algorithm.featurizer.bn1(out)[:, ~alive].any() and alive.sum() == 64


def test_residual_streams_are_pruned_where_asked():
    values = hparams.resolve_hparams(
        "Magnitude",
        "PACS",
        overrides={"backbone": "resnet18", "weights": "none", "prune_residual_streams": True, "prune_end": 0.3},
    )
    algorithm = registry.get("Magnitude").cls((3, 32, 32), 7, 2, values)
    algorithm.total_steps = 4
    for _ in range(4):
        algorithm.update([(torch.randn(4, 3, 32, 32), torch.randint(0, 7, (4,))) for _ in range(2)])
    assert algorithm.sparsity() == 0.5 and all(int(mask.sum()) * 2 == len(mask) for mask in (
        algorithm.unit_masks[group.name] for group in algorithm.groups
    ))  # fmt: skip
    network = algorithm.featurizer.network
    dead = ~algorithm.unit_masks[algorithm.groups[0].name]
    network.eval()
    assert not network.layer1(network.maxpool(F.relu(network.bn1(network.conv1(torch.randn(2, 3, 32, 32))))))[
        :, dead
    ].any()


def test_masks_of_an_algorithm_that_brings_its_own_are_counted_with_residual_streams_only_where_they_are_pruned():
    """A method without `groups`: what a channel's sparsity is a fraction of follows from its masks."""
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": "resnet18", "weights": "none"})
    network = torch.nn.Module()
    network.featurizer = networks.make_featurizer((3, 32, 32), values)
    network.classifier = torch.nn.Linear(network.featurizer.n_outputs, 7)
    network.granularity = "channel"
    parameters = dict(network.named_parameters())
    for streams in (False, True):
        groups = channel_groups(network.featurizer, network.classifier, residual_streams=True)
        total = sum(group.channels for group in groups if streams or not group.is_residual)
        masks = {}
        for group in groups:
            if group.is_residual == streams:
                for name in group.filters:
                    masks[name] = torch.ones_like(parameters[name], dtype=torch.bool)
                    masks[name][::2] = False
        dead = sum(group.channels // 2 for group in groups if group.is_residual == streams)
        assert sparsities_of(network, masks) == {"channel": pytest.approx(dead / total)}


def test_residual_streams_that_cannot_be_pruned():
    with pytest.raises(UserError, match="'prune_residual_streams' is about channels: it needs granularity 'channel'"):
        _train("Magnitude", 1, granularity="weight", prune_residual_streams=True)
    with pytest.raises(UserError, match="'prune_residual_streams': MNIST_CNN has no residual streams"):
        _train("MRM", 1, granularity="channel", prune_residual_streams=True)
    for name in ("RigL", "EVIL", "GlobalPru"):  # of single weights, or of channels inside blocks
        with pytest.raises(UserError, match="prune_residual_streams"):
            hparams.resolve_hparams(name, "PACS", overrides={"prune_residual_streams": True})
