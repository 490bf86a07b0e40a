"""SFP's statistics, directions and their removal, on cases computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sfp_runs import make, train
from torch import nn

from domainbed_sfp.algorithms.sfp.removal import Removal
from domainbed_sfp.pruning.directions import DECAY, ConditionalMoments, remove_directions, spurious_directions


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
