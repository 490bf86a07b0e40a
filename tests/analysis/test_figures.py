"""Figures: what they show, what they leave out and say so."""

from __future__ import annotations

import csv
import json
import sys

import pandas as pd
import pytest
from compared_rows import write_row

import domainbed_sfp as dsfp

# --- figures


@pytest.fixture
def sparsities(tmp_path):
    """Magnitude and SFP at three sparsities and ERM, three trials, two environments."""
    directory = tmp_path / "sparsities"
    write_row(directory, "ERM", {0: [0.7, 0.71, 0.72], 1: [0.6, 0.62, 0.64]}, sparsity=0.0)
    for algorithm, level in (("Magnitude", 0.68), ("SFP", 0.74)):
        for sparsity in (0.9, 0.3, 0.5):
            value = level - 0.1 * sparsity
            values = {0: [value, value + 0.02, value + 0.01], 1: [value - 0.1, value, value + 0.03]}
            write_row(directory, algorithm, values, sparsity=sparsity, hparams={"sparsity": sparsity})
    return directory


def draw(main, directory, kind, output, *arguments):
    pytest.importorskip("matplotlib", reason="figures need the extra plots")
    done = main("collect", "--input_dir", directory, "--plot", kind, "--output", output, *arguments)
    with open(output.with_suffix(".csv"), newline="") as file:
        return done, list(csv.DictReader(file))


def averages(main, directory) -> dict[str, dict]:
    document = main("collect", "--input_dir", directory, "--selection", "training-domain", "--format", "json").stdout
    return {row["label"]: row for table in json.loads(document)["tables"] for row in table["rows"]}


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_fronts(main, sparsities, tmp_path, suffix, magic):
    output = tmp_path / f"fronts{suffix}"
    done, points = draw(main, sparsities, "fronts", output)
    assert output.read_bytes().startswith(magic) and str(output) in done.stdout and done.stderr == ""
    rows = averages(main, sparsities)
    assert len(points) == len(rows) == 7
    for point in points:
        row = rows[point["row"]]
        assert float(point["accuracy"]) == row["average"]["accuracy"]
        assert float(point["std_err"]) == row["average"]["std_err"]
        assert float(point["cost"]) == row["costs"]["macs"] and point["cost_name"] == "macs"
    # SFP at .9, .5 and .3 by rising cost and accuracy; ERM costs more and does worse, Magnitude lies below.
    front = {point["row"] for point in points if point["on_front"] == "1"}
    assert front == {f"SFP (sparsity={sparsity})" for sparsity in (0.3, 0.5, 0.9)}


def test_a_figure_says_what_its_bars_are(tmp_path):
    """A single trial has no standard error."""
    pytest.importorskip("matplotlib", reason="figures need the extra plots")

    def said(*names: str) -> str:
        frames = [dsfp.read_records(tmp_path / name) for name in names]
        title = dsfp.plot.fronts(pd.concat(frames)).figure.get_suptitle()
        return " ".join(title.split()).lower()

    write_row(tmp_path / "three", "ERM", {0: [0.7, 0.71, 0.72], 1: [0.6, 0.62, 0.64]}, sparsity=0.0)
    write_row(tmp_path / "one", "SFP", {0: [0.7], 1: [0.6]}, sparsity=0.5)
    assert "bars: standard error over trials. model" in said("three")
    assert "bars: standard error over trials, none of a single one. model" in said("three", "one")
    assert "a single trial each, so no bars. model" in said("one")


def test_the_same_records_draw_the_same_file(main, sparsities, tmp_path):
    for suffix in (".png", ".svg", ".pdf"):
        drawn = []
        for _ in range(2):
            draw(main, sparsities, "fronts", tmp_path / f"again{suffix}")
            drawn.append((tmp_path / f"again{suffix}").read_bytes())
        assert drawn[0] == drawn[1]


def test_fronts_are_over_bitops_where_records_have_them(main, tmp_path):
    directory = tmp_path / "bits"
    write_row(directory, "DQMQ", {0: [0.6, 0.7], 1: [0.6, 0.7]}, sparsity=0.0, bitops=4000 * 64)
    write_row(directory, "ERM", {0: [0.7, 0.7], 1: [0.7, 0.7]}, sparsity=0.0)
    _, points = draw(main, directory, "fronts", tmp_path / "bits.svg")
    costs = {
        point["row"]: (point["cost_name"], float(point["cost"]), point["single_precision"] == "1") for point in points
    }
    assert costs == {"DQMQ": ("bitops", 256_000.0, False), "ERM": ("bitops", 4000 * 1024.0, True)}
    assert "32 x 32 BitOPs" in (tmp_path / "bits.svg").read_text()


def test_bitops_are_those_of_the_test_environments_images(main, tmp_path):
    """Where widths depend on the image, what training images cost is not what the accuracy was reached with."""
    directory = tmp_path / "bits"
    measured = {"env0_bitops": 3000.0, "env1_bitops": 5000.0, "env0_mean_bits": 3.0, "env1_mean_bits": 4.0}
    write_row(directory, "DQMQ", {0: [0.6], 1: [0.6]}, sparsity=0.0, bitops=2000, mean_bits=2.5, **measured)
    write_row(directory, "UniformQuant", {0: [0.6], 1: [0.6]}, sparsity=0.0, bitops=2000, mean_bits=2.5)
    rows = averages(main, directory)
    assert rows["DQMQ"]["costs"]["bitops"] == 4000 and rows["DQMQ"]["costs"]["mean_bits"] == 3.5
    assert rows["UniformQuant"]["costs"]["bitops"] == 2000


