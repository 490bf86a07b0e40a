"""Which channels go together, and which must stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import _featurizer
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.convolutions import SameConv2d
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.pruning.masks import lower_channels
from domainbed_sfp.pruning.scores import prunable_weights

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
