"""Degraded images, and whole runs that are evaluated on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.images import degradations
from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD, normalize
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.training import hparams

# Degradations -------------------------------------------------------------------------------------------------------


def pictures(n=6, channels=3, side=32):
    """Smooth blobs with an edge: something that every degradation can spoil."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, channels, 6, 6, generator=generator)
    images = F.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    images[:, :, side // 3 : side // 2, side // 4 : side // 2] = 0.9
    return images


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", degradations.KINDS)
def test_degradations_spoil_more_with_severity(kind, channels):
    images = pictures(channels=channels)
    before = images.clone()
    errors = []
    for severity in degradations.SEVERITIES:
        out = degradations.degrade(images, kind, torch.full((6,), severity), torch.Generator().manual_seed(0))
        assert out.shape == images.shape and out.dtype == images.dtype and out.min() >= 0 and out.max() <= 1
        errors.append(((out - images) ** 2).mean().item())
    assert torch.equal(images, before)
    assert errors[0] > 0 and errors == sorted(errors) and errors[-1] > 1.2 * errors[0]


@pytest.mark.parametrize("kind", [kind for kind in degradations.KINDS if kind != "noise"])  # drawn for a whole batch
def test_each_sample_has_its_own_severity(kind):
    images, severity = pictures(5), torch.arange(1, 6)
    together = degradations.degrade(images, kind, severity, torch.Generator())
    for i in range(5):
        alone = degradations.degrade(images[i : i + 1], kind, severity[i : i + 1], torch.Generator())
        assert torch.allclose(together[i], alone[0], atol=2e-3)


def test_contrast_by_hand():
    images = torch.tensor([0.0, 1.0, 0.5, 0.5]).view(1, 1, 2, 2)
    out = degradations.degrade(images, "contrast", torch.tensor([2]), torch.Generator())
    assert out.flatten().tolist() == pytest.approx([0.35, 0.65, 0.5, 0.5])


def test_degradations_are_drawn_evenly_and_from_the_seed():
    drawn = degradations.draw_degradations(20_000, 0.5, 7)
    assert (drawn.kind >= 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.allclose(drawn.kind[drawn.kind >= 0].bincount() / 10_000, torch.full((5,), 0.2), atol=0.02)
    assert torch.equal(drawn.severity, degradations.draw_degradations(20_000, 0.5, 7).severity)
    x = pictures(8)
    few = degradations.draw_degradations(8, 0.5, 7)
    first, again = (degradations.degrade_batch(x, few, is_normalized=False) for _ in range(2))
    assert torch.equal(first, again)
    changed = (first != x).flatten(1).any(1)
    assert torch.equal(changed, few.kind >= 0) and 0 < changed.sum() < 8


def test_normalised_images_are_degraded_as_pixels():
    levels = (pictures() * 255).round().to(torch.uint8)
    drawn = degradations.draw_degradations(6, 1.0, 0)
    ours = degradations.degrade_batch(normalize(levels), drawn, is_normalized=True)
    pixels = degradations.degrade_batch(levels / 255, drawn, is_normalized=False)
    expected = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.allclose(ours, expected, atol=0.02)


def test_an_unknown_degradation():
    with pytest.raises(UserError, match="unknown degradation 'blurr'; did you mean 'blur'"):
        degradations.degrade(pictures(), "blurr", torch.ones(6, dtype=torch.long), torch.Generator())


def test_minibatches_are_degraded_and_otherwise_the_same():
    """The same samples with the same augmentation, and of those about the given part degraded; again and again."""
    values = hparams.resolve_hparams("ERM", "FullColoredDigits")
    dataset = get_dataset_class("FullColoredDigits").build(None, values, 0, None)
    parts = [(0, np.arange(400))]

    def batch(degrade):
        loader = MinibatchLoader(dataset, parts, 200, False, 0, torch.device("cpu"), degrade=degrade)
        try:
            return loader.minibatches(3)[0]
        finally:
            loader.close()

    clean, half, again = batch(0.0), batch(0.5), batch(0.5)
    assert torch.equal(clean[1], half[1]) and torch.equal(half[0], again[0])
    changed = (clean[0] != half[0]).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.5, abs=0.15)


# Whole runs ---------------------------------------------------------------------------------------------------------


def test_records_hold_bits_by_environment_and_by_degradation(main, tmp_path):
    options = (
        "--dataset",
        "FullColoredDigits",
        "--steps",
        6,
        "--checkpoint_freq",
        3,
        "--test_envs",
        2,
        "--skip_model_save",
    )
    main("train", *options, "--algorithm", "DQMQ", "--output_dir", tmp_path / "run" / "dqmq")
    lines = (tmp_path / "run" / "dqmq" / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [("env2_degraded" in record) for record in records] == [False] * (len(records) - 1) + [True]
    last = records[-1]
    for env in range(3):
        assert 2 <= last[f"env{env}_mean_bits"] <= 8
        assert 0 < last[f"env{env}_bitops"] <= last["bitops_8bit"]
    assert last["bitops"] / last["bitops_8bit"] == pytest.approx(0.25, rel=0.05)
    cases = last["env2_degraded"]
    assert len(cases) == 1 + 5 * 5 and cases[0]["degradation"] == "none"
    assert all(0 <= case["accuracy"] <= 1 and 2 <= case["mean_bits"] <= 8 for case in cases)
    table = main("collect", "--input_dir", tmp_path / "run", "--selection", "training-domain").stdout
    assert "Bits" in table and "BitOPs (of 8 bits)" in table and "(25%)" in table


def test_evaluating_degraded_copies_changes_nothing_else(main, tmp_path):
    for wanted in ("true", "false"):
        main("train", "--dataset", "FullColoredDigits", "--algorithm", "UniformQuant", "--steps", 4, "--checkpoint_freq", 2,
             "--hparams", f'{{"degraded_evaluation": {wanted}}}', "--output_dir", tmp_path / wanted)  # fmt: skip
    models = [
        torch.load(tmp_path / wanted / "model.pkl", weights_only=True)["model_dict"] for wanted in ("true", "false")
    ]
    assert all(torch.equal(v, models[1][k]) for k, v in models[0].items() if isinstance(v, torch.Tensor))


def test_other_algorithms_can_be_degraded_too(main, tmp_path):
    options = ("--dataset", "FullColoredDigits", "--algorithm", "ERM", "--steps", 3, "--skip_model_save")
    losses = []
    for degrade in ("0.0", "1.0"):
        main("train", *options, "--hparams", f'{{"degrade": {degrade}}}', "--output_dir", tmp_path / degrade)
        losses.append(json.loads((tmp_path / degrade / "results.jsonl").read_text().splitlines()[-1])["loss"])
    assert losses[0] != losses[1]
