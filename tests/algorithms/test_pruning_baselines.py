"""Published pruning baselines: every score and update against a case by hand, finite differences or brute force."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning.at_initialization import balanced_batch
from domainbed_sfp.algorithms.pruning.network_slimming import NetworkSlimming
from domainbed_sfp.algorithms.pruning.rigl import RigLSchedule, drop_and_grow, layer_densities
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups
from domainbed_sfp.pruning.masks import keep_highest
from domainbed_sfp.pruning.schedules import OneShotSchedule, RoundSchedule
from domainbed_sfp.pruning.scores import (
    by_group,
    by_weight,
    channel_reader_sums,
    channel_sums,
    channel_taylor,
    connection_sensitivity,
    gradient_flow,
    prunable_weights,
    weight_taylor,
)
from domainbed_sfp.training import hparams

STEPS = 20


def _make(name: str, total_steps: int = STEPS, **overrides):
    values = hparams.resolve_hparams(name, "ColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).cls((2, 8, 8), 2, 2, values)
    algorithm.total_steps = total_steps
    return algorithm


def _batch(step: int, n: int = 8):
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(n, 2, 8, 8, generator=generator), torch.randint(0, 2, (n,), generator=generator)) for _ in range(2)
    ]


def _update(algorithm, step: int):
    torch.manual_seed(step)
    return algorithm.update(_batch(step))


def _tiny_network() -> nn.Sequential:
    """A smooth convolutional network in double precision, small enough for one evaluation per weight."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def _tiny_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


# SNIP ---------------------------------------------------------------------------------------------------------------


def test_connection_sensitivity_is_the_derivative_in_a_mask():
    """Every weight's multiplicative mask, moved by itself."""
    network, (x, y), epsilon = _tiny_network(), _tiny_batch(), 1e-5
    weights = prunable_weights(network)
    scores = connection_sensitivity(network, weights, x, y)

    @torch.no_grad()
    def loss_with(weight, index, mask):
        value = weight.view(-1)[index].clone()
        weight.view(-1)[index] = value * mask
        loss = F.cross_entropy(network(x), y).item()
        weight.view(-1)[index] = value
        return loss

    assert [scores[name].numel() for name in weights] == [18, 24, 36]
    for name, weight in weights.items():
        for index in range(weight.numel()):
            slope = (loss_with(weight, index, 1 + epsilon) - loss_with(weight, index, 1 - epsilon)) / (2 * epsilon)
            assert scores[name].view(-1)[index].item() == pytest.approx(abs(slope), rel=1e-5, abs=1e-9)


def test_snip_ranks_the_untrained_weights_globally():
    """The first step's mask against gradients and a sort written out here; it stays."""
    algorithm = _make("SNIP", granularity="weight", sparsity=0.7)
    twin = copy.deepcopy(algorithm)
    x, y = (torch.cat(part) for part in zip(*_batch(0)))
    losses = F.cross_entropy(twin.predict(x), y, reduction="none")
    assert y.bincount().tolist() != [8, 8]
    torch.stack([losses[y == label].mean() for label in (0, 1)]).mean().backward()
    names = list(algorithm.unit_shapes)
    parameters = dict(twin.named_parameters())
    flat = torch.cat([(parameters[name] * parameters[name].grad).abs().flatten() for name in names])
    threshold = flat.sort().values[round(0.7 * len(flat)) - 1]
    _update(algorithm, 0)
    masks = algorithm.masks()
    assert torch.equal(torch.cat([masks[name].flatten() for name in names]), flat > threshold)
    assert algorithm.sparsity() == pytest.approx(0.7, abs=1e-4) and algorithm.at_final_compression()
    for step in range(1, 4):
        _update(algorithm, step)
    assert all(torch.equal(mask, masks[name]) for name, mask in algorithm.masks().items())


