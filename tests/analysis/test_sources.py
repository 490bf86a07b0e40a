"""Grids that hold out several environments at once: single-source generalization, and what lies between."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from runs_on_disk import record, write_run

from domainbed_sfp.cli.main import main as command

# env0 in, out, env1 in, out, env2 in, out of runs on one source each, by what they hold out.
SINGLE_SOURCE = {
    (1, 2): (0.9, 0.8, 0.5, 0.55, 0.3, 0.35),
    (0, 2): (0.6, 0.65, 0.9, 0.7, 0.4, 0.45),
    (0, 1): (0.1, 0.15, 0.2, 0.25, 0.9, 0.6),
}
SPREAD = 0.02  # between trials
DASH = "\N{EN DASH}"


def _sweep(root: Path, grid: dict, *, trials: int = 2, algorithm: str = "ERM", lower: float = 0.0) -> None:
    for test_envs, accuracies in grid.items():
        for trial in range(trials):
            values = tuple(accuracy - SPREAD * trial - lower for accuracy in accuracies)
            name = f"{algorithm}{''.join(map(str, test_envs))}t{trial}"
            write_run(root, name, [record(values, test_envs=test_envs, trial_seed=trial, algorithm=algorithm)])


@pytest.fixture
def collect(tmp_path, capsys):
    def run(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command(["collect", "--input_dir", str(tmp_path), *map(str, arguments)])
        assert ended.value.code == status
        printed = capsys.readouterr()
        return printed.out if status == 0 else printed.err

    return run


def _cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} ")]
    return [cell.strip(" *") for cell in line.strip("|").split("|")[1:]]


def test_a_row_for_each_source_with_accuracies_computed_by_hand(tmp_path, collect):
    _sweep(tmp_path, SINGLE_SOURCE)
    text = collect("--selection", "training-domain")
    assert "### Tiny, by what was trained on, model selection: training-domain validation set" in text
    # Means of the two trials are SPREAD / 2 below the first; their standard error is SPREAD / 2.
    assert _cells(text, "ERM, trained on env0") == [
        DASH,
        "49.0 ± 1.0",
        "29.0 ± 1.0",
        "39.0 ± 1.0",
        "29.0 (env2)",
        "79.0",
        "2",
    ]
    assert _cells(text, "ERM, trained on env1") == [
        "59.0 ± 1.0",
        DASH,
        "39.0 ± 1.0",
        "49.0 ± 1.0",
        "39.0 (env2)",
        "69.0",
        "2",
    ]
    assert _cells(text, "ERM, trained on env2") == [
        "9.0 ± 1.0",
        "19.0 ± 1.0",
        DASH,
        "14.0 ± 1.0",
        "9.0 (env0)",
        "59.0",
        "2",
    ]
    assert _cells(text, "ERM, mean of the 3 above")[:4] == ["34.0 ± 1.0"] * 4
    for untrue in ("No job of this sweep", "X", "missing"):
        assert untrue not in text, untrue


def test_notes_say_what_is_so(tmp_path, collect):
    _sweep(tmp_path, SINGLE_SOURCE)
    assert "which needs runs with one test environment beside those with two; this sweep has none." in collect()
    assert "gives no table" in collect("--selection", "leave-one-out", status=2)
    assert "- No published rows: they hold out one environment." in collect("--selection", "oracle", "--published")
    (tmp_path / "ERM01t1" / "done").unlink()
    text = collect("--selection", "oracle")
    assert "ERM: 1 job missing (incomplete): test env0+env1 with trial 1 x hparams seed 0." in text
    assert _cells(text, "ERM, trained on env2")[0] == f"10.0 ± {DASH}"


def test_checkpoint_and_hparams_are_chosen_on_what_was_trained_on(tmp_path, collect):
    # Step 5 and hparams seed 1 are best on env0, which is trained on; all others are better where it does not count.
    for seed, best in ((0, 0.7), (1, 0.9)):
        records = [
            record(
                (0.1, best - step / 50, 0.2 + step / 100, 0.9, 0.3, 0.9),
                step=abs(step - 5),
                test_envs=(1, 2),
                hparams_seed=seed,
            )
            for step in (5, 0)
        ]
        write_run(tmp_path, f"seed{seed}", records)
    tables = json.loads(collect("--format", "json"))["tables"]
    assert [table["selection"] for table in tables] == ["training-domain", "oracle"]
    (one, two) = tables[0]["rows"][0]["cells"]
    assert (one["environment"], one["test_env"], one["trained_on"]) == ("env1", 1, ["env0"])
    assert one["choices"][0]["hparams_seed"] == 1 and one["choices"][0]["step"] == 5
    assert one["accuracy"] == pytest.approx(20) and two["accuracy"] == pytest.approx(30)
    assert tables[0]["environments"] == ["env0", "env1", "env2"]


def test_every_format_has_the_numbers(main, tmp_path, collect):
    _sweep(tmp_path, SINGLE_SOURCE)
    _sweep(tmp_path, SINGLE_SOURCE, algorithm="Random", lower=0.05)
    rows = list(csv.DictReader(io.StringIO(collect("--format", "csv", "--selection", "oracle"))))
    of = {(row["label"], row["environment"]): float(row["accuracy"]) for row in rows}
    assert of["ERM", "env2 (trained on env0)"] == pytest.approx(29) and of["Random", "average"] == pytest.approx(29)
    assert "ERM, trained on env0 & -- & \\textbf{49.0" in collect("--format", "latex", "--selection", "oracle")
    main("report", "--input_dir", tmp_path, "--output", "page.html")
    assert '<th scope="row">ERM, trained on env0</th>' in (tmp_path / "page.html").read_text()
    text = collect("--selection", "oracle")
    assert "**49.0 ± 1.0**" in text and "**44.0" not in text  # the best is marked among rows with the same source
    assert "env2 (trained on env0)" in collect("--chosen", "--selection", "oracle")
    compared = collect("--compare", "ERM", "Random", "--selection", "training-domain")
    assert "12/0/0" in compared and "5.0" in compared
    assert "same training environments, test environment and trial seed" in compared
    assert "each run is tested in several environments" in compared and "share training data" not in compared
    assert "ERM, trained on" not in collect("--compare", "ERM", "Random", "--selection", "training-domain")


def test_frames_have_them_too(tmp_path):
    pytest.importorskip("pandas")
    from domainbed_sfp.analysis import frames

    _sweep(tmp_path, SINGLE_SOURCE)
    chosen = frames.select(frames.read_records(tmp_path))
    assert len(chosen) == 12 and set(chosen.trained_on) == {("env0",), ("env1",), ("env2",)}
    one = chosen[(chosen.environment == "env2") & chosen.trained_on.map(("env0",).__eq__) & (chosen.trial_seed == 0)]
    assert one.test_env.tolist() == [2] and one.test.tolist() == [pytest.approx(0.3)]
    assert frames.table(frames.read_records(tmp_path)).loc["ERM", "env2 (trained on env0)"] == pytest.approx(29)


def test_grids_of_several_kinds_have_a_table_each(tmp_path, collect):
    singles = {(0,): (0.6, 0.6, 0.9, 0.8, 0.9, 0.8, 0.9, 0.8), (3,): (0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.5, 0.5)}
    several = {(1, 2, 3): (0.9, 0.8, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5)}
    _sweep(tmp_path, singles, trials=1)
    _sweep(tmp_path, several, trials=1)
    _sweep(tmp_path, several, trials=1, algorithm="Random")
    jobs = [
        {"name": run.parent.name, **json.loads(run.read_text())["args"], "hparams": {}}
        for run in sorted(tmp_path.glob("*/results.jsonl"))
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "jobs": jobs}))
    text = collect("--selection", "training-domain")
    usual, sources = text.split("### Tiny, by what was trained on")
    assert _cells(usual, "ERM")[:2] == [f"60.0 ± {DASH}", f"50.0 ± {DASH}"] and "Random" not in usual
    # env1 and env2 are test environments, though never alone.
    assert "No job of this sweep holds out env1 or env2 alone; no average" in usual
    assert "as its test environment" not in text
    assert _cells(sources, "ERM, trained on env0")[:3] == [f"30.0 ± {DASH}", f"40.0 ± {DASH}", f"50.0 ± {DASH}"]
    assert "mean of" not in sources


def test_pairs_beside_single_environments_are_for_selection(tmp_path, collect):
    single = dict.fromkeys([(0,), (1,), (2,)], (0.5,) * 6)
    pairs = dict.fromkeys([(0, 1), (0, 2), (1, 2)], (0.5,) * 6)
    _sweep(tmp_path, {**single, **pairs})
    text = collect()
    assert "trained on" not in text.replace("environments they were trained on", "") and text.count("\n| ERM") == 3


def test_averages_over_data_sets_are_over_sources(tmp_path, collect):
    for dataset, lower in (("Ink", 0.0), ("Oil", 0.1)):
        for test_envs, accuracies in SINGLE_SOURCE.items():
            values = tuple(accuracy - lower for accuracy in accuracies)
            write_run(tmp_path, f"{dataset}{test_envs}", [record(values, test_envs=test_envs, dataset=dataset)])
    text = collect("--selection", "training-domain")
    averages = text.split("### Averages over data sets")[1]
    assert _cells(averages, "ERM") == [f"35.0 ± {DASH}", f"25.0 ± {DASH}", "30.0"]
    assert "Ink: over all pairs of what was trained on and another environment that was tested." in averages
