"""The command `collect`, from a directory of runs to every format."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden.make_synth_sweep import write as write_synthetic_sweep
from golden.make_synth_sweep import write_run as write_synthetic_run
from runs_on_disk import record, write_run

from domainbed_sfp.analysis import published
from domainbed_sfp.analysis.render.grids import magnitude
from domainbed_sfp.cli.main import main

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def collect(capsys):
    """Runs the command; returns (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["collect", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def table(collect):
    """Runs the command on a directory; returns the JSON table of training-domain selection, checked to be
    alone."""

    def run(directory: Path, *arguments: object) -> dict:
        status, out, err = collect(
            "--input_dir", directory, "--format", "json", "--selection", "training-domain", *arguments
        )
        assert (status, err) == (0, "")
        (only,) = json.loads(out)["tables"]
        return {**only, "report_notes": json.loads(out)["notes"]}

    return run


def accuracies(row: dict) -> list[float | None]:
    return [None if cell["accuracy"] is None else round(cell["accuracy"], 6) for cell in row["cells"]]


def list_in_order(monkeypatch, directory: Path, *, shuffled: bool) -> None:
    """DomainBed's ties and last digits depend on the order of os.listdir: the golden files have one."""
    names = sorted(path.name for path in directory.iterdir())
    if shuffled:
        random.Random(11).shuffle(names)
    monkeypatch.setattr(os, "listdir", lambda path: list(names))


# --- equality with DomainBed
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["full", "single", "edges"])
@pytest.mark.parametrize("order", ["", ".sorted"])
def test_the_compatible_format_equals_domainbeds_to_the_byte(tmp_path, monkeypatch, collect, variant, order):
    write_synthetic_sweep(tmp_path, variant)
    list_in_order(monkeypatch, tmp_path, shuffled=not order)
    for suffix, flags in (("txt", []), ("tex", ["--latex"])):
        expected = (GOLDEN / "expected" / f"{variant}{order}.{suffix}").read_text()
        status, out, err = collect("--input_dir", tmp_path, "--format", "domainbed", *flags)
        # What it mixes is said beside the tables.
        mixed = "PACS: DomainBed goes by the algorithm's name, row IRM chooses among IRM (irm_lambda=1), IRM (irm_lambda=10)"
        assert (status, err) == (0, f"warning: {mixed}\n" if variant == "edges" else "")
        assert out == expected
        assert (tmp_path / f"results.{suffix}").read_text() == expected


def test_unknown_algorithms_follow_in_the_order_of_the_directory(tmp_path, monkeypatch, collect):
    for algorithm in ("Zeta", "Alpha", "ERM"):
        write_run(tmp_path, algorithm, [record((0.1, 0.2) * 4, dataset="PACS", algorithm=algorithm)])
    for order in (["ERM", "Zeta", "Alpha"], ["Alpha", "Zeta", "ERM"]):
        monkeypatch.setattr(os, "listdir", lambda path, order=order: list(order))
        _, out, _ = collect("--input_dir", tmp_path, "--format", "domainbed")
        rows = [line.split()[0] for line in out.splitlines()[4:7]]
        assert rows == ["ERM", *(name for name in order if name != "ERM")]


def test_the_compatible_format_ignores_final_compression(tmp_path, collect):
    dense = record((0.9, 0.9) * 4, dataset="PACS", step=0, final_compression=False)
    write_run(tmp_path, "run", [dense, record((0.1, 0.1) * 4, dataset="PACS", step=300)])
    _, out, _ = collect("--input_dir", tmp_path, "--format", "domainbed")
    assert "90.0 +/- 0.0" in out
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "90.0" not in out and "10.0 ± " in out


def test_the_compatible_format_says_beside_it_what_it_mixes(tmp_path, collect):
    """Its rows go by the algorithm's name, and every checkpoint is a candidate: said on stderr, the text is DomainBed's."""
    for at, sparsity in enumerate((0.3, 0.5)):
        settings = {"hparams": json.dumps({"sparsity": sparsity})}
        early = record((0.2,) * 8, dataset="PACS", algorithm="SFP", args=settings, final_compression=False)
        late = record((0.1,) * 8, dataset="PACS", algorithm="SFP", args=settings, step=300)
        write_run(tmp_path, f"run{at}", [early, late])
    status, out, err = collect("--input_dir", tmp_path, "--format", "domainbed")
    assert status == 0 and "warning" not in out
    assert err.splitlines() == [
        "warning: PACS: DomainBed goes by the algorithm's name, row SFP chooses among SFP (sparsity=0.3), "
        "SFP (sparsity=0.5)",
        "warning: 2 checkpoints before their run's final compression are candidates here, as in DomainBed",
    ]
    _, out, _ = collect("--input_dir", tmp_path)
    assert "2 earlier checkpoints of 2 runs left out, which DomainBed counts." in out


def searched_sweep(directory: Path) -> None:
    """Two trials of two draws; draw 1 is the better one in the training domain of trial 0, draw 0 in that of trial 1."""
    for trial, better in ((0, 1), (1, 0)):
        for seed in (0, 1):
            hparams = {"lr": 0.001 if seed == 0 else 0.0123456 + trial, "sparsity": 0.5 if seed == 0 else 0.3}
            accuracy = 0.9 if seed == better else 0.8
            one = record(
                (0.1 * seed + 0.3, 0.2, 0.4, accuracy), step=300, trial_seed=trial, hparams_seed=seed, hparams=hparams,
                algorithm="SFP", sparsity=hparams["sparsity"], parameters=10,
            )  # fmt: skip
            write_run(directory, f"t{trial}h{seed}", [one])


def test_what_was_chosen_is_listed(tmp_path, collect):
    searched_sweep(tmp_path)
    training = ("--input_dir", tmp_path, "--selection", "training-domain")
    status, out, err = collect(*training, "--chosen", "--format", "csv")
    assert (status, err) == (0, "")
    assert list(csv.DictReader(io.StringIO(out))) == [
        {
            "dataset": "Tiny", "selection": "training-domain", "algorithm": "SFP", "label": "SFP", "environment": "env0",
            "trial_seed": trial, "hparams_seed": seed, "step": "300", "validation_accuracy": "90.0", "accuracy": accuracy,
            "run": f"t{trial}h{seed}", "hparam.lr": lr, "hparam.sparsity": sparsity,
        }
        for trial, seed, accuracy, lr, sparsity in (("0", "1", "40.0", "0.0123456", "0.3"), ("1", "0", "30.0", "0.001", "0.5"))
    ]  # fmt: skip
    _, out, _ = collect(*training, "--chosen")
    assert "lr=0.01235, sparsity=0.3" in out and "t0h1" in out and "| SFP" in out
    assert "lr=0.01235" in collect(*training, "--chosen", "--format", "latex")[1]
    (only,) = json.loads(collect(*training, "--format", "json")[1])["tables"]
    choices = only["rows"][0]["cells"][0]["choices"]
    assert [choice["hparams"] for choice in choices] == [
        {"lr": 0.0123456, "sparsity": 0.3},
        {"lr": 0.001, "sparsity": 0.5},
    ]


def test_a_row_whose_networks_are_not_compressed_alike_says_so(tmp_path, collect):
    searched_sweep(tmp_path)
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "SFP: the chosen networks have sparsities from 30.0% to 50.0%; the row's costs are means over them." in out
    assert "`collect --chosen` lists the hparams behind each number." in out


@pytest.mark.parametrize(
    "option", [("--compare", "SFP"), ("--published",), ("--format", "domainbed"), ("--top_hparams",)]
)
def test_chosen_goes_with_tables_of_our_own(tmp_path, collect, option):
    searched_sweep(tmp_path)
    extra = ("--dataset", "Tiny", "--algorithm", "SFP", "--test_env", 0) if option == ("--top_hparams",) else ()
    status, out, err = collect("--input_dir", tmp_path, "--chosen", *option, *extra)
    assert (status, out) == (2, "") and "does not go with" in err and err.count("\n") == 1


def test_tables_say_that_images_are_not_the_published_ones(tmp_path, collect):
    write_run(tmp_path, "run0", [record((0.1,) * 8, dataset="PACS", data_digest="0123456789abcdef")])
    write_run(tmp_path, "run1", [record((0.1,) * 8, dataset="PACS", trial_seed=1)])
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "this table mixes protocols, data: 0123456789abcdef in 1 runs, published in 1 runs." in out


def test_the_compatible_format_needs_a_data_set_domainbed_knows(tmp_path, collect):
    write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4))])
    status, out, err = collect("--input_dir", tmp_path, "--format", "domainbed")
    assert (status, out) == (2, "")
    assert "drops data sets that DomainBed does not know, here all: Tiny" in err