def test_the_network_that_is_pruned_first_trains_without_its_dead_weights():
    """The loss of the very first step is already the masked network's."""
    algorithm = _make("SNIP", granularity="weight", sparsity=0.9)
    masked = copy.deepcopy(algorithm)
    loss = _update(algorithm, 0)["loss"]
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, mask in algorithm.masks().items():
            parameters[name].mul_(mask)
        x, y = (torch.cat(part) for part in zip(*_batch(0)))
        assert loss == pytest.approx(F.cross_entropy(masked.predict(x), y).item(), rel=1e-5)


def test_balanced_batch_by_hand():
    x = torch.arange(9.0).view(9, 1, 1, 1)
    batches = [(x[:5], torch.tensor([0, 0, 0, 2, 2])), (x[5:], torch.tensor([2, 0, 2, 0]))]
    # In turn from both: samples 0 5 1 6 2 7 3 8 4 of classes 0 2 0 0 0 2 2 0 2.
    chosen, y = balanced_batch(batches, 2)
    assert chosen.flatten().tolist() == [0, 5, 1, 7] and y.tolist() == [0, 2, 0, 2]
    chosen, y = balanced_batch([(x[:1], torch.tensor([1]))], 25)
    assert chosen.flatten().tolist() == [0] and y.tolist() == [1]


def test_channel_sums_by_hand():
    group = ChannelGroup("c", 2, ("c.weight", "dw.weight"), (), ())
    scores = {
        "c.weight": torch.tensor([[[[1.0, 2.0]]], [[[-3.0, 0.5]]]]),
        "dw.weight": torch.tensor([[[[4.0]]], [[[5.0]]]]),
    }
    assert channel_sums([group], scores)["c"].tolist() == [7.0, 2.5]


def test_channel_reader_sums_by_hand():
    group = ChannelGroup("c", 2, (), (), ("next.weight", "head.weight"))
    scores = {
        "next.weight": torch.tensor([[[[1.0, 2.0]], [[5.0, 0.5]]], [[[-4.0, 1.0]], [[0.0, 0.25]]]]),
        "head.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),  # two numbers of each channel, channel by channel
    }
    assert channel_reader_sums([group], scores)["c"].tolist() == [0.0 + 3.0, 5.75 + 7.0]


@pytest.mark.parametrize("name", ["SNIP", "GraSP"])
def test_scopes_of_pruning_at_initialization(name):
    assert _make(name, granularity="weight").ranking_scope() == "global"
    assert _make(name, granularity="channel").ranking_scope() == "layer"
    assert _make(name, granularity="channel", pruning_scope="global").ranking_scope() == "global"


def test_a_global_ranking_can_spare_the_best_of_every_layer():
    scores = {"small": torch.tensor([0.0, 0.2, 0.1]), "large": torch.arange(1.0, 8.0)}
    kept = keep_highest(scores, 0.5, "global", spare_best=True)
    assert kept["small"].tolist() == [False, True, False]
    assert kept["large"].tolist() == [False, False, False, True, True, True, True]
    with pytest.raises(UserError, match="'small'"):
        keep_highest(scores, 0.5, "global")


# GraSP --------------------------------------------------------------------------------------------------------------


def test_gradient_flow_against_the_explicit_hessian():
    network, (x, y), temperature = _tiny_network(), _tiny_batch(), 7.0
    weights = prunable_weights(network)
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        parts = (part.view(weight.shape) for part, weight in zip(flat.split(sizes), weights.values()))
        logits = torch.func.functional_call(network, dict(zip(weights, parts)), (x,))
        return F.cross_entropy(logits / temperature, y)

    theta = torch.cat([weight.detach().flatten() for weight in weights.values()])
    gradient = torch.autograd.functional.jacobian(loss, theta)
    hessian = torch.autograd.functional.hessian(loss, theta)
    published = -theta * (hessian @ gradient)  # S, of which the largest go
    scores = torch.cat([score.flatten() for score in gradient_flow(network, weights, x, y, temperature).values()])
    assert torch.allclose(scores, -published, rtol=1e-9, atol=1e-15)
    # The sign, without any derivation: the flow |gradient|^2 changes by 2 S(w) a unit of the way w goes to zero.
    for index in torch.argsort(published)[[0, -1]]:
        step = torch.zeros_like(theta)
        step[index] = -1e-4 * theta[index]
        flows = [torch.autograd.functional.jacobian(loss, theta + side * step).square().sum() for side in (1, -1)]
        assert ((flows[0] - flows[1]) / 2e-4).item() == pytest.approx(2 * published[index].item(), rel=1e-4)


