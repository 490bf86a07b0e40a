"""Dead channels physically gone: logits stay, costs are those claimed."""

from __future__ import annotations

import pytest
import torch
from exported_networks import CLASSES, images, make, mask
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as tensors_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed_sfp import networks
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.deploy import exported, shrink
from domainbed_sfp.pruning import costs
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.training import hparams

pytest.importorskip("torch_pruning", reason="the extra `export` is not installed")


# Backbone and side of its images.
ARCHITECTURES = [
    ("mnist_cnn", 8), ("mnist_cnn_bn", 28), ("resnet18", 32), ("resnet50", 32), ("efficientnet_lite0", 33),
    ("mobilenetv3_small_100", 32), ("convnext_atto", 32),
]  # fmt: skip


# Those with residual streams that may be pruned.
STREAMS = ("resnet18", "resnet50", "efficientnet_lite0", "mobilenetv3_small_100")


def through_a_file(network: exported.ExportedNetwork, backbone: str, size: int, **options) -> exported.ExportedNetwork:
    description = exported.Description(
        backbone, (3, size, size), CLASSES, group_norms=shrink.surviving_groups(network), **options
    )
    data = exported.to_bytes(network, description)
    return exported.rebuild(exported.Description.from_json(description.to_json()), tensors_of(data))


@pytest.mark.parametrize(
    "backbone, size, streams",
    [*((*case, False) for case in ARCHITECTURES), *((*case, True) for case in ARCHITECTURES if case[0] in STREAMS)],
)
def test_without_dead_channels_the_logits_stay_and_the_costs_are_those_claimed(backbone, size, streams):
    """Parameters by counting tensors, MACs by torch's own counter (2 FLOPs a MAC), bytes by the stored tensors."""
    network = make(backbone, size)
    masks = mask(network, streams=streams)
    pruned, dead = shrink.remove_channels(network, masks, (3, size, size))
    rebuilt = through_a_file(pruned, backbone, size)
    x = images(size)
    with torch.no_grad():
        expected = network(x)
        assert expected.abs().max() > 0.01  # not merely both zero
        assert torch.allclose(pruned(x), expected, atol=1e-5)
        assert torch.equal(rebuilt(x), pruned(x))

    plain = exported.ExportedNetwork(network[0], network[1])
    positions = costs.count_positions(plain, (3, size, size))
    claimed = costs.measure_cost(dict(plain.named_parameters()), positions, masks)
    assert sum(value.numel() for value in rebuilt.parameters()) == claimed.surviving_parameters < claimed.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rebuilt(x[:1])
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts.pop("aten.convolution") + counts.pop("aten.addmm") == 2 * claimed.macs
    # All else that is counted: which group a channel of a GroupNorm is of.
    assert sum(counts.values()) == sum(
        8 * 2 * 4 * module.num_channels for module in rebuilt.modules() if isinstance(module, exported.GroupNormOfSurvivors)
    )  # fmt: skip
    stored = sum(value.numel() * value.element_size() for value in exported.stored_tensors(rebuilt).values())
    assert shrink.exported_bytes(network, masks) == stored
    assert not any((~one).any() for one in shrink.surviving_masks(masks, dead).values())


def test_residual_streams_stay_whole_and_what_is_inside_blocks_is_cut():
    network = make("resnet18", 32)
    pruned, _ = shrink.remove_channels(network, mask(network), (3, 32, 32))
    block = pruned.featurizer.network.layer2[0]
    assert (block.conv1.in_channels, block.conv1.out_channels, block.bn1.num_features) == (64, 64, 64)
    assert (block.conv2.in_channels, block.conv2.out_channels, block.downsample[0].out_channels) == (64, 128, 128)
    lite = make("efficientnet_lite0", 32)
    pruned, _ = shrink.remove_channels(lite, mask(lite), (3, 32, 32))
    block = pruned.featurizer.network.blocks[1]
    assert block.depthwise_conv.weight.shape == (48, 1, 3, 3) and block.depthwise_conv.groups == 48
    assert pruned.featurizer.network.conv_stem.out_channels == 16 and pruned.classifier.in_features == 640