def test_curves_join_the_sparsities_of_an_algorithm(main, sparsities, tmp_path):
    output = tmp_path / "curves.svg"
    _, points = draw(main, sparsities, "curves", output)
    rows = averages(main, sparsities)
    assert len(points) == 7 * 3  # two environments and their average
    assert {point["line"] for point in points} == {"ERM", "Magnitude", "SFP"}
    for point in points:
        row = rows[point["row"]]
        cell = row["average"] if point["environment"] == "average" else row["cells"][int(point["environment"][-1])]
        assert (float(point["accuracy"]), float(point["std_err"])) == (cell["accuracy"], cell["std_err"])
        assert float(point["sparsity"]) == row["costs"]["sparsity"] and int(point["trials"]) == 3
    drawn = output.read_text()
    for shown in ("Tiny: env0", "Tiny: env1", "Tiny: average of environments", "Magnitude", "Sparsity (%)"):
        assert shown in drawn


def test_curves_keep_other_settings_apart(main, tmp_path):
    directory = tmp_path / "settings"
    for sparsity in (0.3, 0.7):
        for objective in ("ERM", "IRM"):
            hparams = {"sparsity": sparsity, "objective": objective}
            write_row(directory, "Magnitude", {0: [0.5, 0.6]}, sparsity=sparsity, hparams=hparams)
    _, points = draw(main, directory, "curves", tmp_path / "curves.png")
    assert {(point["line"], point["sparsity"]) for point in points} == {
        (f"Magnitude (objective={objective})", sparsity) for objective in ("ERM", "IRM") for sparsity in ("0.3", "0.7")
    }


def test_the_critical_difference_diagram(main, three_datasets, tmp_path):
    output = tmp_path / "cd.svg"
    _, points = draw(main, three_datasets, "cd", output)
    assert [(point["row"], point["mean_rank"]) for point in points] == [
        ("SFP", "1.0"),
        ("ERM", "2.0"),
        ("Taylor", "3.0"),
    ]
    assert float(points[0]["critical_difference"]) == pytest.approx(1.913, abs=2e-3)
    drawn = output.read_text()
    for shown in ("SFP (1.00)", "Taylor (3.00)", "CD = 1.91", "Large, Small, Tiny"):
        assert shown in drawn


def test_what_a_figure_leaves_out_is_said(main, sparsities, tmp_path):
    write_row(sparsities, "CORAL", {0: [0.5, 0.5], 1: [0.5, 0.5]})
    write_row(sparsities, "Taylor", {0: [0.5, 0.5]}, sparsity=0.5)
    done, _ = draw(main, sparsities, "fronts", tmp_path / "fronts.png")
    assert "Tiny: left out, the records do not say their macs: CORAL." in done.stderr
    assert "Tiny: left out, no result in some tested environment: Taylor." in done.stderr
    done, points = draw(main, sparsities, "curves", tmp_path / "curves.png")
    assert "Tiny: left out, the records do not say their sparsity: CORAL." in done.stderr
    assert "Tiny: left out, no result for env1: Taylor." in done.stderr
    assert [point["environment"] for point in points if point["row"] == "Taylor"] == ["env0"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--plot", "front", "--output", "x.png"], "unknown --plot 'front'; did you mean 'fronts'?"),
        (["--plot", "fronts"], "--plot fronts needs --output FILE, whose name ends in .png or .svg or .pdf"),
        (["--plot", "fronts", "--output", "x.pn"], "unknown suffix of --output '.pn'; did you mean '.png'?"),
        (["--plot", "fronts", "--output", "x.png", "--selection", "all"], "--plot draws one selection rule"),
        (["--plot", "fronts", "--output", "x.png", "--format", "csv"], "--format does not go with --plot"),
        (["--plot", "fronts", "--output", "x.png", "--compare", "ERM"], "--compare does not go with --plot"),
        (["--plot", "cd", "--output", "x.png"], "--plot cd ranks rows over data sets: it needs two or more, here is one (Tiny)"),
        (["--plot", "fronts", "--output", "nowhere/x.png"], "--output nowhere/x.png: No such file or directory"),
        (["--exclude", "ERM"], "--exclude goes with --compare"),
    ],
)  # fmt: skip
def test_figures_that_cannot_be(main, sparsities, tmp_path, arguments, message):
    pytest.importorskip("matplotlib", reason="figures need the extra plots")
    done = main("collect", "--input_dir", sparsities, *arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
    assert not list(tmp_path.glob("x.*"))


def test_records_without_costs_draw_nothing(main, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra plots")
    write_row(tmp_path / "plain", "ERM", {0: [0.5, 0.6]})
    for kind, lacking in (("fronts", "macs"), ("curves", "sparsity")):
        done = main("collect", "--input_dir", tmp_path / "plain", "--plot", kind, "--output", "x.png", check=False)
        assert (
            done.returncode == 2
            and f"nothing to draw. Tiny: left out, the records do not say their {lacking}: ERM" in done.stderr
        )


def test_without_matplotlib_the_extra_is_named(main, sparsities, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = main("collect", "--input_dir", sparsities, "--plot", "fronts", "--output", "x.png", check=False)
    assert done.returncode == 2 and "pip install 'domainbed_sfp[plots]'" in done.stderr


def test_many_rows_look_different():
    from domainbed_sfp.analysis.figures.panels import Looks

    looks = Looks((f"row {number}", None) for number in range(60))
    seen = {(look["color"], look["marker"], look["markerfacecolor"]) for look in map(looks.of, looks.names)}
    assert len(seen) == 60
