"""Sparsities, costs, masks and headers that were tampered with, under new sums."""

from __future__ import annotations

import torch
from changed_bundles import assert_told, edit, edit_submission, name_of, problems, resum, runs

from domainbed_sfp.algorithms import registry
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.commands import entries_of
from domainbed_sfp.runs import mask_files


def test_a_sparsity_that_the_masks_do_not_have(copy):
    for file in runs(copy):
        edit(file, lambda record: record.update(sparsity=0.9), slice(2, 3))
    resum(copy)
    told = problems(copy)
    assert any(
        ": line 3.sparsity: expected 0.5 of the channels, by masks/" in line and "found 0.9" in line for line in told
    )


def test_costs_that_the_masks_do_not_have(copy):
    for file in runs(copy):
        edit(
            file, lambda r: r.update(macs=10, dense_macs=r["dense_macs"] + 1, exported_bytes=r["exported_bytes"] - 4),
            slice(2, 3),
        )  # fmt: skip
    resum(copy)
    told = problems(copy)
    assert any(": line 3.exported_bytes: expected " in line and "by masks/" in line for line in told)
    assert any(": line 3.macs: expected 1," in line and "by masks/" in line and "found 10" in line for line in told)
    assert any(": line 3.dense_macs: expected 6,010,112, by" in line and "6,010,113" in line for line in told)


def test_more_parameters_left_than_there_are(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(surviving_parameters=10**9), slice(0, 1))
    resum(copy)
    assert_told(copy, name_of(file), "line 1.surviving_parameters", "at most parameters, 373,002", "1,000,000,000")


def test_masks_of_another_run(copy):
    """All masks are exchanged for ones that are sparser: their digests are in the records."""
    for file in (copy / "masks").iterdir():
        masks = mask_files.unpack(file.read_bytes())
        next(iter(masks.values()))[0] = False
        file.write_bytes(mask_files.pack(masks))
    resum(copy)
    (name, *_) = [file.stem for file in (copy / "masks").iterdir()]
    assert_told(copy, f"masks/{name}.safetensors", "digest of the masks", name, "")


def test_masks_of_another_network(copy):
    """Digest and sums are right, shapes are not."""
    masks = {"featurizer.conv1.weight": torch.ones(7, 3, dtype=torch.bool)}
    for file in list((copy / "masks").iterdir()):
        file.unlink()
    name = mask_files.keep(copy / "masks", masks)
    for file in runs(copy):
        edit(file, lambda record: record.update(masks=name), slice(2, 3))
    resum(copy)
    assert any(line.startswith(f"masks/{name}.safetensors: mask featurizer.conv1.weight: expected a mask of shape [") and "found shape [7, 3]" in line for line in problems(copy))  # fmt: skip


def test_masks_missing_and_masks_too_many(copy):
    (first, *_) = (copy / "masks").iterdir()
    first.rename(copy / "masks" / ("0" * 64 + ".safetensors"))
    resum(copy)
    assert_told(copy, f"masks/{first.name}", "", "the masks of records/", "no file")
    assert_told(
        copy, f"masks/{'0' * 64}.safetensors", "", "masks of a checkpoint that a selection rule chooses", "others"
    )


def test_environments_renamed(copy):
    for file in runs(copy):
        edit(file, lambda record: record.update(environments=["10%", "90%", "95%"]))
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.environments", '["95%", "90%", "10%"]', '["10%", "90%", "95%"]')


def test_header_and_standing(copy):
    for file in runs(copy):
        edit(file, lambda record: record.update(standing="reference"))
    edit_submission(
        copy,
        lambda d: d.update(
            transductive=True, standing="reference", reference="mine", commit="1234567", package="domainbed_sfp 9"
        ),
    )
    resum(copy)
    assert_told(copy, name_of(runs(copy)[0]), "line 1.standing", "published", "reference")
    assert_told(copy, "submission.json", "transductive", "false", "true")
    assert_told(copy, "submission.json", "reference", "Zhu & Gupta", "mine")
    assert_told(copy, "submission.json", "package", "domainbed_sfp 0", "domainbed_sfp 9")
    assert_told(copy, "submission.json", "commit", "", "1234567")


def test_never_compressed_and_a_wrong_epoch(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(final_compression=False))
    edit(file, lambda record: record.update(epoch=3.0), slice(0, 1))
    resum(copy)
    assert_told(
        copy,
        name_of(file),
        "line 3.final_compression",
        "true: Magnitude is at its final compression from step 4 on",
        "false",
    )
    assert_told(copy, name_of(file), "line 1.epoch", "0.0", "3.0")


def test_records_of_two_algorithms(copy):
    file = sorted(runs(copy))[-1]
    edit(file, lambda record: record["args"].update(algorithm="Taylor"))
    resum(copy)
    assert_told(copy, name_of(file), "line 1.args.algorithm", '"Magnitude" as in records/', '"Taylor"')


def test_an_algorithm_that_is_not_installed_is_self_reported(made, monkeypatch):
    monkeypatch.delitem(registry.ALGORITHMS.entries, "Magnitude")
    outcome = validation.validate(made)
    assert outcome.tier == "self-reported" and "unknown algorithm 'Magnitude'" in outcome.unchecked[0]
    # Not one of its costs has been counted anew.
    assert entries_of(outcome)[0].unverified == ("sparsity", "parameters", "surviving_parameters", "dense_macs", "macs", "exported_bytes")  # fmt: skip
    assert "not checked: hparams, masks and costs of Magnitude" in validation.text_of(outcome)
