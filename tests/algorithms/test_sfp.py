"""SFP's parts on cases computed by hand, and the whole on a set whose attribute it must find."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.sfp.algorithm import SFP
from domainbed_sfp.algorithms.sfp.hparams import choices
from domainbed_sfp.algorithms.sfp.removal import Removal, cleared_layers
from domainbed_sfp.algorithms.sfp.statistics import by_image, channel_means
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.loaders import Minibatch
from domainbed_sfp.plugins import contract
from domainbed_sfp.pruning import directions as spurious
from domainbed_sfp.pruning.directions import DECAY, ConditionalMoments, remove_directions, spurious_directions
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.training import hparams
from domainbed_sfp.training import train as training


def moments_of(vectors, labels, flags, with_energy=False):
    moments = ConditionalMoments(int(max(labels)) + 1, len(vectors[0]), with_energy)
    moments.update(torch.tensor(vectors), torch.tensor(labels), torch.tensor(flags))
    return moments


def test_contrast_is_conditional_on_the_class():
    """The attribute (second number) is as frequent among flagged as among unflagged samples, but goes with the other
    class there; the first number is the class itself and cancels."""
    vectors = [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    moments = moments_of(vectors, [0, 0, 1, 1, 0, 1], [True, True, True, True, False, False])
    difference, weights = moments.contrast()
    assert difference.tolist() == [[0.0, -1.0], [0.0, 1.0]]
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert moments.spuriousness().argmax() == 1 and moments.spuriousness()[0] == 0


def test_channels_that_never_fire_are_the_first_to_go():
    """A constant contributes nothing that a bias could not, whatever it is; it must not take the place of a live channel."""
    torch.manual_seed(0)
    vectors = torch.randn(40, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0]) + torch.tensor([0.0, 0.0, 0.0, 3.0])
    labels, flags = torch.arange(40) % 2, torch.arange(40) < 20
    vectors[:, 2] += 5.0 * (flags == (labels == 1))  # spurious, but alive
    spuriousness = moments_of(vectors.tolist(), labels.tolist(), flags.tolist()).spuriousness()
    assert spuriousness.isfinite().all()
    assert spuriousness.argsort(descending=True, stable=True).tolist() == [1, 3, 2, 0]


def test_channels_that_have_died_go_first_though_averages_remember_them():
    torch.manual_seed(0)
    moments = ConditionalMoments(2, 3)
    labels, flags = torch.arange(40) % 2, torch.arange(40) < 20
    spurious = 2.0 * (flags == (labels == 1))[:, None] * torch.tensor([1.0, 0.0, 0.0])
    scale, constant = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 0.0])
    for _ in range(50):
        moments.update(torch.randn(40, 3) * scale + spurious, labels, flags)
    alive = moments.spuriousness()
    for _ in range(10):  # the second one dies: what is left of it is its normalization's bias
        moments.update(
            (torch.randn(40, 3) * scale + spurious) * torch.tensor([1.0, 0.0, 1.0]) + constant, labels, flags
        )
    assert alive.argmax() == 0 and moments.spuriousness().argmax() == 1
    moments.update(torch.randn(40, 3) * scale + spurious, labels, flags)
    assert moments.spuriousness().argmax() == 0


def test_within_class_variance_by_brute_force():
    torch.manual_seed(0)
    vectors, labels, flags = torch.randn(60, 3), torch.randint(0, 2, (60,)), torch.rand(60) < 0.5
    moments = ConditionalMoments(2, 3)
    moments.update(vectors, labels, flags)
    spread = torch.zeros(3)
    for label in (0, 1):
        for flag in (True, False):
            cell = vectors[(labels == label) & (flags == flag)]
            spread += (cell - cell.mean(0)).square().sum(0)
    assert torch.allclose(moments.within_class_variance(), spread / 60, atol=1e-5)


def test_moments_forget():
    moments = moments_of([[2.0]], [0], [True])
    moments.update(torch.tensor([[4.0]]), torch.tensor([0]), torch.tensor([True]))
    assert moments.counts[1, 0].item() == pytest.approx(DECAY + 1)
    assert moments.sums[1, 0].item() == pytest.approx(2 * DECAY + 4)


def test_directions_are_the_differences_weighted_singular_vectors():
    vectors = [[1.0, 3.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    moments = moments_of(vectors, [0, 0, 1, 1], [True, False, True, False], with_energy=True)
    found = spurious_directions(moments, 0.5, 0.0)  # d_0 = (0, 3, 0), d_1 = (0, 0, 1): one direction, the larger
    assert found.shape == (1, 3) and found.abs()[0].tolist() == pytest.approx([0, 1, 0])
    three = [[0.0, 0.0, 0.0, *row] for row in vectors] + [[0.0] * 6, [0.0] * 6]
    both = spurious_directions(moments_of(three, [0, 0, 1, 1, 2, 2], [True, False] * 3, True), 1.0, 0.0)
    assert both.shape == (2, 6) and torch.allclose(both @ both.t(), torch.eye(2), atol=1e-6)


def test_directions_leave_the_layer_its_energy():
    """All inputs along one line: without it nothing would be left, so nothing is taken."""
    collinear = moments_of([[1.0, 1.0], [2.0, 2.0]], [0, 0], [True, False], with_energy=True)
    assert spurious_directions(collinear, 1.0, 0.2).shape == (0, 2)
    assert spurious_directions(collinear, 1.0, -0.01).shape == (1, 2)


@pytest.fixture
def any_direction(monkeypatch):
    """Directions are taken from noise, too."""
    monkeypatch.setattr(spurious, "CHANCE_FACTOR", 0.0)


@pytest.mark.parametrize("channels", [2, 3, 40])
def test_directions_are_taken_beyond_chance_alone(channels):
    """Colours at random: with flags that mean nothing nothing is found, whatever the draw; with flags of the samples whose
    colour goes with the label the colours' direction is."""
    found = {False: 0, True: 0}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(400) % 2
        colour = torch.randint(2, (400,), generator=generator)
        vectors = F.one_hot(colour, channels).float() + 0.1 * torch.randn(400, channels, generator=generator)
        for told, flags in ((False, torch.rand(400, generator=generator) < 0.8), (True, colour == labels)):
            moments = ConditionalMoments(2, channels, with_energy=True)
            for part in range(0, 400, 50):
                moments.update(*(values[part : part + 50] for values in (vectors, labels, flags)))
            directions = spurious_directions(moments, 0.1, 0.0)
            found[told] += len(directions)
            if told:
                assert (directions[0, 0] - directions[0, 1]).abs() > 1.35
    assert found == {False: 0, True: 20}


