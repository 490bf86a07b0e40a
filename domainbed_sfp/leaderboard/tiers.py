"""The tiers: what was shown of an entry, from nothing to everything. Each has rankings of its own."""

from __future__ import annotations

from collections.abc import Mapping

SELF_REPORTED = "self-reported"
RECORDS_VERIFIED = "records-verified"
MODEL_VERIFIED = "model-verified"
RERUN_VERIFIED = "rerun-verified"
RERUN_IDENTICAL = "rerun-identical"
TIERS = (SELF_REPORTED, RECORDS_VERIFIED, MODEL_VERIFIED, RERUN_VERIFIED, RERUN_IDENTICAL)

# tier -> (what was checked, what was not)
NOTES: Mapping[str, tuple[str, str]] = {
    SELF_REPORTED: (
        "what could be; each entry's notes say what could not, such as an algorithm that is not installed",
        "the rest. These entries are not ranked",
    ),
    RECORDS_VERIFIED: (
        "every number follows from the records, and the records keep protocol, seeds, drawn hparams, splits, selection "
        "rule and masks; where an entry says so, the first step of every run was computed again",
        "whether the later records were measured at all. Accuracies that were raised alike in all records, or invented "
        "with care, look the same",
    ),
    MODEL_VERIFIED: (
        "all that the records show; and the weights of every selected checkpoint give its accuracies, sparsity and "
        "bit-widths on the data",
        "how the weights came about. A network that was trained on the test environment looks the same",
    ),
    RERUN_VERIFIED: (
        "all that the records show; and cited runs of every test environment, drawn after the bundle was fixed, were "
        "trained again and agreed in every record, on another machine or version within a tolerance, and in the mean",
        "the runs that were not drawn, and differences within the tolerance",
    ),
    RERUN_IDENTICAL: (
        "all that the records show; and cited runs of every test environment, drawn after the bundle was fixed, were "
        "trained again and gave the same records bit by bit",
        "the runs that were not drawn",
    ),
}