def test_grasps_channels_are_scored_by_what_reads_them():
    """Behind a normalization the sum over a filter would be minus the squared norm of its gradient."""
    algorithm = _make("GraSP", granularity="channel", backbone="mnist_cnn_bn")
    batches = _batch(0)
    x, y = balanced_batch(batches, 25)
    network = copy.deepcopy(algorithm.network)
    weights = {f"featurizer.{key}": value for key, value in prunable_weights(network[0]).items()}
    weights["classifier.weight"] = network[1].weight
    by_weight = gradient_flow(network, weights, x, y, 200.0)
    scores = algorithm.score(batches)
    for group in algorithm.groups:
        (reader,) = group.readers
        assert torch.allclose(scores[group.name], by_weight[reader].transpose(0, 1).flatten(1).sum(1), rtol=1e-4)


def test_grasp_on_networks_without_second_derivatives():
    """Attention has them by one of its kernels; hard sigmoids have none."""
    pytest.importorskip("timm", reason="timm is not installed")
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 2
    for backbone in ("test_vit", "timm:mobilenetv3_small_050"):
        values = hparams.resolve_hparams(
            "GraSP",
            "PACS",
            overrides={"backbone": backbone, "weights": "none", "image_size": 32, "granularity": "weight"},
        )
        algorithm = registry.get("GraSP").cls((3, 32, 32), 2, 2, values)
        algorithm.total_steps = 4
        if backbone == "test_vit":
            algorithm.update([(x, y), (x, y)])
            assert algorithm.sparsity() == pytest.approx(0.5, abs=1e-3)
        else:
            with pytest.raises(UserError, match=r"GraSP needs second derivatives.*hardsigmoid"):
                algorithm.update([(x, y), (x, y)])


def test_grasp_keeps_what_the_gradient_flow_needs():
    """Of the weights, those whose removal would shrink the flow live; 25 samples of a class enter."""
    algorithm = _make("GraSP", granularity="weight", sparsity=0.5)
    network = copy.deepcopy(algorithm.network)
    batch = [(torch.cat([x] * 4), torch.cat([y] * 4)) for x, y in _batch(0)]
    x, y = balanced_batch(batch, 25)
    assert y.bincount().max() == 25
    weights = {f"featurizer.{key}": value for key, value in prunable_weights(network[0]).items()}
    weights["classifier.weight"] = network[1].weight
    scores = gradient_flow(network, weights, x, y, 200.0)
    flat = torch.cat([scores[name].flatten() for name in algorithm.unit_shapes])
    algorithm.update(batch)
    alive = torch.cat([mask.flatten() for mask in algorithm.masks().values()])
    assert flat[alive].min() >= flat[~alive].max()
    assert alive.sum() == len(alive) - round(len(alive) / 2)


# Taylor -------------------------------------------------------------------------------------------------------------


class _TinyFeaturizer(networks.Featurizer):
    """Normalization in front of and a flattened map behind the channels, so that every kind of reader occurs."""

    n_outputs = 12

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.conv2 = nn.Conv2d(4, 3, 2)

    def features(self, x):
        return torch.flatten(torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x))))), 1)