def test_directions_never_span_all_inputs(any_direction):
    torch.manual_seed(0)
    moments = ConditionalMoments(10, 3, True)
    moments.update(torch.randn(200, 3), torch.arange(200) % 10, torch.arange(200) < 120)
    assert spurious_directions(moments, 1.0, 0.0).shape == (2, 3)
    one = moments_of([[1.0], [2.0]], [0, 0], [True, False], with_energy=True)
    assert spurious_directions(one, 1.0, 0.0).shape == (0, 1)


def test_directions_may_spare_what_tells_classes_apart():
    """Flagged samples show their class (first two numbers) twice as clearly, and carry an attribute (third)."""
    vectors, labels, flags = [], [], []
    for label, clear in enumerate(([1.0, 0.0], [0.0, 1.0], [-1.0, -1.0])):
        for flagged in (True, False):
            attribute = (1.0 if label else -1.0) * (0.5 if flagged else -0.5)
            vectors.append([(2 if flagged else 1) * v for v in clear] + [attribute, 0.0])
            labels.append(label)
            flags.append(flagged)
    moments = moments_of(vectors, labels, flags, with_energy=True)
    assert spurious_directions(moments, 0.4, 0.0)[0, :2].norm() > 0.5
    found = spurious_directions(moments, 1.0, 0.0, spare_classes=True)
    assert found.abs().tolist() == [pytest.approx([0, 0, 1, 0], abs=1e-5)]
    # Where they differ in nothing but that clarity, nothing is spurious.
    clear = moments_of([[*v[:2], 0.0, 0.0] for v in vectors], labels, flags, with_energy=True)
    assert spurious_directions(clear, 1.0, 0.0, spare_classes=True).shape == (0, 4)


