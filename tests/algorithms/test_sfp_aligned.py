"""SFPAligned: alignment with the frozen reference."""

from __future__ import annotations

import pytest
import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.training.hparams import resolve_hparams


def made(**changes):
    torch.manual_seed(0)
    given = {"backbone": "mnist_cnn_bn", "prune_start": 0.15, "reconstruction": "least_squares", **changes}
    hparams = resolve_hparams("SFPAligned", "FullColoredDigits", overrides=given)
    algorithm = registry.get("SFPAligned").cls((3, 8, 8), 10, 2, hparams)
    algorithm.total_steps = 40
    return algorithm


BATCH = 16


def batches(step):
    made_by = torch.Generator().manual_seed(step)
    labels = [torch.randint(0, 10, (BATCH,), generator=made_by) for _ in range(2)]
    # Easy for two thirds of the samples, so that flags have something to tell apart.
    return [
        (torch.rand(BATCH, 3, 8, 8, generator=made_by) * (torch.arange(BATCH) % 3 == 0)[:, None, None, None] + y.view(-1, 1, 1, 1) / 5, y)
        for y in labels
    ]  # fmt: skip


def train(algorithm, steps=range(40)):
    return [algorithm.update(batches(step)) for step in steps]


def test_the_network_is_aligned_with_what_it_was_at_prune_start_and_moves_away():
    told = train(made())
    first = next(at for at, metrics in enumerate(told) if "alignment_distance" in metrics)
    assert first == 6  # .15 of 40 steps
    assert told[-1]["alignment_distance"] > 0 and told[-1]["alignment_divergence"] > 0


def test_alignment_keeps_features_nearer():
    near, far = (train(made(alignment=weight, alignment_logits=0.0))[-1] for weight in (10.0, 0.0))
    assert near["alignment_distance"] < far["alignment_distance"]


def test_directions_left_out_are_orthonormal_and_as_many_at_random():
    for policy in ("flags", "random"):
        algorithm = made(alignment_directions=policy)
        train(algorithm)
        directions = algorithm.feature_directions
        kept = directions[directions.any(1)]
        assert torch.allclose(kept @ kept.t(), torch.eye(len(kept)), atol=1e-4)


def test_reconstruction_changes_the_weights_that_remain():
    one, two = made(reconstruction_target="own"), made(reconstruction="none")
    train(one, range(9))
    train(two, range(9))
    assert one.sparsity() == two.sparsity() > 0
    assert not torch.equal(one.featurizer.conv2.weight, two.featurizer.conv2.weight)


def test_samples_count_in_the_reconstruction_as_asked():
    """Unflagged ones as in the alignment, and environments by the reference's mean loss in them."""
    unflagged, hard = made(reconstruction_samples="unflagged"), made(reconstruction_samples="hard_environments")
    assert made().sample_weights(batches(0)) is None
    for algorithm in (unflagged, hard):
        train(algorithm, range(8))
    flags = torch.cat(unflagged.flags)
    weights = unflagged.sample_weights(batches(7))
    assert flags.any() and (weights[flags] == 1).all() and (weights[~flags] == 2).all()
    losses = hard.flagging.loss_sums.sum(1) / hard.flagging.loss_counts.sum(1)
    assert torch.allclose(hard.sample_weights(batches(7)), losses.repeat_interleave(BATCH))


@pytest.mark.parametrize("name", ["alignment_directions", "reconstruction", "reconstruction_samples"])
def test_choices_are_checked(name):
    from domainbed_sfp.core.errors import UserError

    with pytest.raises(UserError, match=f"{name}.*known"):
        made(**{name: "al"})


def test_layers_that_follow_the_reference_lose_their_channels_one_after_another():
    """Each has what it will have or all it had, the first layers first; what goes is settled when the first go."""
    algorithm = made()
    groups = [group.name for group in algorithm.groups]
    settled = {}
    for step in range(40):
        algorithm.update(batches(step))
        pruned = [name for name in groups if not algorithm.unit_masks[name].all()]
        assert pruned == groups[: len(pruned)]
        for name in pruned:
            assert torch.equal(settled.setdefault(name, algorithm.unit_masks[name].clone()), algorithm.unit_masks[name])
    assert len(pruned) == len(groups) and algorithm.sparsity() == pytest.approx(0.5, abs=0.01)