def test_residual_streams_are_cut_where_masks_leave_nothing_of_them():
    network = make("resnet18", 32)
    pruned, _ = shrink.remove_channels(network, mask(network, streams=True), (3, 32, 32))
    block = pruned.featurizer.network.layer2[0]
    assert (block.conv1.in_channels, block.conv1.out_channels) == (32, 64)
    assert (block.conv2.out_channels, block.downsample[0].in_channels, block.downsample[0].out_channels) == (64, 32, 64)
    assert pruned.classifier.in_features == 256


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.booleans(), st.integers(0, 2**32))
def test_any_channels_of_mnist_cnn_can_go(halvings, nonlinear, seed):
    """Groups of GroupNorm keep unequal numbers of channels, some none; the classifier may have one layer or three."""
    network = make("mnist_cnn", 8, nonlinear)
    generator = torch.Generator().manual_seed(seed)
    alive = {}
    for index, group in enumerate(channel_groups(network[0], network[1])):
        kept = torch.rand(group.channels, generator=generator) < 0.5 ** halvings[index % 3]
        kept[torch.randint(group.channels, (1,), generator=generator)] = True
        alive[group.name] = kept
    masks = mask(network, alive)
    pruned, dead = shrink.remove_channels(network, masks, (3, 8, 8))
    assert {e.group.name: (~e.dead).tolist() for e in dead} == {n: a.tolist() for n, a in alive.items() if not a.all()}
    rebuilt = through_a_file(pruned, "mnist_cnn", 8, nonlinear_classifier=nonlinear)
    with torch.no_grad():
        assert torch.allclose(rebuilt(images(8)), network(images(8)), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any), st.floats(-5, 5))
def test_group_norm_counts_what_is_gone(survivors, offset):
    """Against torch's GroupNorm over the same channels with zeros in the places of the others."""
    keep = torch.tensor([place < left for left in survivors for place in range(3)])
    x = torch.zeros(2, 12, 3, 5)
    x[:, keep] = torch.randn(2, sum(survivors), 3, 5, generator=torch.Generator().manual_seed(0)) + offset
    whole, left = nn.GroupNorm(4, 12), exported.GroupNormOfSurvivors(3, survivors, 1e-5)
    with torch.no_grad():
        whole.weight.copy_(torch.linspace(0.5, 2, 12))
        whole.bias.copy_(torch.linspace(-1, 1, 12))
        left.weight.copy_(whole.weight[keep])
        left.bias.copy_(whole.bias[keep])
        assert torch.allclose(left(x[:, keep]), whole(x)[:, keep], atol=1e-4)
        flat = x.flatten(2)
        assert torch.allclose(left(flat[:, keep]), whole(flat)[:, keep], atol=1e-4)


def test_masks_of_single_weights_take_nothing_out():
    network = make("mnist_cnn", 8)
    dense = shrink.exported_bytes(network, {})
    masks = {"featurizer.conv2.weight": torch.rand(128, 64, 3, 3) < 0.3}
    masks["featurizer.conv2.weight"][:7] = False  # whole filters even: their biases live
    pruned, dead = shrink.remove_channels(network, masks, (3, 8, 8))
    assert not dead and shrink.exported_bytes(network, masks) == dense
    assert torch.equal(shrink.surviving_masks(masks, dead)["featurizer.conv2.weight"], masks["featurizer.conv2.weight"])
    assert torch.equal(pruned(images(8)), network(images(8)))


def test_what_does_not_fit_is_refused(monkeypatch):
    network = make("mnist_cnn", 8)
    masks = mask(network)
    with pytest.raises(UserError, match=r"another network.*no parameter 'featurizer\.layer1'"):
        shrink.remove_channels(network, {"featurizer.layer1": torch.zeros(3, dtype=torch.bool)}, (3, 8, 8))
    with pytest.raises(
        UserError, match=r"another network.*'featurizer\.conv1\.bias' has shape \(3,\), expected \(64,\)"
    ):
        shrink.remove_channels(network, {"featurizer.conv1.bias": torch.zeros(3, dtype=torch.bool)}, (3, 8, 8))
    with pytest.raises(UserError, match=r"nn\.Sequential\(featurizer, classifier\).*Linear"):
        shrink.remove_channels(nn.Linear(2, 2), {}, (2,))
    groups = channel_groups(network[0], network[1])
    wrong = shrink.ChannelGroup(groups[0].name, 64, groups[0].filters, groups[0].vectors[:1], groups[0].readers)
    with monkeypatch.context() as patch:
        patch.setattr(shrink, "channel_groups", lambda *parts, **options: [wrong])
        with pytest.raises(UserError, match=r"disagree.*'featurizer\.conv1'.*featurizer\.bn0"):
            shrink.remove_channels(network, masks, (3, 8, 8))
    monkeypatch.setattr(shrink, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'domainbed_sfp\[export\]'"):
        shrink.remove_channels(network, masks, (3, 8, 8))
    assert shrink.exported_bytes(network, masks) < shrink.exported_bytes(network, {})  # the extra is not needed


def test_backbones_are_rebuilt_without_a_download(monkeypatch):
    """And with the input scaling that their weights ask for."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"resnet50_augmix": False, "resnet18": True})
    with networks.without_weights():
        networks.make_featurizer((3, 32, 32), values)
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    values["backbone"] = "tf_efficientnet_lite0"  # trained on [-1, 1]
    with networks.without_weights():
        featurizer = networks.make_featurizer((3, 32, 32), values)
    assert featurizer.rescale and featurizer.input_scale.flatten().tolist() == pytest.approx([0.458, 0.448, 0.45])