def test_removal_is_exact_where_inputs_are_pruned(any_direction):
    algorithm = make(total=40, removal_layers="all", backbone="mnist_cnn_bn")
    train(algorithm, 40)
    checked = 0
    for name in algorithm.removal.channels:
        if name not in algorithm.masks() or not len(algorithm.removal.directions(name)):
            continue
        weight = algorithm.get_parameter(name)
        alive = algorithm.masks()[name].any(0).flatten(1).any(1)
        directions = algorithm.removal.directions(name) * alive
        if alive.all() or torch.linalg.svdvals(directions).min() < 0.1:
            continue
        remaining = torch.einsum("kc,ochw->okhw", directions, weight)
        assert remaining.abs().max() < 1e-5 * weight.abs().max()
        checked += 1
    assert checked


@pytest.mark.parametrize("relative", [True, False])
def test_relative_vectors_find_the_axis_however_bright_the_flagged_are(relative):
    """Colour is red or green by the label in flagged samples, the other way round in the others; flagged samples of one
    class are three times as bright."""
    removal = Removal({"conv.weight": nn.Conv2d(3, 4, 1)}, 2, 0.6, relative)
    labels = torch.arange(16) % 2
    flagged = torch.arange(16) < 8
    color = labels ^ ~flagged
    brightness = torch.where(flagged & (labels == 0), 3.0, 1.0)
    x = F.one_hot(color, 3).float() * brightness[:, None]
    removal.take("conv.weight", x, labels, flagged)
    removal.renew()
    (direction,) = removal.directions("conv.weight")
    assert bool(direction[:2].sum().abs() < 1e-5) is relative and direction[2].abs() < 1e-5


def test_linear_layers_lose_directions_too():
    torch.manual_seed(0)
    weight, direction = torch.randn(5, 4), F.normalize(torch.randn(1, 4), dim=1)
    assert F.linear(direction, remove_directions(weight, direction)).abs().max() < 1e-5