def test_a_results_file_that_cannot_be_written_is_only_a_warning(tmp_path, collect):
    write_run(tmp_path, "run", [record((0.1, 0.2) * 4, dataset="PACS")])
    (tmp_path / "results.txt").mkdir()  # as root may write anywhere, a directory stands in the way
    status, out, err = collect("--input_dir", tmp_path, "--format", "domainbed")
    assert status == 0 and out.startswith("Total records: 1\n")
    assert err.startswith(f"warning: {tmp_path / 'results.txt'} is not written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.txt", "run"]


def test_top_hparams_equal_domainbeds(tmp_path, collect):
    write_synthetic_sweep(tmp_path, "full")
    expected = (GOLDEN / "expected" / "full.list_top_hparams.ERM.PACS.0.txt").read_text()
    status, out, _ = collect(
        *(
            "--input_dir",
            tmp_path,
            "--top_hparams",
            "--dataset",
            "PACS",
            "--algorithm",
            "ERM",
            "--test_env",
            0,
        )
    )
    assert status == 0
    # Trials and directories come in the directory's order, which is not the one of the golden file.
    assert sorted(out.splitlines()) == sorted(expected.splitlines())


def test_top_hparams_name_what_they_need(tmp_path, collect):
    write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4))])
    given = ("--input_dir", tmp_path, "--dataset", "Tiny", "--algorithm", "ERN", "--test_env", 0)
    assert "--dataset goes with --top_hparams" in collect(*given)[2]
    assert "--top_hparams needs --dataset" in collect("--input_dir", tmp_path, "--top_hparams")[2]
    assert "unknown --algorithm 'ERN'; did you mean 'ERM'?" in collect(*given, "--top_hparams")[2]


@pytest.mark.skipif(not os.environ.get("DOMAINBED_ROOT"), reason="DOMAINBED_ROOT names no DomainBed checkout")
def test_the_compatible_format_equals_a_live_checkouts(tmp_path, collect):
    write_synthetic_sweep(tmp_path, "edges")
    command = [sys.executable, "-m", "domainbed.scripts.collect_results", "--input_dir", str(tmp_path)]
    upstream = subprocess.run(command, cwd=os.environ["DOMAINBED_ROOT"], capture_output=True, text=True)
    assert upstream.returncode == 0, upstream.stderr
    assert collect("--input_dir", tmp_path, "--format", "domainbed")[1] == upstream.stdout


# --- the numbers of the good formats
# -------------------------------------------------------------------------


def three_trials(directory: Path, **fields) -> None:
    """Test accuracies 50, 60, 70 on environment 0 and 20, 20, 50 on environment 1."""
    for trial, (first, second) in enumerate([(0.5, 0.2), (0.6, 0.2), (0.7, 0.5)]):
        write_run(directory, f"a{trial}", [record((first, 0, 0, 0.5), trial_seed=trial, **fields)])
        one = record((0, 0.5, second, 0), trial_seed=trial, test_envs=(1,), **fields)
        write_run(directory, f"b{trial}", [one])