def test_channel_taylor_is_the_first_order_change_of_removing_a_channel():
    """Each channel's output scaled by 1 +- epsilon: finite differences give the change to first order."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"featurizer": _TinyFeaturizer(), "classifier": nn.Linear(12, 3)}).double()
    featurizer, classifier = model["featurizer"], model["classifier"]
    (x, y), epsilon = _tiny_batch(), 1e-6
    groups = channel_groups(featurizer, classifier)
    assert [(group.name, group.readers) for group in groups] == [
        ("featurizer.conv1", ("featurizer.conv2.weight",)),
        ("featurizer.conv2", ("classifier.weight",)),
    ]

    def loss(gates):
        h = torch.relu(featurizer.norm(featurizer.conv1(x))) * gates[0].view(1, -1, 1, 1)
        h = torch.relu(featurizer.conv2(h)) * gates[1].view(1, -1, 1, 1)
        return F.cross_entropy(classifier(h.flatten(1)), y)

    ones = [torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    F.cross_entropy(classifier(featurizer(x)), y).backward()
    scores = by_group(channel_taylor, groups, dict(model.named_parameters()))
    for layer, group in enumerate(groups):
        for channel in range(group.channels):
            with torch.no_grad():
                losses = []
                for side in (epsilon, -epsilon):
                    gates = [gate.clone() for gate in ones]
                    gates[layer][channel] += side
                    losses.append(loss(gates).item())
            slope = (losses[0] - losses[1]) / (2 * epsilon)
            assert scores[group.name][channel].item() == pytest.approx(slope**2, rel=1e-5, abs=1e-12)
    assert min(score.max().item() for score in scores.values()) > 1e-5


def test_weight_taylor_by_hand():
    weight = nn.Parameter(torch.tensor([2.0, -3.0, 0.0]))
    weight.grad = torch.tensor([0.5, 1.0, 4.0])
    unused = nn.Parameter(torch.ones(2))
    scores = by_weight(weight_taylor, {"w": weight, "unused": unused})
    assert scores["w"].tolist() == [1.0, 9.0, 0.0] and scores["unused"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_taylor_averages_over_steps(granularity):
    """Importances of the weights and gradients before each step, of which a tenth enters the average."""
    algorithm = _make("Taylor", granularity=granularity, prune_start=0.9, prune_end=0.9)
    expected: dict[str, torch.Tensor] = {}
    for step in range(3):
        twin = copy.deepcopy(algorithm)
        x, y = (torch.cat(part) for part in zip(*_batch(step)))
        twin.zero_grad()
        F.cross_entropy(twin.predict(x), y).backward()
        parameters = dict(twin.named_parameters())
        if granularity == "channel":
            latest = by_group(channel_taylor, twin.groups, parameters)
        else:
            latest = by_weight(weight_taylor, {name: parameters[name] for name in twin.unit_shapes})
        expected = {name: 0.9 * expected.get(name, torch.zeros(())) + 0.1 * value for name, value in latest.items()}
        _update(algorithm, step)
    for name, score in algorithm.score(_batch(0)).items():
        assert torch.allclose(score, expected[name], rtol=1e-4, atol=1e-12)


# NetworkSlimming ----------------------------------------------------------------------------------------------------


def test_slimming_adds_the_subgradient_until_it_prunes():
    algorithm = _make("NetworkSlimming", slimming_penalty=0.25)
    scale = algorithm.featurizer.bn1.weight
    scale.data[:3] = torch.tensor([2.0, -0.5, 0.0])
    for step, penalty in ((STEPS // 2, [0.35, -0.15, 0.1]), (STEPS // 2 + 1, [0.1, 0.1, 0.1])):
        for parameter in algorithm.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        algorithm.step = step
        algorithm.after_backward()
        assert scale.grad[:3].tolist() == pytest.approx(penalty)
        assert algorithm.featurizer.bn1.bias.grad[:3].tolist() == pytest.approx([0.1] * 3)


def test_slimming_prunes_at_a_global_percentile():
    """Half of all 448 scales: those below the median, wherever they are."""
    algorithm = _make("NetworkSlimming", slimming_penalty=0.0, lr=0.0, sparsity=0.5)
    algorithm.step = STEPS // 2  # where it prunes
    values = torch.randperm(448, generator=torch.Generator().manual_seed(3)) - 224.0
    norms = [algorithm.featurizer.bn0, algorithm.featurizer.bn1, algorithm.featurizer.bn2, algorithm.featurizer.bn3]
    values = values + 0.25  # no two of the same magnitude
    for norm, part in zip(norms, values.split([64, 128, 128, 128])):
        norm.weight.data.copy_(part)
    _update(algorithm, 0)
    threshold = values.abs().sort().values[223]
    alive = torch.cat([algorithm.unit_masks[group.name] for group in algorithm.groups])
    assert torch.equal(alive, values.abs() > threshold)
    assert algorithm.at_final_compression() and algorithm.sparsity() == 0.5


def test_slimming_is_one_shot():
    algorithm = _make("NetworkSlimming")
    history = []
    for step in range(STEPS):
        _update(algorithm, step)
        history.append((algorithm.sparsity(), algorithm.at_final_compression()))
    assert history == [(0.0, False)] * 10 + [(0.5, True)] * 10


def test_slimming_uses_the_last_scale_before_a_channel_is_read():
    values = hparams.resolve_hparams(
        "NetworkSlimming", "PACS", overrides={"backbone": "efficientnet_lite0", "weights": "none"}
    )
    algorithm = NetworkSlimming((3, 32, 32), 7, 3, values)
    assert algorithm.scales["featurizer.network.blocks.1.expand_conv"] == ["featurizer.network.blocks.1.bn1.weight"]
    assert len(algorithm.scales) == len(algorithm.groups) == 19
    assert {len(names) for names in algorithm.scales.values()} == {1}


def test_the_slimming_penalty_is_the_authors_for_each_kind_of_network():
    assert hparams.resolve_hparams("NetworkSlimming", "ColoredMNIST")["slimming_penalty"] == 1e-4
    assert hparams.resolve_hparams("NetworkSlimming", "PACS")["slimming_penalty"] == 1e-5
    given = {"slimming_penalty": 1e-3}
    assert hparams.resolve_hparams("NetworkSlimming", "PACS", overrides=given)["slimming_penalty"] == 1e-3


def test_slimming_ranks_a_residual_stream_by_all_its_scales():
    values = hparams.resolve_hparams(
        "NetworkSlimming", "PACS", overrides={"backbone": "resnet18", "weights": "none", "prune_residual_streams": True}
    )
    algorithm = NetworkSlimming((3, 32, 32), 7, 3, values)
    network = algorithm.featurizer.network
    stream = next(name for name, scales in algorithm.scales.items() if len(scales) == 3 and len(network.bn1.weight) == len(
        algorithm.unit_masks[name]))  # fmt: skip
    for norm, scale in ((network.bn1, 1.0), (network.layer1[0].bn2, -3.0), (network.layer1[1].bn2, 0.5)):
        norm.weight.data[0] = scale
    assert algorithm.score([])[stream][0].item() == 1.5
    algorithm.zero_grad()
    algorithm.total_steps = 10
    algorithm.after_backward()
    penalty = algorithm.hparams["slimming_penalty"]
    assert [norm.weight.grad[0].item() for norm in (network.bn1, network.layer1[0].bn2, network.layer1[1].bn2)] == (
        pytest.approx([penalty, -penalty, penalty])
    )


def test_slimming_refuses_what_has_no_scales(monkeypatch):
    class Plain(networks.Featurizer):
        n_outputs = 4

        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)

        def features(self, x):
            return torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3))

    with pytest.raises(UserError, match="'granularity' of NetworkSlimming is 'weight': it is built in as 'channel'"):
        _make("NetworkSlimming", granularity="weight")
    monkeypatch.setattr(networks, "make_featurizer", lambda shape, values: Plain())
    with pytest.raises(UserError, match="Plain has none on a removable channel"):
        _make("NetworkSlimming")


# RigL ---------------------------------------------------------------------------------------------------------------


def test_drop_and_grow_by_hand():
    weight = torch.tensor([[0.1, -0.9, 0.0], [0.3, 0.0, -0.2]])
    alive = torch.tensor([[True, True, False], [True, False, True]])
    gradient = torch.tensor([[0.0, 9.0, -3.0], [8.0, 1.0, 2.0]])
    # Half of four: .1 and -.2 are dropped; of the gradients 0, -3, 1 and 2 that are not kept, -3 and 2 are largest, so
    # that -.2 returns at once.
    assert drop_and_grow(weight, gradient, alive, 0.5).tolist() == [[False, True, True], [True, False, True]]
    assert drop_and_grow(weight, gradient, alive, 0.49).tolist() == [[False, True, True], [True, False, True]]
    assert torch.equal(drop_and_grow(weight, gradient, alive, 0.2), alive)  # less than one weight
    dense = torch.ones(2, 3, dtype=torch.bool)
    assert drop_and_grow(weight, gradient, dense, 0.5).all()


def test_rigl_schedule_by_hand():
    schedule = RigLSchedule(0.8, 100 / 5001, 0.75, 0.3)
    assert schedule.period(5001) == 100 and schedule.period(300) == 6 and schedule.period(24) == 2
    default = RigLSchedule(0.8, 0.0, 0.75, 0.3)
    assert default.period(5001) == 100 and default.period(300) == 25
    assert [step for step in range(300) if default.moves_at(step, 300)] == list(range(25, 225, 25))
    moves = [step for step in range(5001) if schedule.moves_at(step, 5001)]
    assert moves == list(range(100, 3701, 100))
    assert schedule.last_step(5001) == moves[-1] and schedule.first_step(5001) == 0
    assert len([step for step in range(300) if schedule.moves_at(step, 300)]) == 37  # as many stages
    assert schedule.fraction_at(0, 1000) == pytest.approx(0.3)
    assert schedule.fraction_at(250, 1000) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert schedule.fraction_at(375, 1000) == pytest.approx(0.15)
    assert schedule.fraction_at(750, 1000) == pytest.approx(0.0)
    assert schedule.last_step(2) == 0 and not any(schedule.moves_at(step, 2) for step in range(2))


def test_layer_densities_by_hand():
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([10, 10])}
    # erk: (2 + 3) / 6 and (10 + 10) / 100; at 25% of 106 weights, 26.5 = scale * (5 + 20).
    erk = layer_densities(shapes, 0.25, "erk")
    assert erk == pytest.approx({"a": 1.06 * 5 / 6, "b": 1.06 * 0.2})
    # At 50%, a would need 2.12 * 5 / 6 > 1: it is dense, and b takes 53 - 6 of its 100.
    assert layer_densities(shapes, 0.5, "erk") == pytest.approx({"a": 1.0, "b": 0.47})
    assert layer_densities(shapes, 0.5, "uniform") == pytest.approx({"a": 1.0, "b": 0.47})
    assert layer_densities(shapes, 1.0, "erk") == {"a": 1.0, "b": 1.0}
    with pytest.raises(UserError, match="first layer"):
        layer_densities(shapes, 0.05, "uniform")


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_rigl_keeps_its_sparsity_and_grows_at_zero(distribution):
    algorithm = _make("RigL", sparsity=0.8, sparsity_distribution=distribution, update_interval=0.2)
    parameters = dict(algorithm.named_parameters())
    counts = []
    before = None
    for step in range(STEPS):
        weights = {name: parameters[name].detach().clone() for name in algorithm.unit_shapes}
        _update(algorithm, step)
        masks = algorithm.masks()
        counts.append([int(mask.sum()) for mask in masks.values()])
        assert algorithm.sparsity() == pytest.approx(0.8, abs=1e-4)
        assert algorithm.at_final_compression() == (step >= 12)
        for name, mask in masks.items():
            assert not parameters[name][~mask].any()
            if before is not None and step in (4, 8, 12):  # T_end is step 15
                grown = mask & ~before[name]
                assert not parameters[name][grown].any()
                assert not algorithm.optimizer.state[parameters[name]]["exp_avg"][grown].any()
                assert torch.equal(parameters[name][mask & before[name]], weights[name][mask & before[name]])
            elif before is not None:
                assert torch.equal(mask, before[name])
        if step == 4:
            fraction = 0.15 * (1 + math.cos(math.pi * 4 / 15))
            grown = {name: int((mask & ~before[name]).sum()) for name, mask in masks.items()}
            assert any(grown.values())
            assert all(grown[name] <= int(fraction * before[name].sum()) for name in grown)
        before = masks
    assert all(count == counts[0] for count in counts)


def test_rigl_moves_by_the_dense_gradient():
    """At a moving step, the mask of drop_and_grow on a gradient computed apart; nothing else trains in that step."""
    algorithm = _make("RigL", sparsity=0.8, update_interval=0.1)
    for step in range(2):
        _update(algorithm, step)
    twin = copy.deepcopy(algorithm)
    x, y = (torch.cat(part) for part in zip(*_batch(2)))
    twin.zero_grad()
    F.cross_entropy(twin.predict(x), y).backward()
    fraction = 0.15 * (1 + math.cos(math.pi * 2 / 15))
    _update(algorithm, 2)
    parameters, masks = dict(twin.named_parameters()), twin.masks()
    for name, mask in algorithm.masks().items():
        weight = parameters[name]
        expected = drop_and_grow(weight.detach(), weight.grad, masks[name], fraction)
        assert torch.equal(mask, expected)
        if not mask.all():  # erk leaves the first layer dense here
            assert weight.grad[~masks[name]].any() and not torch.equal(mask, masks[name])
    assert torch.equal(algorithm.classifier.weight, twin.classifier.weight)


def test_rigl_refuses_channels():
    with pytest.raises(UserError, match="'granularity' of RigL is 'channel': it is built in as 'weight'"):
        _make("RigL", granularity="channel")
    for name in ("drop_fraction", "update_interval", "update_end"):
        with pytest.raises(UserError, match=f"{name}.*1.5"):
            _make("RigL", **{name: 1.5})


# LotteryTicket ------------------------------------------------------------------------------------------------------


def test_round_schedule_by_hand():
    schedule = RoundSchedule(sparsity=0.875, rounds=3, end=0.6)
    assert schedule.steps(100) == [20, 40, 60]
    assert [schedule.at(step, 100) for step in (0, 19, 20, 39, 40, 60, 99)] == pytest.approx(
        [0, 0, 0.5, 0.5, 0.75, 0.875, 0.875]
    )
    assert schedule.steps(2) == [0, 1, 1] and schedule.at(1, 2) == 0.875 and schedule.at(0, 2) == pytest.approx(0.5)


def test_one_shot_schedule_by_hand():
    schedule = OneShotSchedule(0.5, 0.25)
    assert [schedule.at(step, 20) for step in (0, 4, 5, 19)] == [0, 0, 0.5, 0.5]
    assert OneShotSchedule(0.5, 1.0).first_step(20) == 19


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_lottery_tickets_rewind_to_the_early_state(granularity):
    """Weights, moments and counters are exactly those before step 3, times the mask, after each of the prunings."""
    algorithm = _make("LotteryTicket", granularity=granularity, sparsity=0.875, rewind=0.15, objective="VREx")
    pruned_at, density = (4, 8, 12), {4: 0.5, 8: 0.25, 12: 0.125}
    early: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        if step == 3:
            early = {name: value.detach().clone() for name, value in algorithm.named_parameters()}
            moments = {
                name: algorithm.optimizer.state[value]["exp_avg_sq"].clone()
                for name, value in algorithm.named_parameters()
            }
        trained = {name: value.detach().clone() for name, value in algorithm.named_parameters()}
        _update(algorithm, step)
        masks = algorithm.masks()
        if step in pruned_at:
            assert 1 - algorithm.sparsity() == pytest.approx(density[step], abs=0.01)
            for name, value in algorithm.named_parameters():
                assert torch.equal(value, early[name] * masks.get(name, torch.ones(())))
                state = algorithm.optimizer.state[value]
                assert state["step"].item() == 3 and torch.equal(state["exp_avg_sq"], moments[name])
            assert int(algorithm.objective.update_count) == 3
        else:
            assert any(not torch.equal(value, trained[name]) for name, value in algorithm.named_parameters())
        assert algorithm.at_final_compression() == (step >= 12)
    assert int(algorithm.objective.update_count) == 3 + STEPS - 13


def test_lottery_tickets_rank_the_trained_weights():
    algorithm = _make("LotteryTicket", granularity="weight", sparsity=0.5, rounds=1, prune_end=0.5, rewind=0.0)
    dense = _make("Magnitude", granularity="weight", sparsity=0.0)
    start = {name: value.detach().clone() for name, value in algorithm.named_parameters()}
    for step in range(11):
        _update(algorithm, step)
        _update(dense, step)
    trained = dict(dense.named_parameters())
    for name, mask in algorithm.masks().items():
        magnitude = trained[name].detach().abs()
        assert magnitude[~mask].max() <= magnitude[mask].min()
        assert torch.equal(dict(algorithm.named_parameters())[name], start[name] * mask)


def test_lottery_tickets_go_on_as_a_masked_network_would():
    """After the last rewinding, training is that of a network that had the mask and the early state all along."""
    algorithm = _make("LotteryTicket", granularity="weight", rounds=1, prune_end=0.5, rewind=0.0)
    start = copy.deepcopy(algorithm.network)
    for step in range(11):
        _update(algorithm, step)
    optimizer = torch.optim.Adam(start.parameters(), lr=algorithm.hparams["lr"])
    named = {f"{part}.{key}": value for part, module in zip(("featurizer", "classifier"), start)
             for key, value in module.named_parameters()}  # fmt: skip
    for step in range(11, 14):
        with torch.no_grad():
            for name, mask in algorithm.masks().items():
                named[name].mul_(mask)
        x, y = (torch.cat(part) for part in zip(*_batch(step)))
        optimizer.zero_grad()
        F.cross_entropy(start(x), y).backward()
        optimizer.step()
        _update(algorithm, step)
    for name, mask in algorithm.masks().items():
        assert torch.allclose(dict(algorithm.named_parameters())[name], named[name] * mask, atol=1e-6)


def test_lottery_tickets_refuse_to_rewind_past_the_first_pruning():
    with pytest.raises(UserError, match=r"'rewind'.*0\.2.*0\.25"):
        _make("LotteryTicket", rewind=0.25)


@pytest.mark.parametrize(
    "name, hparam, value",
    [
        ("GraSP", "grasp_temperature", 0.0),
        ("Taylor", "taylor_momentum", 1.0),
        ("NetworkSlimming", "slimming_penalty", -1.0),
        ("SNIP", "sparsity", 1.0),
        ("LotteryTicket", "rounds", 0),
    ],
)
def test_impossible_values_are_refused(name, hparam, value):
    with pytest.raises(UserError, match=f"'{hparam}'.*{value}"):
        _make(name, **{hparam: value})


def test_an_end_that_leaves_no_retraining_is_refused():
    with pytest.raises(UserError, match=r"'prune_end'.*steps to train what is kept"):
        _make("LotteryTicket", prune_end=1.0)