def test_removed_directions_cannot_be_heard():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    direction = F.normalize(torch.randn(1, 3), dim=1)
    projected = remove_directions(weight, direction)
    along = direction.view(1, 3, 1, 1) * torch.randn(2, 1, 5, 5)
    assert F.conv2d(along, projected).abs().max() < 1e-5
    across = torch.randn(2, 3, 5, 5)
    across = across - direction.view(1, 3, 1, 1) * (across * direction.view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(F.conv2d(across, projected), F.conv2d(across, weight), atol=1e-5)
    assert torch.allclose(remove_directions(projected, direction), projected, atol=1e-6)


def make(name="SFP", total=20, **overrides) -> SFP:
    values = hparams.resolve_hparams(name, "FullColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).make((3, 8, 8), 4, 2, values)
    algorithm.total_steps = total
    return algorithm


def flag(algorithm, losses, batches):
    """The flags and numbers to log for a reference whose loss on sample i of each domain is `losses[i]`."""
    return algorithm.flagging.flag(FixedLogits(losses)(torch.cat([x for x, _ in batches])), batches)


def batch(n=8, aligned=True, side=8):
    x, y = torch.randn(n, 3, side, side), torch.arange(n) % 4
    return Minibatch(x, y, torch.arange(n) % 3 > 0 if aligned else None)


def train(algorithm, end, begin=0, side=8):
    for step in range(begin, end):
        torch.manual_seed(step)
        algorithm.update([batch(side=side), batch(side=side)])


class FixedLogits(nn.Module):
    """A reference whose loss on sample i of each domain is `losses[i]`."""

    def __init__(self, losses):
        super().__init__()
        self.p = torch.exp(-torch.tensor(losses))

    def forward(self, x):
        logits = torch.full((len(x), 4), -50.0)
        for i in range(len(x)):
            p = self.p[i % len(self.p)]
            logits[i, i % 4] = torch.log(p)
            logits[i, (i + 1) % 4] = torch.log(1 - p)
        return logits


def test_samples_below_the_domains_mean_are_flagged():
    losses = [0.1, 0.2, 3.0, 0.1, 0.3, 2.0, 0.1, 0.2]  # mean 0.75
    for kappa, expected in ((1.0, {0, 1, 3, 4, 6, 7}), (0.35, {0, 1, 3, 6, 7})):
        algorithm = make(flag_kappa=kappa)
        flags, metrics = flag(algorithm, losses, [batch(), batch()])
        assert [set(torch.nonzero(f).flatten().tolist()) for f in flags] == [expected, expected]
        for domain in (0, 1):
            assert algorithm.flagging.thresholds(domain).tolist() == pytest.approx([0.75 * kappa] * 4, abs=1e-4)
        assert metrics["flag_threshold_domain0"] == pytest.approx(0.75 * kappa, abs=1e-4)
        assert metrics["flagged_domain0"] == len(expected) / 8
    truth = {i for i in range(8) if i % 3}
    assert metrics["flag_precision_domain0"] == pytest.approx(len(expected & truth) / len(expected))
    assert metrics["flag_recall_domain0"] == pytest.approx(len(expected & truth) / len(truth))


def test_each_class_may_have_a_threshold_of_its_own():
    losses = [0.1, 0.2, 3.0, 0.1, 0.3, 2.0, 0.1, 0.2]  # of classes 0, 1, 2, 3, 0, 1, 2, 3
    algorithm = make(flag_threshold="class")
    flags, _ = flag(algorithm, losses, [batch(), batch()])
    assert algorithm.flagging.thresholds(0).tolist() == pytest.approx([0.2, 1.1, 1.55, 0.15], abs=1e-4)
    assert [torch.nonzero(f).flatten().tolist() for f in flags] == [[0, 1, 3, 6]] * 2
    # A class that a batch lacks keeps its threshold; in the others each sample counts, earlier ones 3 percent less.
    flag(algorithm, [1.2, 0.2], [batch(2)])
    expected = [(0.97 * 0.4 + 1.2) / (0.97 * 2 + 1), (0.97 * 2.2 + 0.2) / (0.97 * 2 + 1), 1.55, 0.15]
    assert algorithm.flagging.thresholds(0).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_first_batch_does_not_rule_the_threshold():
    algorithm = make()
    for losses in ([3.0], *[[1.0]] * 40):
        flag(algorithm, losses, [batch(), batch()])
    left = 0.97**40 / sum(0.97**k for k in range(41))
    assert algorithm.flagging.thresholds(1)[0].item() == pytest.approx(1 + 2 * left, abs=1e-3)


def test_a_class_not_seen_yet_has_the_domains_threshold():
    algorithm = make(flag_threshold="class")
    flag(algorithm, [0.2, 0.4], [batch(2), batch(2)])
    assert algorithm.flagging.thresholds(0).tolist() == pytest.approx([0.2, 0.4, 0.3, 0.3], abs=1e-4)


def test_random_flags_are_as_many_and_oracle_flags_are_the_truth():
    losses = [0.1, 0.2, 3.0, 0.1, 0.3, 2.0, 0.1, 0.2]
    seen = set()
    for seed in range(20):
        algorithm = make(flag_policy="random")
        torch.manual_seed(seed)
        flags = flag(algorithm, losses, [batch(), batch()])[0][0]
        assert flags.sum() == 6
        seen.add(tuple(flags.tolist()))
    assert len(seen) > 5
    algorithm = make(flag_policy="oracle")
    assert flag(algorithm, losses, [batch(), batch()])[0][1].tolist() == [i % 3 > 0 for i in range(8)]
    with pytest.raises(UserError, match="knows its aligned samples"):
        flag(algorithm, losses, [batch(aligned=False)])


def test_risk_weights_by_hand():
    algorithm = make("SFPWeighted", risk_weight=20.0)
    algorithm.flagging.loss_counts.fill_(10)
    algorithm.flagging.flag_counts.fill_(7)
    first, second = batch(4), batch(4)
    flags = [torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True])]
    loss, metrics = algorithm.weighted_loss([first, second], flags)
    losses = F.cross_entropy(
        algorithm.predict(torch.cat([first[0], second[0]])), torch.cat([first[1], second[1]]), reduction="none"
    )
    expected = (losses[[0, 1, 3, 4, 6, 7]].sum() + 20 * losses[[2, 5]].sum()) / 46
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and metrics["loss"] == pytest.approx(loss.item())
    algorithm.flagging.flag_counts[1] = 10  # all flagged of late: no contrast, and nobody there weighs more
    expected = (losses[[0, 1, 3, 4, 5, 6, 7]].sum() + 20 * losses[2]) / 27
    assert algorithm.weighted_loss([first, second], flags)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("backbone", ["mnist_cnn", "efficientnet_lite0"])  # the latter pads before it convolves