def test_means_sample_errors_average_and_worst(tmp_path, table):
    three_trials(tmp_path)
    (row,) = table(tmp_path)["rows"]
    assert accuracies(row) == [60.0, 30.0]
    assert [cell["std_err"] for cell in row["cells"]] == pytest.approx([10 / 3**0.5, 10.0])
    assert row["average"]["accuracy"] == pytest.approx(45.0)
    # Per trial 35, 40, 60: sample variance 175.
    assert row["average"]["std_err"] == pytest.approx((175 / 3) ** 0.5)
    assert (row["worst"]["environment"], row["worst"]["accuracy"]) == ("env1", pytest.approx(30.0))
    assert row["worst"]["std_err"] == pytest.approx(10.0)
    assert [choice["accuracy"] for choice in row["cells"][1]["choices"]] == pytest.approx([20, 20, 50])


def test_in_domain_is_what_the_chosen_networks_reach_where_they_were_trained(tmp_path, table):
    """A network that has learnt a spurious attribute upside down does well on the test environment alone."""
    for trial, (second, third) in enumerate([(0.1, 0.3), (0.2, 0.4)]):
        # In and out of environments 0, 1 and 2; the training domains' own training parts do not count.
        first = record((0.9, 0.8, 0.7, second - 0.1, 0.7, third - 0.1), trial_seed=trial)
        chosen = record((0.9, 0.8, 0.7, second, 0.7, third), trial_seed=trial, step=100)
        write_run(tmp_path, f"a{trial}", [first, chosen])
    (row,) = table(tmp_path)["rows"]
    assert row["cells"][0]["accuracy"] == pytest.approx(90)
    assert row["in_domain"] == pytest.approx(25)


def test_an_average_is_never_over_fewer_environments(tmp_path, table, collect):
    three_trials(tmp_path)
    for trial in range(3):
        (tmp_path / f"b{trial}" / "results.jsonl").unlink()
    only = table(tmp_path)
    (row,) = only["rows"]
    assert accuracies(row) == [60.0, None]
    assert row["average"]["accuracy"] is None and row["worst"]["accuracy"] is None
    said = "No job of this sweep has env1 as its test environment; no average is taken over fewer environments."
    assert said in only["notes"]
    _, out, _ = collect("--input_dir", tmp_path)
    assert "| Algorithm |       env0 | In-domain | Trials |" in out
    assert "| ERM       | 60.0 ± 5.8 |      50.0 |      3 |" in out
    assert "Average" not in out and "Worst" not in out


def test_an_environment_whose_jobs_are_missing_stays_in_the_table(tmp_path, collect):
    three_trials(tmp_path)
    for trial in range(3):
        (tmp_path / f"b{trial}" / "done").unlink(missing_ok=True)
    _, out, _ = collect("--input_dir", tmp_path)
    assert "| Algorithm |       env0 | env1 | Average | Worst | In-domain | Trials |" in out
    assert "| ERM       | 60.0 ± 5.8 |    X |       X |     X |      50.0 |    0-3 |" in out


def test_the_error_of_an_average_is_over_whole_trials(tmp_path, table, collect):
    three_trials(tmp_path)
    (tmp_path / "b2" / "results.jsonl").unlink()
    only = table(tmp_path)
    (row,) = only["rows"]
    assert row["average"]["accuracy"] == pytest.approx((60 + 20) / 2)
    assert row["average"]["std_err"] == pytest.approx(2.5)  # trials 0 and 1: 35 and 40
    assert row["average"]["trials"] == 2
    assert "ERM: 1 job missing (not started): test env1 with trial 2 x hparams seed 0." in only["notes"]


def test_one_trial_has_no_error(tmp_path, collect, table):
    write_run(tmp_path, "a", [record((0.5, 0, 0, 0.5))])
    write_run(tmp_path, "b", [record((0, 0.5, 0.25, 0), test_envs=(1,))])
    (row,) = table(tmp_path)["rows"]
    assert [cell["std_err"] for cell in row["cells"]] == [None, None]
    _, out, _ = collect("--input_dir", tmp_path)
    assert "50.0 ± \N{EN DASH}" in out and "n=1, a single trial has none" in out


def test_only_checkpoints_at_final_compression_are_candidates(tmp_path, table):
    compressed = {"algorithm": "Magnitude", "parameters": 10}
    for env in (0, 1):
        write_run(
            tmp_path,
            f"run{env}",
            [
                record((0.9,) * 4, test_envs=(env,), step=0, sparsity=0.0, final_compression=False, **compressed),
                record((0.4,) * 4, test_envs=(env,), step=100, sparsity=0.5, final_compression=True, **compressed),
                record((0.3,) * 4, test_envs=(env,), step=200, sparsity=0.5, **compressed),
            ],
        )
    (row,) = table(tmp_path)["rows"]
    assert accuracies(row) == [40.0, 40.0]
    assert row["costs"] == {"sparsity": 0.5, "parameters": 10}
    assert [choice["step"] for choice in row["cells"][0]["choices"]] == [100]


def test_a_run_without_final_compression_is_excluded_and_said_so(tmp_path, table):
    three_trials(tmp_path)
    write_run(tmp_path, "a0", [record((0.9, 0, 0, 0.9), final_compression=False)])
    only = table(tmp_path)
    assert accuracies(only["rows"][0]) == [65.0, 30.0]
    assert (
        "ERM: 1 job missing (has no checkpoint at its final compression): test env0 with trial 0 x hparams "
        "seed 0." in only["notes"]
    )


def test_incomplete_runs_are_left_out_unless_asked_for(tmp_path, table):
    three_trials(tmp_path)
    (tmp_path / "a0" / "done").unlink()
    only = table(tmp_path)
    assert accuracies(only["rows"][0]) == [65.0, 30.0]
    assert only["report_notes"] == ["1 incomplete run left out (--include_incomplete counts them)."]
    assert any("1 job missing (incomplete): test env0 with trial 0" in note for note in only["notes"])
    only = table(tmp_path, "--include_incomplete")
    assert accuracies(only["rows"][0]) == [60.0, 30.0]
    assert only["report_notes"] == ["1 incomplete run counted (--include_incomplete)."]


