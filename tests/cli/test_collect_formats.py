"""The formats of `collect`, its options and errors."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import pytest
from golden.make_synth_sweep import write_run as write_synthetic_run
from runs_on_disk import record, write_run
from searched_runs import ROOT, three_trials

from domainbed_sfp.analysis.render.grids import magnitude


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
