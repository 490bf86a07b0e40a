"""Taylor and NetworkSlimming: scores by hand, penalties and percentiles."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from baseline_runs import STEPS, _batch, _make, _tiny_batch, _update
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms.pruning.network_slimming import NetworkSlimming
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.pruning.scores import (
    by_group,
    by_weight,
    channel_taylor,
    weight_taylor,
)
from domainbed_sfp.training import hparams

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