def test_of_a_repeated_record_the_last_counts(tmp_path, table):
    three_trials(tmp_path)
    first, again = record((0.9, 0, 0, 0.9), step=5), record((0.1, 0, 0, 0.2), step=5)
    moved = record((0.5, 0, 0, 0.1), step=0, args={"output_dir": "elsewhere"})
    write_run(tmp_path, "a0", [record((0.8, 0, 0, 0.95), step=0), first, moved, again])
    only = table(tmp_path)
    assert accuracies(only["rows"][0])[0] == pytest.approx((10 + 60 + 70) / 3)
    assert only["report_notes"] == [
        "2 repeated records dropped: of a step recorded more than once in a run the last record counts (a0)."
    ]


def test_of_two_directories_with_one_job_the_complete_one_counts(tmp_path, table):
    three_trials(tmp_path)
    write_run(tmp_path, "c0", [record((0.9, 0, 0, 0.9), step=500)], done=False)
    only = table(tmp_path, "--include_incomplete")
    assert accuracies(only["rows"][0])[0] == 60.0
    assert only["report_notes"] == ["1 run left out, another directory holds the same job (c0 for a0)."]


def test_two_different_sweeps_in_one_directory(tmp_path, collect):
    three_trials(tmp_path)
    write_run(tmp_path, "c0", [record((0.9, 0, 0, 0.9), args={"holdout_fraction": 0.5})])
    status, out, err = collect("--input_dir", tmp_path)
    assert (status, out) == (2, "")
    assert err == (
        "error: two different sweeps in one directory: a0 and c0 are the same job but for "
        "args.holdout_fraction (0.2 and 0.5); collect them apart\n"
    )


def test_rows_are_named_after_the_settings_that_differ(tmp_path, table):
    for sparsity in (0.5, 0.3):
        hparams = json.dumps({"sparsity": sparsity, "granularity": "channel"})
        for env in (0, 1):
            one = record(
                (sparsity,) * 4,
                algorithm="Magnitude",
                test_envs=(env,),
                args={"hparams": hparams},
                sparsity=sparsity,
            )
            write_run(tmp_path, f"{sparsity}-{env}", [one])
            write_run(tmp_path, f"erm{env}", [record((0.2,) * 4, test_envs=(env,))])
    rows = table(tmp_path)["rows"]
    assert [row["label"] for row in rows] == ["ERM", "Magnitude (sparsity=0.3)", "Magnitude (sparsity=0.5)"]
    assert [accuracies(row)[0] for row in rows] == [20.0, 30.0, 50.0]
    assert rows[1]["settings"] == {"sparsity": 0.3, "granularity": "channel", "steps": 301}


def test_overrides_that_are_no_json_name_the_run(tmp_path, collect):
    write_run(tmp_path, "run", [record((0.1,) * 4, args={"hparams": "{lr: 1}"})])
    status, _, err = collect("--input_dir", tmp_path)
    assert status == 2 and err == "error: run: args.hparams is '{lr: 1}'; expected a JSON object\n"


def test_missing_jobs_are_told_from_the_sweeps_own_list(tmp_path, table):
    three_trials(tmp_path)
    (tmp_path / "a0" / "done").unlink()
    (tmp_path / "a0" / "failure.json").write_text('{"step": 7, "error": "loss is NaN"}')
    (tmp_path / "empty").mkdir()
    write_run(tmp_path, "stranger", [record((0.1,) * 4, trial_seed=9)])

    def job(name, env, trial, algorithm="ERM"):
        return {
            "name": name,
            "dataset": "Tiny",
            "algorithm": algorithm,
            "test_envs": [env],
            "hparams_seed": 0,
            "trial_seed": trial,
            "seed": 1,
            "steps": None,
            "hparams": {},
        }

    jobs = [job(f"{letter}{trial}", env, trial) for env, letter in enumerate("ab") for trial in range(3)]
    jobs += [job("gone", 0, 3), job("empty", 1, 3), job("irm0", 0, 0, "IRM"), job("irm1", 1, 0, "IRM")]
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "protocol": {}, "jobs": jobs}))
    only = table(tmp_path)
    assert [row["label"] for row in only["rows"]] == ["ERM", "IRM"]
    assert only["notes"] == [
        "ERM: 1 job missing (failed at step 7: loss is NaN): test env0 with trial 0 x hparams seed 0.",
        "ERM: 1 job missing (not started): test env0 with trial 3 x hparams seed 0.",
        "ERM: 1 job missing (started, no record yet): test env1 with trial 3 x hparams seed 0.",
        "IRM: 2 jobs missing (not started): test env0, env1 with trial 0 x hparams seed 0.",
    ]
    assert "1 run counted that sweep.json does not list." in only["report_notes"]


def test_default_steps_of_the_sweeps_list_are_those_its_runs_record(tmp_path, collect):
    jobs = []
    for dataset, steps in (("Ink", 300), ("Oil", 600)):
        for env in (0, 1):
            name = f"{dataset}{env}"
            jobs.append(
                {
                    "name": name,
                    "dataset": dataset,
                    "algorithm": "ERM",
                    "test_envs": [env],
                    "hparams_seed": 0,
                    "trial_seed": 0,
                    "steps": None,
                    "hparams": {},
                }
            )
        write_run(tmp_path, f"{dataset}0", [record((0.5,) * 4, dataset=dataset, args={"steps": steps})])
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "jobs": jobs}))
    _, out, _ = collect("--input_dir", tmp_path, "--format", "json", "--selection", "oracle")
    tables = json.loads(out)["tables"]
    assert [[(row["label"], row["settings"]) for row in table["rows"]] for table in tables] == [
        [("ERM", {"steps": 300})],
        [("ERM", {"steps": 600})],
    ]
    missing = "ERM: 1 job missing (not started): test env1 with trial 0 x hparams seed 0."
    assert [table["notes"] for table in tables] == [[missing], [missing]]