def test_soft_penalty_is_the_share_that_the_layer_passes_on(backbone):
    algorithm = make(removal="soft", backbone=backbone, weights="none")
    (name,) = algorithm.removal.channels
    algorithm.removal.stored[name][0] = torch.tensor([1.0, 0.0, 0.0])
    x = torch.randn(5, 3, 8, 8)
    only_red = x.clone()
    only_red[:, 1:] = 0
    layer = algorithm.get_submodule(name.removesuffix(".weight"))
    passed_on = layer(only_red)
    if layer.bias is not None:
        passed_on = passed_on - layer.bias.view(1, -1, 1, 1)
    # Over channels, mean over samples and positions, of which a strided layer has fewer.
    expected = passed_on.square().sum(1).mean() / x.square().sum(1).mean()
    assert algorithm.removal.passed_on(name, layer, x).item() == pytest.approx(expected.item(), rel=1e-4)


def test_regularised_layers():
    assert list(make().removal.channels) == ["featurizer.conv1.weight"]
    assert not make(removal="none").removal.channels
    assert len(make(removal_layers="all").removal.channels) == 4
    values = hparams.resolve_hparams(
        "SFP", "PACS", overrides={"backbone": "efficientnet_lite0", "image_size": 64, "weights": "none"}
    )
    lite = registry.get("SFP").make((3, 64, 64), 7, 3, values)
    assert list(lite.removal.channels) == ["featurizer.network.conv_stem.weight"]
    last = list(cleared_layers(lite.featurizer, lite.groups, "last"))
    assert last[-1] == "featurizer.network.conv_head.weight" and len(last) == 8


@pytest.mark.parametrize(
    "overrides, part",
    [
        ({"flag_policy": "lose"}, "did you mean 'loss'"),
        ({"removal": "strict"}, "removal of SFP"),
        ({"granularity": "weight"}, "hparam 'granularity' of SFP is 'weight': it is built in as 'channel' now"),
        ({"objective": "VREx"}, "built in as 'ERM' now"),
        ({"prune_residual_streams": 0}, "built in as False now"),
        ({"risk_weight": 0}, "a number above 0"),
        ({"flag_kappa": -1.0}, "a number above 0"),
        ({"removal_rank": -3}, "share in"),
        ({"removal_energy": 0.3}, "`commit`"),
        ({"removal_strength": -5.0}, "at least 0"),
    ],
)
def test_bad_hparams(overrides, part):
    with pytest.raises(UserError, match=part):
        make(**overrides)


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_no_contrast_anywhere_is_an_error(sparsity):
    algorithm = make(flag_kappa=1e-9, sparsity=sparsity)
    with pytest.raises(UserError, match="no contrast in any domain"), pytest.warns(UserWarning):
        train(algorithm, 20)


@pytest.mark.parametrize(
    "name, overrides",
    [("SFP", {}), ("SFPWeighted", {"removal": "none"}), ("SFP", {"removal": "none", "channel_score": "class_conditional"})],
)  # fmt: skip
def test_no_contrast_is_an_error_whatever_the_score(name, overrides):
    algorithm = make(name, flag_kappa=1e-9, **{"channel_score": "taylor", **overrides})
    with pytest.raises(UserError, match="no contrast in any domain"), pytest.warns(UserWarning):
        train(algorithm, 20)


def test_a_domain_without_contrast_is_told_once_and_left_out():
    algorithm = make()
    algorithm.step = algorithm.schedule.first_step(algorithm.total_steps)
    batches = [batch(), batch()]
    # Of the first domain all are flagged; of the second five of eight, the first of each class and one more.
    flags = [torch.ones(8, dtype=torch.bool), torch.arange(8) < 5]
    algorithm.flagging.flag = lambda logits, minibatches: (flags, {})
    algorithm.flagging.loss_counts.fill_(2)
    algorithm.flagging.flag_counts.copy_(torch.tensor([[2.0] * 4, [2.0, 1.0, 1.0, 1.0]]))
    with pytest.warns(UserWarning, match="100% of the samples of training domain 0") as told:
        for _ in range(3):
            algorithm.compute_loss(batches)
    moments = algorithm.removal.moments_of("featurizer.conv1.weight")
    assert len(told) == 1 and algorithm.flagging.has_contrast().tolist() == [False, True]
    seen = sum(0.97**k for k in range(3))
    assert moments.counts[1].tolist() == pytest.approx([2 * seen, seen, seen, seen])
    assert moments.counts[0].tolist() == pytest.approx([0, seen, seen, seen])


