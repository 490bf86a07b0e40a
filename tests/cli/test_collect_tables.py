"""The numbers of `collect`'s own tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from golden.make_synth_sweep import write as write_synthetic_sweep
from runs_on_disk import record, write_run
from searched_runs import GOLDEN, ROOT, accuracies, three_trials


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