def test_many_missing_jobs_are_told_together(tmp_path, table):
    write_synthetic_sweep(tmp_path, "edges")
    notes = {
        one["dataset"]: one["notes"]
        for one in json.loads(_stdout(tmp_path, "--format", "json", "--selection", "leave-one-out"))["tables"]
    }
    assert notes["VLCS"] == [
        "ERM: 3 jobs missing (not started): test C with trial 1 x hparams seed 0-2.",
        "SFP: 9 jobs missing (incomplete): test L with trial 0-2 x hparams seed 0-2.",
    ]
    assert (
        "IRM (irm_lambda=1): 54 jobs missing (not started): test A+C, A+P, A+S, C+P, C+S, P+S with "
        "trial 0-2 x hparams seed 0-2." in notes["PACS"]
    )


def _stdout(directory: Path, *arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "domainbed_sfp",
        "collect",
        "--input_dir",
        str(directory),
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_good_cells_agree_with_domainbeds_where_the_conventions_do(tmp_path, collect):
    """On a whole sweep the means are DomainBed's; only the standard errors differ, by sqrt(n / (n - 1))."""
    write_synthetic_sweep(tmp_path, "full")
    _, out, _ = collect("--input_dir", tmp_path, "--format", "json")
    document = json.loads(out)
    ours = [
        f"{cell['accuracy']:.1f} +/- {cell['std_err'] * (2 / 3) ** 0.5:.1f}"
        for table in document["tables"]
        for row in table["rows"]
        for cell in row["cells"]
    ]
    theirs = []
    for line in (GOLDEN / "expected" / "full.txt").read_text().splitlines():
        cells = line.split("  ")
        cells = [cell.strip() for cell in cells if cell.strip()]
        if cells and cells[0] in ("ERM", "SFP") and len(cells) == 6:
            theirs += cells[1:5]
    assert ours == theirs and len(theirs) == 48


def test_a_sweep_without_pairs_has_no_leave_one_out_table(tmp_path, collect):
    write_synthetic_sweep(tmp_path, "single")
    _, out, _ = collect("--input_dir", tmp_path, "--format", "json")
    document = json.loads(out)
    assert {table["selection"] for table in document["tables"]} == {"training-domain", "oracle"}
    assert any("VLCS: no table for leave-one-domain-out" in note for note in document["notes"])
    status, _, err = collect("--input_dir", tmp_path, "--selection", "leave-one-out")
    assert status == 2 and "gives no table: VLCS: no table for leave-one-domain-out" in err


def test_averages_over_data_sets(tmp_path, collect):
    for dataset, accuracy in (("PACS", 0.5), ("VLCS", 0.7)):
        for env in range(4):
            write_run(tmp_path, f"{dataset}{env}", [record((accuracy,) * 8, dataset=dataset, test_envs=(env,))])
    write_run(tmp_path, "irm", [record((0.9,) * 8, dataset="PACS", algorithm="IRM")])
    _, out, _ = collect("--input_dir", tmp_path, "--format", "json", "--selection", "oracle")
    (averages,) = json.loads(out)["averages"]
    assert averages["datasets"] == ["VLCS", "PACS"]
    assert [(row["label"], row["average"]) for row in averages["rows"]] == [
        ("ERM", pytest.approx(60.0)),
        ("IRM", None),
    ]


def test_rows_are_the_same_methods_on_every_data_set(tmp_path, collect):
    def pruned(dataset, sparsity, accuracy):
        args = {"hparams": json.dumps({"sparsity": sparsity})}
        for env in range(4):
            made = record((accuracy,) * 8, dataset=dataset, algorithm="Magnitude", test_envs=(env,), args=args)
            write_run(tmp_path, f"{dataset}{sparsity}{env}", [made])

    def averages():
        _, out, _ = collect("--input_dir", tmp_path, "--format", "json", "--selection", "oracle")
        (found,) = json.loads(out)["averages"]
        return found["notes"], {row["label"]: row["average"] for row in found["rows"]}

    pruned("VLCS", 0.9, 0.4)
    pruned("PACS", 0.5, 0.8)
    notes, rows = averages()
    assert rows == {"Magnitude": pytest.approx(60.0)}
    assert "Magnitude: not the same settings on all data sets: VLCS sparsity=0.9; PACS sparsity=0.5." in notes
    # What tells rows apart on one data set names them on all.
    pruned("PACS", 0.9, 0.6)
    notes, rows = averages()
    assert rows == {"Magnitude (sparsity=0.5)": None, "Magnitude (sparsity=0.9)": pytest.approx(50.0)}
    assert not [note for note in notes if "not the same settings" in note]


def test_pairs_of_digits_are_not_said_to_share_images(tmp_path, collect):
    for dataset in ("FullColoredMNIST", "Tiny"):
        for algorithm, accuracy in (("ERM", 0.5), ("SFP", 0.7)):
            for trial in range(3):
                accuracies = (accuracy + trial / 50,) * 6
                made = record(accuracies, dataset=dataset, algorithm=algorithm, trial_seed=trial, test_envs=(2,))
                write_run(tmp_path, f"{dataset}{algorithm}{trial}", [made])
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "oracle", "--compare", "SFP", "--format", "json")
    notes = {one["dataset"]: " ".join(one["notes"]) for one in json.loads(out)["tables"]}
    assert "were not trained and tested on the same images" in notes["FullColoredMNIST"]
    assert "share its test images" in notes["Tiny"] and "share its test images" not in notes["FullColoredMNIST"]


# --- environments and protocol
# -------------------------------------------------------------------------------


def test_environments_are_named_by_the_records_then_by_domainbed(tmp_path, table):
    write_run(tmp_path, "run", [record((0.1,) * 4, environments=["ink", "oil"])])
    assert table(tmp_path)["environments"] == ["ink", "oil"]
    write_run(tmp_path, "run", [record((0.1,) * 8, dataset="PACS")])
    assert table(tmp_path)["environments"] == ["A", "C", "P", "S"]


def test_mixed_protocols_are_warned_of(tmp_path, table):
    three_trials(tmp_path)
    write_run(tmp_path, "a0", [record((0.5, 0, 0, 0.5), hparams={"image_size": 64}, precision="bf16")])
    notes = table(tmp_path)["notes"]
    assert "Warning: this table mixes protocols, image size: 224 in 5 runs, 64 in 1 runs." in notes
    assert "Warning: this table mixes protocols, precision: fp32 in 5 runs, bf16 in 1 runs." in notes


