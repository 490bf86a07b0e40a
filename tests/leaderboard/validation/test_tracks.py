"""Masks' files, facts of data sets, and the closed track."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from changed_bundles import DATASET

from domainbed_sfp.leaderboard import summary, tracks, validation
from domainbed_sfp.leaderboard.facts import facts_of
from domainbed_sfp.runs import mask_files

# parts -----------------------------------------------------------------------------------------------------------------


def test_masks_survive_packing():
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"m{n}": torch.rand(shape, generator=generator) < 0.5
        for n, shape in enumerate([(1,), (3, 5), (8,), (2, 3, 3, 3)])
    }
    again = mask_files.unpack(mask_files.pack(masks))
    assert set(again) == set(masks) and all(torch.equal(again[name], masks[name]) for name in masks)
    masks["m1"][0, 0] ^= True
    assert mask_files.digest(again) != mask_files.digest(masks)


def test_facts_are_those_of_the_data():
    from domainbed_sfp.data import get_dataset_class

    for name in ("ColoredDigits", "FullColoredDigits", "RotatedDigits", "TexturedDigits"):
        built, facts = get_dataset_class(name).build(None, {"image_size": 12}, 1, None), facts_of(name)
        assert tuple(map(len, built.environments)) == facts.sizes
        assert (built.input_shape, built.num_classes) == ((facts.channels, 12, 12), facts.classes)
    assert facts_of("PACS").sizes == (2048, 2344, 1670, 3929) and facts_of("PACS").classes == 7
    assert sum(facts_of("ColoredMNIST").sizes) == 70_000 and facts_of("TexturedMNIST").channels == 1
    assert facts_of("Folder") is None and None in facts_of("TerraIncognita").sizes


def test_the_closed_track():
    protocol = {
        "environments": ["95%", "90%", "10%"], "test_envs": [[0], [1], [2]], "steps": 1001, "backbone": "MNIST_CNN",
        "weights": "none", "image_size": 8, "holdout_fraction": 0.2, "task": "domain_generalization",
        "checkpoint_freq": 100, "trial_seeds": [0, 1, 2],
    }  # fmt: skip
    assert list(tracks.reasons_for_open(DATASET, protocol, [])) == []
    assert list(tracks.reasons_for_open(DATASET, {**protocol, "trial_seeds": [0, 1, 2, 3]}, [])) == []
    # Each alone, and both ways: fewer checkpoints are another selection too.
    for changes, words in (
        ({"checkpoint_freq": 10}, "a checkpoint every 10 steps, closed takes 100"),
        ({"checkpoint_freq": 1000}, "a checkpoint every 1,000 steps, closed takes 100"),
        ({"trial_seeds": [0, 1]}, "2 trials, closed takes at least 3"),
        ({"trial_seeds": [0]}, "1 trial, closed takes at least 3"),
    ):
        assert list(tracks.reasons_for_open(DATASET, {**protocol, **changes}, [])) == [words]
    photographs = {
        **protocol, "steps": 5001, "backbone": "resnet50 (augmix)", "weights": "imagenet", "image_size": 224,
        "environments": ["a", "b", "c"], "checkpoint_freq": 300,
    }  # fmt: skip
    assert list(tracks.reasons_for_open("PACS", photographs, [])) == []
    assert list(tracks.reasons_for_open("DomainNet", photographs, [])) == [
        "a checkpoint every 300 steps, closed takes 1,000"
    ]
    changed = {**protocol, "steps": 7, "test_envs": [[0]], "backbone": "resnet18", "holdout_fraction": 0.5}
    assert list(tracks.reasons_for_open(DATASET, changed, [])) == [
        "7 steps, closed takes 1,001", "backbone resnet18, closed takes MNIST_CNN or MNIST_CNN (BatchNorm)",
        "held-out fraction 0.5, closed takes 0.2", "90%, 10% not tested",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "hparams, args, words",
    [
        ({"weights": "./none"}, {}, "hparam weights './none', closed takes imagenet or none"),
        ({"backbone": "MNIST_CNN"}, {}, "hparam backbone 'MNIST_CNN', closed takes auto"),
        ({}, {"uda_holdout_fraction": 0.9}, "unlabelled fraction 0.9 left out of the tests"),
    ],
)
def test_names_do_not_open_the_closed_track(made, hparams, args, words):
    """A file called none, a backbone called as the tables call DomainBed's, a test on a part of the samples."""
    run = validation.validate(made).runs[0].run
    run = replace(run, hparams={**run.hparams, **hparams}, args={**run.args, **args})
    protocol = {**summary.protocol_of([run]), "steps": 1001, "test_envs": [[0], [1], [2]]}
    told = list(tracks.reasons_for_open(DATASET, protocol, [run]))
    assert any(line.startswith(words) for line in told), told
    assert protocol["weights"] == ("file none" if "weights" in hparams else "none")