def test_directions_are_renewed_unless_the_network_is_pretrained(monkeypatch, any_direction):
    """40 steps: the reference is kept at step 6, directions come every second step from 8 on, or once."""
    renewed: list[int] = []
    real = Removal.renew
    monkeypatch.setattr(Removal, "renew", lambda self: (renewed.append(algorithm.step), real(self))[1])
    for layers in ("first", "all"):
        renewed.clear()
        algorithm = make(total=40, removal_layers=layers)
        train(algorithm, 6)
        weights = {name: value.clone() for name, value in algorithm.network.state_dict().items()}
        train(algorithm, 14, begin=6)
        assert renewed == [8, 10, 12]
        assert all(torch.equal(value, weights[name]) for name, value in algorithm.reference.state_dict().items())
    renewed.clear()
    algorithm = make(total=40)
    algorithm.is_pretrained = True
    train(algorithm, 20)
    assert renewed == [8] and len(algorithm.removal.directions("featurizer.conv1.weight")) == 2


@pytest.mark.parametrize(
    "shape, overrides, expected",
    [
        ((3, 32, 32), {"backbone": "mnist_cnn_bn"}, False),
        ((3, 28, 28), {"backbone": "resnet18"}, True),
        ((3, 64, 64), {"backbone": "resnet18", "weights": "none"}, False),
        ((2, 28, 28), {"backbone": "mnist_cnn", "weights": "net.safetensors"}, True),
        ((2, 14, 14), {}, False),
    ],
)
def test_what_counts_as_pretrained(shape, overrides, expected):
    assert networks.is_pretrained(shape, overrides) is expected


def test_the_soft_penalty_runs_in_bf16_on_inner_layers(any_direction):
    overrides = {
        "backbone": "resnet18",
        "weights": "none",
        "image_size": 32,
        "removal": "soft",
        "removal_layers": "last",
    }
    values = hparams.resolve_hparams("SFP", "PACS", overrides=overrides)
    algorithm = SFP((3, 32, 32), 4, 2, values)
    algorithm.total_steps = 40
    networks.set_precision(algorithm, "bf16", channels_last=True)
    for step in range(11):
        torch.manual_seed(step)
        metrics = algorithm.update([batch(side=32), batch(side=32)])
    directions = {name: value for name, value in metrics.items() if name.startswith("directions_")}
    assert len(directions) == len(algorithm.removal.channels) == 5 and max(directions.values()) > 0


def test_features_that_end_with_channels_have_the_mean_of_their_positions():
    x = torch.arange(24.0).view(2, 3, 4)
    linear = torch.nn.Linear(4, 1)
    assert channel_means(x, linear, 4).tolist() == x.mean(1).tolist()
    assert channel_means(x.view(2, 1, 3, 4), linear, 4).tolist() == x.mean(1).tolist()
    # A flattened map: two positions of each of two channels.
    assert channel_means(x[:, 0], linear, 2).tolist() == [[0.5, 2.5], [12.5, 14.5]]
    assert channel_means(x.view(2, 3, 2, 2), torch.nn.Conv2d(3, 1, 1), 3).tolist() == x.mean(2).tolist()


def test_what_windows_read_is_told_apartby_image():
    """Two images of three windows each, one after the other: the means are those of an image."""
    x = torch.arange(2 * 3 * 4 * 5.0).view(6, 4, 5)
    linear = by_image(x, torch.nn.Linear(5, 1), 2)
    assert torch.equal(channel_means(linear, torch.nn.Linear(5, 1), 5), x.view(2, 12, 5).mean(1))
    maps = torch.arange(2 * 3 * 4 * 5 * 6.0).view(6, 4, 5, 6)
    conv = torch.nn.Conv2d(4, 1, 1)
    assert torch.equal(channel_means(by_image(maps, conv, 2), conv, 4), maps.view(2, 3, 4, 30).mean((1, 3)))
    assert by_image(x, conv, 6) is x