def test_the_protocol_line(tmp_path, collect):
    three_trials(tmp_path, commit="0123456789abcdef", hparams={"weights": "none", "image_size": 64})
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert (
        "Protocol: training-domain validation set selection; 301 steps; backbone resnet18; weights none; "
        "64 px images; default hparams x 3 trials (seeds 0-2); held-out fraction 0.2; precision fp32; commit "
        "0123456789ab; collected by domainbed_sfp "
    ) in out


def test_the_protocol_line_tells_the_hparams_all_runs_were_given(tmp_path, collect):
    given = '{"lr": 0.001, "image_size": 64, "sparsity": %s}'
    for number, sparsity in enumerate((0.3, 0.5)):
        for env in range(2):
            run = record((0.5, 0.6, 0.7, 0.8), test_envs=(env,))
            run["args"]["hparams"] = given % sparsity
            write_run(tmp_path, f"{number}{env}", [run])
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "default hparams with lr=0.001 x 1 trial" in out and "(sparsity=0.3)" in out


def test_input_size_is_the_networks_not_the_hparams(tmp_path, collect):
    """The hparam `image_size` says nothing about digits: the record's own shape does."""
    three_trials(tmp_path, input_shape=[3, 8, 8], hparams={"weights": "none", "image_size": 224})
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "8 px images" in out and "224 px" not in out


@pytest.mark.parametrize(
    ("dataset", "shape", "hparams", "told"),
    [
        # Named: whatever the data set and its size.
        ("PACS", None, {"backbone": "mnist_cnn"}, "backbone MNIST_CNN; weights none; 224 px"),
        (
            "PACS",
            [3, 64, 64],
            {"backbone": "mnist_cnn", "weights": "imagenet"},
            "backbone MNIST_CNN; weights none; 64 px",
        ),
        (
            "PACS",
            [3, 64, 64],
            {"backbone": "mnist_cnn", "weights": "w/begun.pt"},
            "backbone MNIST_CNN; weights begun.pt",
        ),
        # Automatic: by the recorded shape, and by the data set's name only where there is none.
        ("Folder", [3, 28, 28], {"backbone": "auto"}, "backbone MNIST_CNN; weights none; 28 px"),
        ("Tiny", [1, 8, 8], {}, "backbone MNIST_CNN; weights none; 8 px"),
        ("Folder", [3, 29, 29], {"backbone": "auto"}, "backbone resnet18; weights imagenet; 29 px"),
        ("ColoredDigits", [2, 64, 64], {}, "backbone resnet18; weights imagenet; 64 px"),
        ("ColoredDigits", None, {}, "backbone MNIST_CNN; weights none"),
        ("Folder", [3, 28, 28], {"backbone": "resnet18"}, "backbone resnet18; weights imagenet; 28 px"),
    ],
)
def test_backbone_of_small_images(tmp_path, collect, dataset, shape, hparams, told):
    facts = {} if shape is None else {"input_shape": shape}
    write_run(tmp_path, "run", [record((0.5, 0.6, 0.7, 0.8), dataset=dataset, hparams=hparams, **facts)])
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert told in out


def test_unusual_hparams_of_the_protocol_are_told(tmp_path, table, collect):
    three_trials(tmp_path, hparams={"class_balanced": True, "data_augmentation": True})
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain")
    assert "; class balanced true; " in out and "data augmentation" not in out
    write_run(tmp_path, "a0", [record((0.5, 0, 0, 0.5))])
    warning = "Warning: this table mixes protocols, class balanced: true in 5 runs, false in 1 runs."
    assert warning in table(tmp_path)["notes"]


# --- published rows
# ------------------------------------------------------------------------------------------

TORCHVISION_R50 = {"resnet18": False, "resnet50_augmix": False, "freeze_bn": True, "weights": "imagenet"}


def pacs(directory: Path, hparams: dict, steps: int | None = 5001, args: dict | None = None, **fields) -> None:
    """Without steps asked for, the last record of a finished run tells them."""
    args = {"steps": steps, **(args or {})}
    for env in range(4):
        one = record((0.85,) * 8, dataset="PACS", test_envs=(env,), step=5000, hparams=hparams, args=args, **fields)
        write_run(directory, f"run{env}", [one])


@pytest.mark.parametrize("hparams", [TORCHVISION_R50, {**TORCHVISION_R50, "backbone": "resnet50", "resnet18": True}])
@pytest.mark.parametrize("steps", [5001, None])
def test_published_rows_of_the_same_protocol_are_added(tmp_path, table, collect, hparams, steps):
    pacs(tmp_path, hparams, steps)
    published = ("--published", GOLDEN / "published_sample.csv")
    only = table(tmp_path, *published)
    measured, erm, irm = only["rows"]
    assert (measured["label"], measured["source"]) == ("ERM", None)
    assert (erm["algorithm"], erm["standing"], erm["source"]) == (
        "ERM",
        "published",
        "DomainBed official results",
    )
    assert accuracies(erm) == [84.7, 80.8, 97.2, 79.3]
    assert erm["average"] == {"accuracy": 85.5, "std_err": 0.2, "trials": None}
    assert erm["worst"]["environment"] == "S"
    assert accuracies(irm) == [None] * 4 and irm["average"]["accuracy"] == 83.5
    assert only["notes"] == [
        "1 published row for PACS not added: made with resnet50 (augmix), these runs with resnet50 (tv V1, frozen BN).",
        "Our rows beside the published ones are from default hparams x 1 trial (seeds 0).",
    ]
    _, out, _ = collect("--input_dir", tmp_path, "--selection", "training-domain", *published)
    assert "ERM [published]" in out and "[published]: as printed by DomainBed official results." in out


