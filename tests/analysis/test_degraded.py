"""What records say of degraded copies: the table, the cases, and whether widths move with quality."""

from __future__ import annotations

import csv
import importlib.util
import json

import pytest
from runs_on_disk import record, write_run

from domainbed_sfp.analysis import degraded
from domainbed_sfp.analysis.render.grids import ABSENT

NO_SCIPY = importlib.util.find_spec("scipy") is None
NO_MATPLOTLIB = importlib.util.find_spec("matplotlib") is None
KINDS = ("blur", "noise")


def cases(bits=None, accuracy=0.8, fall=0.1):
    """A case for the images as they are, and for severities 1 to 3 of two degradations; `bits` by severity."""
    found = []
    for kind, severity in [("none", 0), *((kind, severity) for kind in KINDS for severity in (1, 2, 3))]:
        case = {"degradation": kind, "severity": severity, "samples": 100, "accuracy": accuracy - fall * severity}
        if bits is not None:
            case.update(mean_bits=bits[severity], bitops=1000 * bits[severity])
        found.append(case)
    return found


def finished(found, algorithm="DQMQ", trial=0, **hparams):
    args = {"hparams": json.dumps(hparams)} if hparams else {}
    names = {"environments": ["art", "photo"], "standing": "reconstruction" if algorithm == "DQMQ" else "published"}
    early = record((0.5,) * 4, algorithm=algorithm, trial_seed=trial, args=args, **names)
    last = record((0.6,) * 4, step=9, algorithm=algorithm, trial_seed=trial, args=args, env0_degraded=found, **names)
    return [early, last]


@pytest.fixture
def sweep(tmp_path):
    root = tmp_path / "sweep"
    write_run(root, "a", finished(cases((3.0, 3.5, 4.0, 4.5))))
    write_run(root, "b", finished(cases((4.0, 3.5, 3.0, 2.5)), trial=1))
    write_run(root, "c", finished(cases((4.0, 4.5, 5.0, 5.5)), trial=2))
    write_run(root, "d", finished(cases((4.0,) * 4), "UniformQuant"))
    write_run(root, "e", finished(cases(), "ERM"))
    write_run(root, "f", finished(cases(), "ERM", trial=1), done=False)
    write_run(root, "g", [record((0.5,) * 4, algorithm="CORAL")])
    return root


@pytest.mark.skipif(NO_SCIPY, reason="scipy is not installed")
def test_table(main, sweep):
    result = main("degraded", "--input_dir", sweep)
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("|")]
    rows = {line[0].strip("| "): [cell.strip("| ") for cell in line[1:]] for line in lines[2:]}
    # Severity 0, 1 and 3 (there is no 5); two runs whose bits rise and one whose bits fall: rho 1, -1, 1.
    assert rows["DQMQ †"] == [
        "80.0",
        "70.0",
        "50.0",
        "3.67",
        "4.17",
        "+0.33 ± 0.67 (p = 0.67)",
        "blur +0.33, noise +0.33",
        "3",
    ]
    assert rows["UniformQuant"] == ["80.0", "70.0", "50.0", "4.00", "4.00", "the bits never move", ABSENT, "1"]
    assert rows["ERM"] == ["80.0", "70.0", "50.0", ABSENT, ABSENT, ABSENT, ABSENT, "1"]
    assert "† reconstruction" in result.stdout
    assert "not finished, left out" in result.stderr and "CORAL" not in result.stdout


def test_correlation_is_spearmans_within_a_degradation():
    """Severities 0, 1, 2, 3 and bits 0, 1, 1, 1 have the ranks 1, 2, 3, 4 and 1, 3, 3, 3: their products about the mean sum
    to 3, their squares to 5 and 3. That the other degradation falls does not hide it."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    bits = [0, 1, 1, 1, -1, -2, -3]
    told = [
        degraded.Case("D", "r", None, "x", 0, 0, "art", case["degradation"], case["severity"], 100, 50.0, bit, None)
        for case, bit in zip(cases((0.0,) * 4), bits)
    ]
    assert degraded.correlations(told) == {"blur": pytest.approx(3 / 15**0.5), "noise": pytest.approx(-1)}


@pytest.mark.skipif(NO_SCIPY, reason="scipy is not installed")
def test_runs_whose_bits_do_not_move_count(main, tmp_path):
    write_run(tmp_path, "a", finished(cases((3.0, 3.5, 4.0, 4.5))))
    write_run(tmp_path, "b", finished(cases((4.0,) * 4), trial=1))
    assert "+0.50 ± 0.50" in main("degraded", "--input_dir", tmp_path).stdout


@pytest.mark.skipif(NO_SCIPY, reason="scipy is not installed")
def test_a_run_that_is_there_twice_counts_once(main, tmp_path):
    write_run(tmp_path, "a", finished(cases((3.0, 3.5, 4.0, 4.5))))
    write_run(tmp_path, "b", finished(cases((3.0, 3.5, 4.0, 4.5))))
    result = main("degraded", "--input_dir", tmp_path)
    assert "(one run)" in result.stdout and "is the same run as" in result.stderr


def test_a_record_of_something_else_is_told_in_one_line(main, tmp_path):
    write_run(tmp_path, "a", [{"step": 9, "env0_degraded": []}])
    result = main("degraded", "--input_dir", tmp_path, check=False)
    assert "not one of DomainBed's or ours" in result.stderr and len(result.stderr.splitlines()) == 1


def test_rows_are_told_apart_by_their_settings(main, tmp_path):
    write_run(tmp_path, "a", finished(cases((3.0, 3.0, 3.0, 3.1)), target_bitops=0.2))
    write_run(tmp_path, "b", finished(cases((3.0, 3.0, 3.0, 3.1)), target_bitops=0.3))
    output = main("degraded", "--input_dir", tmp_path).stdout
    assert "DQMQ (target_bitops=0.2) †" in output and "DQMQ (target_bitops=0.3)" in output


@pytest.mark.skipif(NO_SCIPY or NO_MATPLOTLIB, reason="scipy and matplotlib, of extras, are not installed")
def test_files(main, sweep, tmp_path):
    files = {option: tmp_path / name for option, name in [("output", "t.md"), ("csv", "t.csv"), ("plot", "t.png")]}
    main("degraded", "--input_dir", sweep, *(word for option, file in files.items() for word in ("--" + option, file)))
    assert "DQMQ" in files["output"].read_text() and files["plot"].read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert len(rows) == 5 * 7
    assert list(dict.fromkeys(row["row"] for row in rows)) == ["ERM", "DQMQ", "UniformQuant"]  # as tables have them
    last = rows[13]
    assert (last["row"], last["environment"], last["degradation"], last["severity"]) == ("DQMQ", "art", "noise", "3")
    assert float(last["accuracy"]) == pytest.approx(50) and last["mean_bits"] == "4.5" and last["bitops"] == "4500.0"
    assert {row["mean_bits"] for row in rows if row["row"] == "ERM"} == {""}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--input_dir", "nowhere"], "expected a directory of runs"),
        (["--input_dir", "empty"], "holds no run with a record"),
        (["--input_dir", "plain"], "hparam degraded_evaluation"),
        (["--input_dir", "plain", "--plot", "x.pgn"], "did you mean '.png'"),
    ],
)
def test_bad_input_is_told_in_one_line(main, tmp_path, arguments, told):
    write_run(tmp_path / "plain", "a", [record((0.5,) * 4)])
    (tmp_path / "empty").mkdir()
    done = main("degraded", *arguments, check=False)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
