"""`collect` in DomainBed's format: to the byte; and what was chosen."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from golden.make_synth_sweep import write as write_synthetic_sweep
from runs_on_disk import record, write_run
from searched_runs import GOLDEN


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