@pytest.mark.parametrize(
    ("hparams", "steps", "reason"),
    [
        (TORCHVISION_R50, 300, "their protocol has 5,001 steps, these runs 300."),
        ({**TORCHVISION_R50, "image_size": 64}, 5001, "their protocol has images of 224 px, these runs 64."),
        ({**TORCHVISION_R50, "freeze_bn": False}, 5001, "these runs with resnet50 (tv V1)."),
        ({**TORCHVISION_R50, "weights": "none"}, 5001, "their protocol has the weights imagenet, these runs none."),
        ({**TORCHVISION_R50, "resnet18": True}, 5001, "these runs with resnet18 (frozen BN)."),
    ],
)
def test_published_rows_of_another_protocol_are_not(tmp_path, table, hparams, steps, reason):
    pacs(tmp_path, hparams, steps)
    only = table(tmp_path, "--published", GOLDEN / "published_sample.csv")
    assert [row["standing"] for row in only["rows"]] == [None]
    assert len(only["notes"]) == 1 and "published row" in only["notes"][0] and only["notes"][0].endswith(reason)


DEFAULTS = {"data_augmentation": True, "class_balanced": False, "nonlinear_classifier": False}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"args": {"holdout_fraction": 0.1}}, "a held-out fraction of 0.2, these runs 0.1."),
        ({"precision": "bf16"}, "the precision fp32, these runs bf16."),
        ({"args": {"task": "domain_adaptation"}}, "the task domain_generalization, these runs domain_adaptation."),
        ({"hparams": {"data_augmentation": False}}, "data augmentation, these runs false."),
        ({"hparams": {"class_balanced": True}}, "no class balance (class_balanced false), these runs true."),
        (
            {"hparams": {"nonlinear_classifier": True}},
            "a linear classifier (nonlinear_classifier false), these runs true.",
        ),
    ],
)
def test_published_rows_match_on_the_whole_protocol(tmp_path, table, changed, reason):
    hparams = {**TORCHVISION_R50, **DEFAULTS}
    pacs(tmp_path / "same", hparams, precision="fp32")
    asked = ("--published", GOLDEN / "published_sample.csv")
    assert len(table(tmp_path / "same", *asked)["rows"]) == 3
    pacs(tmp_path / "other", {**hparams, **changed.pop("hparams", {})}, **changed)
    only = table(tmp_path / "other", *asked)
    assert [row["standing"] for row in only["rows"]] == [None]
    assert only["notes"] == [f"No published rows: 3 for PACS were not added, their protocol has {reason}"]


def test_draws_and_trials_beside_published_rows_are_told(tmp_path, table):
    for seed in range(2):
        for trial in range(3):
            for env in range(4):
                one = record((0.85,) * 8, dataset="PACS", test_envs=(env,), step=5000, hparams=TORCHVISION_R50,
                             args={"steps": 5001}, hparams_seed=seed, trial_seed=trial)  # fmt: skip
                write_run(tmp_path, f"{seed}{trial}{env}", [one])
    only = table(tmp_path, "--published", GOLDEN / "published_sample.csv")
    assert len(only["rows"]) == 3
    expected = "Our rows beside the published ones are from 2 hparams draws (seeds 0-1) x 3 trials (seeds 0-2)."
    assert expected in only["notes"]


def test_augmix_runs_stand_beside_augmix_rows_only(tmp_path, table):
    pacs(tmp_path, {**TORCHVISION_R50, "resnet50_augmix": True, "freeze_bn": False})
    rows = table(tmp_path, "--published", GOLDEN / "published_sample.csv")["rows"]
    assert [row["algorithm"] for row in rows] == ["ERM", "RDM"]


def test_published_files_that_are_none(tmp_path, collect):
    pacs(tmp_path / "sweep", TORCHVISION_R50)
    given = ("--input_dir", tmp_path / "sweep", "--published", tmp_path / "rows.csv")
    assert f"--published: no file {tmp_path / 'rows.csv'}" in collect(*given)[2]
    (tmp_path / "rows.csv").write_text("algorithm,dataset\n")
    assert "no column 'test_domain'" in collect(*given)[2]
    text = (GOLDEN / "published_sample.csv").read_text()
    (tmp_path / "rows.csv").write_text(text.replace("80.8", "many"))
    status, _, err = collect(*given)
    assert status == 2 and "rows.csv, line 3: could not convert string to float: 'many'" in err
    (tmp_path / "rows.csv").write_text(text + text.splitlines()[1] + "\n")
    status, _, err = collect(*given)
    assert status == 2 and "is given twice" in err and "rows.csv, line" in err


def test_the_default_published_file_is_the_checkouts(tmp_path, table):
    pacs(tmp_path, TORCHVISION_R50)
    rows = table(tmp_path, "--published")["rows"]
    assert ("ERM", 85.5) in [(row["algorithm"], row["average"]["accuracy"]) for row in rows if row["source"]]


def test_the_default_published_file_is_the_packages_before_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "__file__", str(tmp_path / "domainbed_sfp" / "analysis" / "published.py"))
    for place in ("results", "domainbed_sfp/published_rows"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "published.csv").write_text("")
        assert published.find_published("") == tmp_path / place / "published.csv"


def test_an_installed_package_has_the_published_rows(tmp_path):
    pytest.importorskip("setuptools")
    source, built = tmp_path / "source", tmp_path / "built"
    for folder in ("domainbed_sfp", "sweeps", "results"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "README.md"):
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)], cwd=source, check=True)
    (package,) = built.iterdir()
    assert [path.name for path in (package / "published_rows").iterdir()] == ["published.csv"]
    asked = "from domainbed_sfp.analysis.published import find_published as find; print(find(''))"
    environment = {**os.environ, "PYTHONPATH": str(built)}
    found = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert found.stdout.strip() == str(package / "published_rows" / "published.csv"), found.stderr


# --- formats
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def compressed(tmp_path):
    """ERM, and a reconstruction with an awkward name at half the size, on two environments with awkward
    names."""
    costs = {"parameters": 11_200_000, "dense_macs": 1_800_000_000, "environments": ["50%", "a_b&c"]}
    for env in (0, 1):
        dense = {"sparsity": 0.0, "surviving_parameters": 11_200_000, "macs": 1_800_000_000}
        write_run(tmp_path, f"erm{env}", [record((0.6,) * 4, test_envs=(env,), **dense, **costs)])
        half = {"sparsity": 0.5, "surviving_parameters": 5_600_000, "macs": 450_000_000}
        ours = record((0.7,) * 4, test_envs=(env,), algorithm="My_<b>", standing="reconstruction", **half, **costs)
        write_run(tmp_path, f"ours{env}", [ours])
    return tmp_path