@pytest.mark.parametrize(
    "overrides", [{"channel_score": "taylor"}, {"channel_score": "unflagged"}, {"removal": "soft"}]
)
def test_sfp_prunes_a_network_that_cuts_images_into_windows(overrides):
    pytest.importorskip("timm", reason="timm is not installed")
    given = {"backbone": "test_maxvit", "weights": "none", "image_size": 64, "removal_layers": "all", **overrides}
    algorithm = SFP((3, 64, 64), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=given))
    algorithm.total_steps = 10
    train(algorithm, 10, side=64)
    assert algorithm.sparsity() == pytest.approx(0.5, abs=0.05)


def test_sfp_refuses_layers_whose_weights_are_transformed():
    """Taking a direction out of a weight that is standardised before use leaves part of it."""
    pytest.importorskip("timm", reason="timm is not installed")
    given = {"backbone": "test_nfnet", "weights": "none", "image_size": 64}
    with pytest.raises(UserError, match=r"ScaledStdConv2d\w* transforms its weight"):
        SFP((3, 64, 64), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=given))


def test_a_record_after_few_steps_has_diagnostics(tmp_path):
    """The last statistics before it were taken before the record before."""
    folder = tmp_path / "run"
    training.train(RunSettings(
        dataset="FullColoredDigits", algorithm="SFP", test_envs=[2], steps=42, checkpoint_freq=20, skip_model_save=True,
        output_dir=str(folder), hparams=json.dumps({"batch_size": 16})))  # fmt: skip
    last = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 41
    assert {"flagged_domain0", "flag_precision_domain1", "directions_conv1"} <= last.keys()


@pytest.mark.parametrize("side, expected", [(8, "relative"), (28, "relative"), (64, "absolute")])
def test_directions_of_normalised_photographs_are_not_those_of_vectors_of_length_1(side, expected):
    """There the origin is grey: light and dark would be opposite vectors."""
    given = {"backbone": "resnet18", "weights": "none", "image_size": side}
    algorithm = SFP((3, side, side), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=given))
    assert algorithm.decisions()["removal_vectors"] == expected


@pytest.mark.parametrize(
    "pretrained, side, expected",
    [
        (False, 28, ("first", "relative", "class_conditional")),
        (False, 29, ("first", "absolute", "class_conditional")),
        (True, 28, ("last", "absolute", "taylor")),
        (True, 224, ("last", "absolute", "taylor")),
    ],
)
def test_what_is_left_open_follows_from_pretraining_and_image_size(pretrained, side, expected):
    names = ("removal_layers", "removal_vectors", "channel_score")
    assert tuple(choices(dict.fromkeys(names, "auto"), pretrained, side)[name] for name in names) == expected
    said = {"removal_layers": "all", "removal_vectors": "absolute", "channel_score": "unflagged"}
    assert choices(said, pretrained, side) == said


