"""The table and the plot of how rankings converge."""

from __future__ import annotations

import csv
import importlib.util
import sys

import pytest
from runs_on_disk import record, write_run

from domainbed_sfp.analysis import rankings

NO_MATPLOTLIB = importlib.util.find_spec("matplotlib") is None


def agreement(step, taus, weight=0.1, trial=0, **fields):
    hparams = {"rank_loss": "listmle", "rank_weight": weight, "voting": "majority", "sparsity": 0.5}
    told = {f"rank_tau_env{i}": tau for i, tau in enumerate(taus)}
    told.update({f"rank_overlap_env{i}": tau / 2 for i, tau in enumerate(taus)})
    return record(
        (0.5,) * 6,
        step=step,
        test_envs=(1,),
        algorithm="GlobalPru",
        trial_seed=trial,
        hparams=hparams,
        **told,
        **fields,
    )


@pytest.fixture
def sweep(tmp_path):
    names = {"environments": ["art", "photo", "sketch"]}
    write_run(
        tmp_path / "sweep",
        "a",
        [record((0.5,) * 6, test_envs=(1,)), agreement(20, (0.2, 0.4), **names), agreement(40, (0.6, 0.8), **names)],
    )
    write_run(tmp_path / "sweep", "b", [agreement(20, (0.4, 0.4), trial=1, **names)])
    write_run(tmp_path / "sweep", "c", [agreement(20, (0.1, 0.1), weight=0.0, **names)])
    write_run(tmp_path / "sweep", "d", [record((0.5,) * 6)])
    return tmp_path / "sweep"


def test_rows_name_the_training_environments(main, sweep):
    rows = list(csv.DictReader(main("rankings", "--input_dir", sweep).stdout.splitlines()))
    told = [(row["run"], row["step"], row["environment"], row["tau"], row["overlap"]) for row in rows]
    assert told == [
        ("a", "20", "art", "0.2", "0.1"), ("a", "20", "sketch", "0.4", "0.2"),
        ("a", "40", "art", "0.6", "0.3"), ("a", "40", "sketch", "0.8", "0.4"),
        ("b", "20", "art", "0.4", "0.2"), ("b", "20", "sketch", "0.4", "0.2"),
        ("c", "20", "art", "0.1", "0.05"), ("c", "20", "sketch", "0.1", "0.05"),
    ]  # fmt: skip
    assert {row["test_envs"] for row in rows} == {"photo"} and [row["rank_weight"] for row in rows][-1] == "0.0"


def test_trials_are_averaged_and_settings_kept_apart(sweep):
    rows = rankings.agreement_rows(sweep, pytest.fail)
    means = rankings.mean_over_trials(rows)
    settings = ("Tiny", "photo", "listmle", 0.1, "majority", 0.5)
    assert means[(*settings, "art")] == [(20, pytest.approx(0.3)), (40, 0.6)]
    assert means[("Tiny", "photo", "listmle", 0.0, "majority", 0.5, "sketch")] == [(20, 0.1)]
    assert len(means) == 4


def test_runs_that_differ_otherwise_are_not_averaged_in_silence(main, sweep):
    names = {"environments": ["art", "photo", "sketch"]}
    write_run(sweep, "e", [agreement(20, (0.9, 0.9), trial=2, args={"hparams": '{"lr": 0.1}'}, **names)])
    told = main("rankings", "--input_dir", sweep).stderr
    assert told.count("warning: ") == 1 and "(lr=0.1 and defaults)" in told and "/e:" in told


def test_runs_of_several_hparams_seeds_are_not_averaged_in_silence(main, sweep):
    names = {"environments": ["art", "photo", "sketch"]}
    write_run(sweep, "e", [agreement(20, (0.9, 0.9), trial=2, args={"hparams_seed": 3}, **names)])
    told = main("rankings", "--input_dir", sweep).stderr
    assert told.count("warning: ") == 1 and "(hparams_seed=3 and hparams_seed=0)" in told


def test_a_foreign_record_is_named(main, sweep):
    for broken in ({"args": {"test_envs": [9]}}, {"args": {"hparams": "{"}}):
        write_run(sweep, "foreign", [agreement(20, (0.9, 0.9), trial=2, **broken)])
        done = main("rankings", "--input_dir", sweep, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "foreign/results.jsonl" in done.stderr


def test_domainbeds_records_have_no_names(tmp_path):
    write_run(tmp_path, "a", [agreement(20, (0.2, 0.4))])
    rows = rankings.agreement_rows(tmp_path, pytest.fail)
    assert [row["environment"] for row in rows] == ["env0", "env2"] and rows[0]["test_envs"] == "env1"


@pytest.mark.skipif(NO_MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_plot(main, sweep, tmp_path, suffix, magic):
    main("rankings", "--input_dir", sweep, "--output", "tau.csv", "--plot", f"tau.{suffix}")
    assert (tmp_path / f"tau.{suffix}").read_bytes().startswith(magic)
    assert (tmp_path / "tau.csv").read_text().startswith("run,dataset,test_envs")
    if suffix == "svg":
        assert b">sketch<" in (tmp_path / "tau.svg").read_bytes()


def test_bad_input_is_told_in_one_line(main, sweep, tmp_path, monkeypatch):
    write_run(tmp_path / "others", "a", [record((0.5,) * 6)])
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    for arguments, told in (
        (("--input_dir", tmp_path / "nowhere"), "expected a directory of runs"),
        (("--input_dir", tmp_path / "empty"), "no run with a record"),
        (("--input_dir", tmp_path / "others"), "no record of its 1 runs tells how far rankings agree"),
        (("--input_dir", sweep, "--plot", "tau.pgn"), "did you mean '.png'"),
        (("--input_dir", sweep, "--plot", "tau.png"), "domainbed_sfp[plots]"),
        (("--input_dir", sweep, "--output", "nowhere/tau.csv"), "--output nowhere/tau.csv"),
    ):
        done = main("rankings", *arguments, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and told in done.stderr, told