def test_markdown(compressed, collect):
    status, out, err = collect("--input_dir", compressed, "--selection", "training-domain")
    assert (status, err) == (0, "")
    dash = "\N{EN DASH}"
    assert out.splitlines()[:6] == [
        "### Tiny, model selection: training-domain validation set",
        "",
        "| Algorithm |          50% |        a_b&c |      Average |          Worst | In-domain | Trials | Sparsity "
        "| Parameters left |    MACs left |",
        "| --------- | -----------: | -----------: | -----------: | -------------: | --------: | -----: | -------: "
        "| --------------: | -----------: |",
        f"| ERM       |     60.0 ± {dash} |     60.0 ± {dash} |     60.0 ± {dash} |     60.0 (50%) "
        "|      60.0 |      1 |     0.0% |    11.2M (100%) | 1.80G (100%) |",
        f"| My_<b> †  | **70.0 ± {dash}** | **70.0 ± {dash}** | **70.0 ± {dash}** | **70.0 (50%)** "
        "|      70.0 |      1 |    50.0% |     5.60M (50%) |   450M (25%) |",
    ]
    assert "- † reconstruction: " in out


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999_499, "999k"),
        (999_999, "1.00M"),
        (11_176_512, "11.2M"),
        (1_817_500_000, "1.82G"),
        (3.2e12, "3.20T"),
    ],
)
def test_counts_have_three_digits(number, text):
    assert magnitude(number) == text


def test_latex_is_escaped_and_ruled(compressed, collect):
    for flags in (["--latex"], ["--format", "latex"]):
        _, out, _ = collect("--input_dir", compressed, "--selection", "oracle", *flags)
        assert "Algorithm & 50\\% & a\\_b\\&c & Average & Worst & In-domain & Trials &" in out
        assert "My\\_\\textless{}b\\textgreater{} $^\\dagger$ & \\textbf{70.0 $\\pm$ --} &" in out
        assert out.count("\\toprule") == out.count("\\midrule") == out.count("\\bottomrule") == 1
        (caption,) = [line for line in out.splitlines() if line.startswith("\\caption{")]
        assert "301 steps; backbone resnet18" in caption


def test_csv_is_tidy_and_unrounded(tmp_path, collect):
    three_trials(tmp_path)
    _, out, _ = collect("--input_dir", tmp_path, "--format", "csv", "--selection", "training-domain")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["environment"] for row in rows] == ["env0", "env1", "average", "worst", "in-domain"]
    assert [float(row["accuracy"]) for row in rows] == pytest.approx([60, 30, 45, 30, 50])
    assert float(rows[0]["std_err"]) == pytest.approx(10 / 3**0.5, rel=1e-12)
    assert (rows[0]["trials"], rows[0]["sparsity"], rows[0]["selection"]) == ("3", "", "training-domain")


def test_output_goes_to_a_file(tmp_path, collect):
    three_trials(tmp_path / "sweep")
    _, expected, _ = collect("--input_dir", tmp_path / "sweep")
    target = tmp_path / "table.md"
    assert collect("--input_dir", tmp_path / "sweep", "--output", target) == (0, "", "")
    assert target.read_text() == expected
    status, _, err = collect("--input_dir", tmp_path / "sweep", "--output", tmp_path / "no" / "table.md")
    assert status == 2 and f"--output {tmp_path / 'no' / 'table.md'}: No such file or directory" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "html"], "--format html: `domainbed-sfp report --input_dir DIR --output FILE` makes a page"),
        (["--format", "markdwn"], "unknown --format 'markdwn'; did you mean 'markdown'?"),
        (["--selection", "oracel"], "unknown --selection 'oracel'; did you mean 'oracle'?"),
        (["--latex", "--format", "csv"], "--latex and --format csv contradict each other"),
        (
            ["--format", "domainbed", "--selection", "oracle"],
            "--selection does not go with --format domainbed",
        ),
        (["--format", "domainbed", "--published"], "--published does not go with --format domainbed"),
    ],
)
def test_options_that_make_no_sense(tmp_path, collect, arguments, message):
    three_trials(tmp_path)
    status, out, err = collect("--input_dir", tmp_path, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_as_a_program(tmp_path):
    """Torn records, exit status and one line on stderr, as a user sees them; the program starts without
    torch."""
    run = write_synthetic_run(tmp_path, "ERM", "PACS", [0], 0, 0)
    whole = (run / "results.jsonl").read_text()
    (run / "results.jsonl").write_text(whole + whole[:50])
    command = [sys.executable, "-X", "importtime", "-m", "domainbed_sfp", "collect", "--input_dir"]
    done = subprocess.run([*command, str(tmp_path), "--include_incomplete"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("### PACS")
    assert f"warning: {run / 'results.jsonl'}: the last line (4) is torn and skipped\n" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "import time" in line}
    assert "numpy" in imported and not {"torch", "pandas"} & imported
    missing = subprocess.run([*command, str(tmp_path / "no")], cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stdout == ""
    assert f"error: --input_dir {tmp_path / 'no'}: No such file or directory" in missing.stderr


def test_a_table_that_mixes_weights_of_one_name_says_so(tmp_path, table):
    for trial, digest in enumerate(("0123456789ab", "ba9876543210")):
        hparams = {"weights": "w.pth"}
        write_run(
            tmp_path, digest, [record((0.5,) * 4, trial_seed=trial, hparams=hparams, weights_digest=digest)]
        )  # fmt: skip
    only = table(tmp_path)
    assert (
        "Warning: this table mixes protocols, weights hash: 0123456789ab in 1 runs, ba9876543210 in 1 runs."
        in only["notes"]
    )
