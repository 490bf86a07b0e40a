"""One row against another, on one data set and over several."""

from __future__ import annotations

import csv
import json
import math

import pytest
from compared_rows import write_row


def comparison(main, directory, *arguments):
    done = main(
        *("collect", "--input_dir", directory, "--selection", "training-domain", "--format", "json", *arguments)
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def two_rows(tmp_path):
    """Pairs that differ by 10, 20, 30 percentage points in environment 0 and by 0, 10, 20 in environment 1."""
    directory = tmp_path / "two_rows"
    write_row(directory, "SFP", {0: [0.6, 0.7, 0.8], 1: [0.5, 0.6, 0.7]}, sparsity=0.5, standing="reconstruction")
    write_row(directory, "Magnitude", {0: [0.5, 0.5, 0.5], 1: [0.5, 0.5, 0.5]}, sparsity=0.5)
    return directory


def test_one_row_against_another(main, two_rows):
    document = comparison(main, two_rows, "--compare", "SFP", "Magnitude")
    (table,) = document["tables"]
    (one,) = table["comparisons"]
    assert one["difference"] == pytest.approx(15.0) and one["pairs"] == 6
    assert (one["won"], one["tied"], one["lost"]) == (5, 1, 0)
    # The deviations -5, 5, 15, -15, -5, 5: a sum of squares of 550, standard error sqrt(550 / 5 / 6).
    assert one["t"] == pytest.approx(15 / math.sqrt(550 / 30))
    assert one["p_t_holm"] == one["p_t"]
    assert one["p_wilcoxon"] == pytest.approx(2 / 32)
    assert table["row"]["average"] == pytest.approx(65.0) and table["row"]["standing"] == "reconstruction"
    assert (one["other"]["bootstrap_low"], one["other"]["bootstrap_high"]) == (50.0, 50.0)
    assert one["unpaired"] == [] and table["environments"] == ["env0", "env1"]
    # The same average and error as in the table.
    tables = json.loads(
        main("collect", "--input_dir", two_rows, "--selection", "training-domain", "--format", "json").stdout
    )
    by_label = {row["label"]: row["average"] for row in tables["tables"][0]["rows"]}
    assert (table["row"]["average"], table["row"]["std_err"]) == (
        by_label["SFP"]["accuracy"],
        by_label["SFP"]["std_err"],
    )


def test_the_text_says_what_it_rests_on(main, two_rows):
    text = main(
        "collect", "--input_dir", two_rows, "--compare", "SFP †", "Magnitude", "--selection", "training-domain"
    ).stdout
    line = next(line for line in text.splitlines() if line.startswith("| Magnitude"))
    expected = ["50.0 ± 0.0", "50.0 to 50.0", "+15.0", "+4.0 to +26.0", "6", "5/1/0", "0.017", "0.017", "0.062"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["Magnitude", *expected]
    for said in (
        "two runs with the same test environment and trial seed",
        "resamples of the trials within each environment; the environments are not resampled",
        "the primary test, because few trials leave a Wilcoxon test no p that is small",
        "The pairs are not independent: trials of one environment share its test images",
        "Magnitude: 5 pairs with a difference: the smallest p of a Wilcoxon test is 0.0625, it cannot reach 0.05.",
        "no test over data sets (Friedman, Nemenyi, Wilcoxon), Tiny is the only one compared",
        "† reconstruction",
    ):
        assert said in text


def test_exchanging_the_rows_changes_the_sign(main, two_rows):
    (there,) = comparison(main, two_rows, "--compare", "SFP", "Magnitude")["tables"][0]["comparisons"]
    (back,) = comparison(main, two_rows, "--compare", "Magnitude", "SFP")["tables"][0]["comparisons"]
    assert (back["difference"], back["low"], back["high"]) == (-there["difference"], -there["high"], -there["low"])
    assert (back["p_t"], back["p_wilcoxon"]) == (there["p_t"], there["p_wilcoxon"])


def test_pairs_without_a_partner_are_listed(main, two_rows):
    write_row(two_rows, "Taylor", {0: [0.4, 0.5, 0.6], 1: [0.5, 0.5, 0.6]}, sparsity=0.5, skip=((0, 1), (0, 2)))
    write_row(two_rows, "Random", {0: [0.4, 0.4, 0.4, 0.4], 1: [0.4]}, sparsity=0.5)
    document = comparison(main, two_rows, "--compare", "SFP", "Taylor", "Random")
    taylor, random = document["tables"][0]["comparisons"]
    assert taylor["pairs"] == 4 and random["pairs"] == 4
    assert taylor["unpaired"] == [{"lacking": "Taylor", "environment": "env0", "trial_seeds": [1, 2]}]
    assert random["unpaired"] == [
        {"lacking": "SFP", "environment": "env0", "trial_seeds": [3]},
        {"lacking": "Random", "environment": "env1", "trial_seeds": [1, 2]},
    ]
    notes = "\n".join(document["tables"][0]["notes"])
    assert "SFP and Taylor: 2 pairs not formed: env0 trial 1-2 (no result of Taylor)." in notes
    assert "SFP and Random: 3 pairs not formed: env0 trial 3 (no result of SFP); env1 trial 1-2" in notes


def test_alone_a_row_is_compared_with_every_other_and_corrected(main, two_rows):
    write_row(two_rows, "ERM", {0: [0.55, 0.61, 0.7], 1: [0.4, 0.55, 0.5]})
    write_row(two_rows, "Taylor", {0: [0.58, 0.71, 0.7], 1: [0.4, 0.58, 0.7]}, sparsity=0.7)
    compared = comparison(main, two_rows, "--compare", "SFP")["tables"][0]["comparisons"]
    assert [one["other"]["label"] for one in compared] == ["ERM", "Magnitude", "Taylor"]
    ordered = sorted((one["p_t"], one["p_t_holm"]) for one in compared)
    expected = [3 * ordered[0][0], max(3 * ordered[0][0], 2 * ordered[1][0]), max(2 * ordered[1][0], ordered[2][0])]
    assert [adjusted for _, adjusted in ordered] == pytest.approx(expected)
    fewer = comparison(main, two_rows, "--compare", "SFP", "--exclude", "Taylor")["tables"][0]
    assert [one["other"]["label"] for one in fewer["comparisons"]] == ["ERM", "Magnitude"]
    assert "Left out by --exclude: Taylor." in fewer["notes"]


def test_best_is_the_best_other_pruning_row_of_equal_sparsity(main, two_rows):
    high = {0: [0.9, 0.9, 0.9], 1: [0.9, 0.9, 0.9]}
    middle = {0: [0.6, 0.6, 0.6], 1: [0.5, 0.6, 0.6]}
    write_row(two_rows, "ERM", high, sparsity=0.0)
    write_row(two_rows, "Random", high, sparsity=0.7)
    write_row(two_rows, "SNIP", high, sparsity=0.5, granularity="weight")
    streams = {"prune_residual_streams": True}
    for name, values in (("Magnitude", high), ("GraSP", middle)):
        write_row(two_rows, name, values, sparsity=0.5, granularity="channel", hparams=streams)
    write_row(two_rows, "DCWP", high, sparsity=0.5, skip=((1, 0), (1, 1), (1, 2)))
    write_row(two_rows, "Taylor", middle, sparsity=0.503)
    (table,) = comparison(main, two_rows, "--compare", "SFP", "best")["tables"]
    (one,) = table["comparisons"]
    assert one["other"]["label"] == "Taylor" and one["best"] is True
    note = next(note for note in table["notes"] if note.startswith("best:"))
    assert note.startswith("best: Taylor, the highest test accuracy (58.3) of 2 other pruning rows of sparsity 50.0%")
    assert "Choosing it by test accuracy favours it" in note and "conservative for SFP" in note
    assert "for want of a result in an environment: DCWP" in note
    text = main("collect", "--input_dir", two_rows, "--compare", "SFP", "best", "Magnitude").stdout
    assert "| Taylor [best] |" in text and "| Magnitude " in text
    # Named and best at once it is one test, not two.
    named = comparison(main, two_rows, "--compare", "SFP", "best", "Taylor")["tables"][0]["comparisons"]
    assert [(one["other"]["label"], one["best"]) for one in named] == [("Taylor", True)]
    excluded = comparison(main, two_rows, "--compare", "SFP", "best", "--exclude", "Taylor")["tables"][0]
    assert excluded["comparisons"][0]["other"]["label"] == "Magnitude"
    row = "GraSP"
    among = comparison(main, two_rows, "--compare", row, "best")["tables"][0]
    assert among["comparisons"][0]["other"]["label"] == "Magnitude (prune_residual_streams=true)"
    assert any("of 1 other pruning row of sparsity 50.0% (channels, residual streams too)" in n for n in among["notes"])


def test_best_of_a_quantizing_row_has_equal_bitops(main, tmp_path):
    low, middle, high = ({0: [value] * 3, 1: [value] * 3} for value in (0.5, 0.6, 0.9))
    write_row(tmp_path, "DQMQ", middle, sparsity=0.0, bitops=2000.0, bitops_8bit=10_000.0)
    write_row(tmp_path, "UniformQuant", high, sparsity=0.0, bitops=2200.0, bitops_8bit=10_000.0)
    write_row(tmp_path, "StaticMixedPrecision", low, sparsity=0.0, bitops=1910.0, bitops_8bit=10_000.0)
    write_row(tmp_path, "Magnitude", high, sparsity=0.5)
    write_row(tmp_path, "ERM", high, sparsity=0.0)
    (table,) = comparison(main, tmp_path, "--compare", "DQMQ", "best")["tables"]
    assert [one["other"]["label"] for one in table["comparisons"]] == ["StaticMixedPrecision"]
    assert "of 1 other quantizing row of 20.0% of the 8-bit network's BitOPs, within 5 %." in " ".join(table["notes"])
    refused = main("collect", "--input_dir", tmp_path, "--compare", "ERM", "best", check=False)
    assert refused.returncode == 2 and "ERM neither prunes nor quantizes" in refused.stderr


def test_a_single_trial_has_no_interval_and_says_so(main, tmp_path):
    for algorithm, value in (("SFP", 0.7), ("ERM", 0.6)):
        write_row(tmp_path / "one", algorithm, {0: [value]})
    (table,) = comparison(main, tmp_path / "one", "--compare", "SFP", "ERM")["tables"]
    (one,) = table["comparisons"]
    assert (one["difference"], one["low"], one["p_t"], one["p_t_holm"]) == (pytest.approx(10), None, None, None)
    assert table["environments"] == ["env0"] and table["row"]["bootstrap_low"] is None
    notes = "\n".join(table["notes"])
    assert "ERM: 1 pair: a t-test and an interval need two." in notes
    assert "in place of a bootstrap interval: an environment has fewer than two trials." in notes
    text = main("collect", "--input_dir", tmp_path / "one", "--compare", "SFP", "ERM").stdout
    line = next(line for line in text.splitlines() if line.startswith("| ERM"))
    absent = "\N{EN DASH}"
    expected = ["ERM", f"60.0 ± {absent}", absent, "+10.0", absent, "1", "1/0/0", absent, absent, "1.000"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["SFQ"], "unknown --compare row 'SFQ'; did you mean 'SFP'?"),
        (["SFP", "Magnitud"], "unknown --compare row 'Magnitud'; did you mean 'Magnitude'?"),
        (["best"], "unknown --compare row 'best'"),
        (["SFP", "SFP"], "--compare 'SFP' names a row and itself"),
        (["Taylor"], "--compare 'Taylor' is more than one row; give one of: Taylor (sparsity=0.3); Taylor (sparsity=0.7)"),
        (["Taylor (sparsity=0.3)", "best"], "no other pruning row of sparsity 30.0% has a result in every tested environment"),
        (["SFP", "--exclude", "Tailor"], "unknown --exclude row 'Tailor'; did you mean 'Taylor'?"),
        (["SFP", "Magnitude", "--exclude", "Taylor"], "--exclude narrows 'best' or 'every row'"),
        (["SFP", "best", "--exclude", "SFP"], "--exclude 'SFP' is the row that --compare is about; expected others"),
        (["SFP", "--format", "domainbed"], "--compare does not go with --format domainbed"),
        (["SFP", "--published"], "--published does not go with --compare"),
    ],
)  # fmt: skip
def test_names_that_are_none(main, two_rows, arguments, message):
    for sparsity in (0.3, 0.7):
        write_row(two_rows, "Taylor", {0: [0.5], 1: [0.5]}, sparsity=sparsity, hparams={"sparsity": sparsity})
    done = main("collect", "--input_dir", two_rows, "--compare", *arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr


def test_over_data_sets(main, three_datasets):
    document = comparison(main, three_datasets, "--compare", "SFP")
    (across,) = document["across_datasets"]
    assert across["datasets"] == ["Large", "Small", "Tiny"]
    erm, taylor = across["comparisons"]
    assert (erm["other"], erm["won"], erm["difference"]) == ("ERM", 3, pytest.approx(10.0))
    assert erm["p_wilcoxon"] == 0.25 and erm["p_wilcoxon_holm"] == 0.5 and taylor["difference"] == pytest.approx(30.0)
    ranks = {row["label"]: row["mean_rank"] for row in across["ranking"]["rows"]}
    assert ranks == {"SFP": 1.0, "ERM": 2.0, "Taylor": 3.0}
    assert across["ranking"]["friedman_chi_square"] == pytest.approx(6.0)
    text = main("collect", "--input_dir", three_datasets, "--compare", "SFP", "--selection", "training-domain").stdout
    assert "SFP compared over data sets (Large, Small, Tiny)" in text
    assert "3 data sets with a difference: the smallest p of a Wilcoxon test is 0.25, it cannot reach 0.05." in text
    assert "chi-square 6.00" in text and "critical difference 1.91" in text
    pair = main("collect", "--input_dir", three_datasets, "--compare", "SFP", "best").stdout
    assert "best at equal compression" in pair and "No Friedman test: it ranks three rows or more, here 1." in pair


def test_two_data_sets_are_too_few_for_any_difference(main, three_datasets):
    for run in three_datasets.glob("Tiny-*"):
        (run / "results.jsonl").unlink()
    text = main("collect", "--input_dir", three_datasets, "--compare", "SFP").stdout
    assert "With 2 data sets no two of 3 rows can differ by the critical difference; that takes 3." in text


@pytest.mark.parametrize("format_name", ["markdown", "latex", "csv", "json"])
def test_every_format_holds_every_comparison(main, three_datasets, format_name):
    text = main("collect", "--input_dir", three_datasets, "--compare", "SFP", "--format", format_name).stdout
    for name in ("Tiny", "Small", "Large", "SFP", "ERM", "Taylor"):
        assert name in text
    if format_name == "csv":
        lines = list(csv.DictReader(text.splitlines()))
        assert len(lines) == 2 * (3 * 2 + 2)  # two rules, three data sets and the line over them, two other rows
        one = next(line for line in lines if (line["dataset"], line["other"]) == ("Small", "ERM"))
        assert float(one["difference"]) == pytest.approx(10.0) and one["pairs"] == "4" and one["best"] == "0"
        assert one["remarks"].startswith("all differences are equal")
