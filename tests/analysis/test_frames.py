"""The Python face: frames of a sweep whose numbers are those of `collect`, and the names of the package."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from runs_on_disk import record, write_run

import domainbed_sfp as dsfp
from domainbed_sfp.cli.main import main


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two rows in two test environments and three trials, of one of them at two checkpoints."""
    root = tmp_path_factory.mktemp("sweep")
    generator = np.random.default_rng(0)
    for algorithm, hparams in (("ERM", None), ("Magnitude", {"sparsity": 0.5})):
        for env in (0, 1):
            for trial in range(3):
                records = [
                    record(
                        tuple(generator.uniform(0.3, 0.9, 4)),
                        step=step,
                        test_envs=(env,),
                        algorithm=algorithm,
                        trial_seed=trial,
                        args={"hparams": json.dumps(hparams)} if hparams else None,
                        hparams=hparams,
                        sparsity=0.5 * (hparams is not None) * (step > 0),
                        macs=100.0,
                        dense_macs=200.0,
                        final_compression=hparams is None or step > 0,
                        standing="published",
                    )
                    for step in (0, 300)
                ]
                write_run(root, f"{algorithm}-{env}-{trial}", records)
    return root


def collected(sweep, capsys, *options):
    with pytest.raises(SystemExit) as ended:
        main(["collect", "--input_dir", str(sweep), "--selection", "training-domain", *options])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_frame_has_one_row_a_record(sweep):
    frame = dsfp.read_records(sweep)
    assert len(frame) == 24
    first = frame[(frame["run"] == "Magnitude-1-2") & (frame.step == 300)].iloc[0]
    assert (first.dataset, first.algorithm, first.test_env, first.trial_seed) == ("Tiny", "Magnitude", 1, 2)
    assert (first.sparsity, first.macs, bool(first.final_compression)) == (0.5, 100.0, True)
    assert first.hparams["sparsity"] == 0.5 and 0.3 <= first.env1_in_acc <= 0.9


def test_the_table_is_collects(sweep, capsys):
    table = dsfp.table(dsfp.read_records(sweep))
    rows = list(csv.DictReader(io.StringIO(collected(sweep, capsys, "--format", "csv"))))
    told = {(row["algorithm"], row["environment"]): row for row in rows}
    assert {label for label, _ in told} == set(table.index)
    for (label, environment), row in told.items():
        if environment in table:
            assert table.loc[label, environment] == float(row["accuracy"])
            assert table.loc[label, f"{environment}_std_err"] == float(row["std_err"])
    assert list(table.trials) == [3, 3] and table.loc["Magnitude", "sparsity"] == 0.5


def test_selection_takes_the_best_validated_checkpoint_at_final_compression(sweep):
    frame = dsfp.read_records(sweep)
    chosen = dsfp.select(frame)
    assert len(chosen) == 12 and set(chosen[chosen.algorithm == "Magnitude"].step) == {300}
    erm = frame[(frame["run"] == "ERM-0-1")].set_index("step")
    mine = chosen[(chosen["run"] == "ERM-0-1")].iloc[0]
    assert mine.validation == erm.env1_out_acc.max()
    assert mine.test == erm.env0_in_acc[erm.env1_out_acc.idxmax()] and mine.environment == "env0"


def test_a_part_of_a_frame_is_a_sweep_of_its_own(sweep):
    frame = dsfp.read_records(sweep)
    table = dsfp.table(frame[(frame.algorithm == "ERM") & (frame.trial_seed < 2)])
    assert list(table.index) == ["ERM"] and list(table.trials) == [2]
    assert table.loc["ERM", "average"] == pytest.approx(table.loc["ERM", ["env0", "env1"]].mean())


def test_a_comparison_is_collects(sweep, capsys):
    compared = dsfp.compare(dsfp.read_records(sweep), "Magnitude", "ERM").iloc[0]
    told = json.loads(collected(sweep, capsys, "--format", "json", "--compare", "Magnitude", "ERM"))
    assert compared.pairs == 6
    assert compared.difference == pytest.approx(compared.accuracy - compared.other_accuracy)
    assert str(compared.difference) in json.dumps(told) and str(compared.p_t) in json.dumps(told)


def test_figures_are_axes(sweep):
    axes = dsfp.plot.fronts(dsfp.read_records(sweep))
    assert "Tiny" in axes.get_title() and axes.get_xlabel() == "Surviving MACs"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda frame: dsfp.table(frame, rule="best"), "training-domain"),
        (lambda frame: dsfp.table(frame, dataset="Tyni"), "Tiny"),
        (lambda frame: dsfp.compare(frame, "Magnitud", "ERM"), "Magnitude"),
        (lambda frame: dsfp.table(frame[frame.step > 999]), "no records"),
        (lambda frame: dsfp.select(frame.drop(columns="args")), "'args'"),
    ],
)
def test_what_cannot_be_answered_is_said(sweep, ask, words):
    with pytest.raises(dsfp.UserError, match=words):
        ask(dsfp.read_records(sweep))


def test_a_run_is_trained_and_loaded(tmp_path):
    settings = dsfp.RunSettings(
        dataset="RotatedDigits", algorithm="Magnitude", steps=3, output_dir=str(tmp_path / "run"), hparams={"lr": 0.01}
    )
    dsfp.train(settings)
    algorithm = dsfp.load_run(tmp_path / "run")
    assert isinstance(algorithm, dsfp.ScheduledPruning) and algorithm.hparams["lr"] == 0.01
    assert algorithm.sparsity() == pytest.approx(0.5, abs=0.01)
    args = dsfp.read_records(tmp_path)["args"].iloc[0]
    assert json.loads(args["hparams"]) == {"lr": 0.01}


def test_algorithms_are_listed():
    listed = dsfp.algorithms()
    assert listed.loc["SFP", "standing"] == "reconstruction" and listed.loc["ERM", "family"] == "objective"


def test_every_public_name_is_there_and_none_costs_the_import():
    code = (
        "import sys, domainbed_sfp as dsfp; assert not {'torch', 'pandas'} & set(sys.modules); "
        "[getattr(dsfp, name) for name in dsfp.__all__]; assert callable(dsfp.algorithms)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tabel'"):
        _ = dsfp.tabel