def test_sfp_prunes_a_network_with_channels_last():
    pytest.importorskip("timm", reason="timm is not installed")
    overrides = {"backbone": "test_convnext", "weights": "none", "image_size": 32, "channel_score": "class_conditional"}
    algorithm = SFP((3, 32, 32), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=overrides))
    algorithm.total_steps = 12
    train(algorithm, 12, side=32)
    assert algorithm.sparsity() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "overrides",
    [
        {"backbone": "mnist_cnn_bn"},
        {"backbone": "mnist_cnn"},
        # Here several layers read a channel: squeeze-and-excitation's too.
        {"backbone": "timm:mobilenetv3_small_050", "weights": "none", "lr": 1e-5},
    ],
    ids=lambda overrides: overrides["backbone"],
)
def test_score_of_unflagged_samples_is_the_square_of_gates_derivatives(overrides, monkeypatch):
    """Gates [N, channels] in front of what reads the channels, differentiated by autograd, against what SFP collects."""
    if overrides["backbone"].startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    algorithm = make(**overrides, removal="none", channel_score="unflagged")
    for step in range(20):
        torch.manual_seed(step)
        algorithm.update([batch(), batch()])
    minibatches = [batch(), batch()]
    flags = [torch.rand(len(y)) < 0.5 for _, y in minibatches]
    monkeypatch.setattr(algorithm, "_flag", lambda minibatches: flags)
    unflagged = ~torch.cat(flags)

    gates = {group.name: torch.ones(len(unflagged), group.channels, requires_grad=True) for group in algorithm.groups}
    handles = []
    for group in algorithm.groups:
        for name in group.readers:
            done = [0]

            def gate(layer, inputs, gates=gates[group.name], done=done):
                x = inputs[0]
                rows = gates[done[0] : done[0] + len(x)]
                done[0] += len(x)
                rows = rows.repeat_interleave(x.shape[1] // rows.shape[1], 1)
                return x * rows.view(*rows.shape, *[1] * (x.dim() - 2))

            handles.append(algorithm.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(gate))
    loss, _ = super(SFP, algorithm).compute_loss(minibatches)
    loss.backward()
    for handle in handles:
        handle.remove()
    algorithm.zero_grad()

    before = {group.name: algorithm.score([])[group.name] for group in algorithm.groups}
    algorithm.step = algorithm.schedule.first_step(algorithm.total_steps) + 4 * 4  # one on which statistics are due
    loss, _ = algorithm.compute_loss(minibatches)
    loss.backward()
    algorithm.after_backward()
    scores = algorithm.score(minibatches)
    for group in algorithm.groups:
        latest = gates[group.name].grad[unflagged].square().mean(0)
        assert latest.max() > 0
        assert torch.allclose(
            scores[group.name], 0.9 * before[group.name] + 0.1 * latest, rtol=1e-3, atol=1e-6 * float(latest.max())
        )


def test_taylor_score_is_that_of_taylor():
    """With nothing removed and every sample weighing the same, SFP with Taylor's score is Taylor, to the bit. The
    network has BatchNorm, behind which a filter's own g w sums to zero."""
    overrides = {"backbone": "mnist_cnn_bn"}
    sfp = make(**overrides, removal="none", channel_score="taylor")
    taylor = make("Taylor", **overrides)
    for step in range(30):
        for algorithm in (sfp, taylor):
            torch.manual_seed(step)
            algorithm.update([batch(), batch()])
    masks, expected = sfp.masks(), taylor.masks()
    assert masks.keys() == expected.keys() and 0.4 < sfp.sparsity() < 0.6
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "overrides",
    [{"removal": "soft"}, {"removal": "none"}, {"removal_layers": "all"}, {"channel_score": "taylor"},
     {"channel_score": "unflagged", "flag_threshold": "class", "removal": "none"}, {"flag_policy": "random"}, {"flag_policy": "oracle"}, {"sparsity": 0.0}],
)  # fmt: skip
def test_contract_of_ablations(overrides, monkeypatch):
    plain = contract.make
    monkeypatch.setattr(contract, "make", lambda name, **options: plain(name, overrides=overrides, **options))
    for title, check in contract.CHECKS.items():
        if title != "never_touches_the_test_environment":  # a whole run, which knows no overrides
            check("SFP")


def test_sfp_finds_the_colour(tmp_path):
    """On digits whose colour agrees with the label in 95 and 90 percent of the training samples, and not at all in the
    test environment, SFP at half the channels is far above magnitude pruning; the flags are nearly the truth."""

    def final(name: str, **overrides) -> dict:
        folder = tmp_path / (name + str(len(overrides)))
        training.train(RunSettings(
            dataset="FullColoredDigits", algorithm=name, test_envs=[2], steps=200, checkpoint_freq=199, skip_model_save=True, evaluate="final",
            output_dir=str(folder), hparams=json.dumps({"sparsity": 0.5, "batch_size": 32, **overrides})))  # fmt: skip
        return json.loads((folder / "results.jsonl").read_text().splitlines()[-1])

    sfp, magnitude = final("SFP"), final("Magnitude")
    assert sfp["env2_in_acc"] > magnitude["env2_in_acc"] + 0.15
    assert sfp["sparsity"] == magnitude["sparsity"] == 0.5 and sfp["macs"] == magnitude["macs"]
    assert sfp["parameters"] == magnitude["parameters"]  # the reference is not part of what is deployed
    for domain in (0, 1):
        assert sfp[f"flag_precision_domain{domain}"] > 0.9 and sfp[f"flag_recall_domain{domain}"] > 0.85
