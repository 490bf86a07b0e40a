"""Packed sweeps: nothing is lost on the way, and whoever reads records finds the same ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from golden.make_synth_sweep import write as write_synthetic_sweep
from runs_on_disk import record, write_run
from told_errors import assert_one_line_error

import domainbed_sfp as dsfp
from domainbed_sfp.sweep.pack import pack

SPEC = """
datasets: [FullColoredDigits]
algorithms: [{name: Magnitude, hparams: {sparsity: 0.5}}]
test_envs: [[0]]
n_hparams: 1
n_trials: 1
steps: 3
checkpoint_freq: 2
hparams: {batch_size: 16}
"""

GOLDEN = Path(__file__).parents[1] / "golden"


def domainbeds_lines(root: Path) -> list[str]:
    """What DomainBed's load_records parses: all lines of DIR/*/results.jsonl, each without its last character."""
    lines = []
    for folder in os.listdir(root):
        try:
            with open(root / folder / "results.jsonl") as file:
                lines += [json.dumps(json.loads(line[:-1])) for line in file]
        except OSError:
            pass
    return sorted(lines)


def box(root: Path, names: str, *, algorithm: str = "ERM", **fields) -> Path:
    """Finished runs, a letter each."""
    for trial, name in enumerate(names):
        args = {"output_dir": f"/elsewhere/{name}"}
        made = [record((0.5, 0.6) * 3, step=s, trial_seed=trial, algorithm=algorithm, args=args) for s in (0, 300)]
        write_run(root, name, [{**one, **fields} for one in made])
    return root


def folders(root: Path) -> list[str]:
    return sorted(
        "packed" if path.name.startswith("packed-") else path.name for path in root.iterdir() if path.is_dir()
    )


def packed_file(root: Path) -> Path:
    (file,) = root.glob("packed-*/results.jsonl")
    return file


@pytest.mark.parametrize("variant", ["full", "single"])
def test_domainbed_and_our_tables_read_the_same(main, tmp_path, variant):
    write_synthetic_sweep(tmp_path / "out", variant)
    lines, frame = domainbeds_lines(tmp_path / "out"), dsfp.read_records(tmp_path / "out")
    chosen = main("collect", "--input_dir", "out", "--chosen", "--format", "csv").stdout
    told = main("sweep", "pack", "--output_dir", "out").stdout
    assert f"holds {len(lines):,} records of {len(lines) // 3} runs; {len(lines) // 3} folders are gone." in told
    assert folders(tmp_path / "out") == ["packed"] and domainbeds_lines(tmp_path / "out") == lines
    assert dsfp.read_records(tmp_path / "out").equals(frame)
    assert main("collect", "--input_dir", "out", "--chosen", "--format", "csv").stdout == chosen
    # Runs lie in the file in the order of their names.
    theirs = main("collect", "--input_dir", "out", "--format", "domainbed").stdout
    assert theirs == (GOLDEN / "expected" / f"{variant}.sorted.txt").read_text()


def test_whoever_reads_more_of_a_record_finds_it(main, tmp_path):
    cases = [{"degradation": "none", "severity": 0, "samples": 9, "accuracy": 0.5}]
    box(tmp_path / "out", "ab", env0_degraded=cases, loss=0.5, rank_tau_env0=0.5, environments=["x", "y", "z"])
    commands = [("degraded",), ("rankings",), ("report", "--output", "page.html")]
    before = [main(*command, "--input_dir", "out").stdout for command in commands]
    page = (tmp_path / "page.html").read_text()
    main("sweep", "pack", "--output_dir", "out")
    assert [main(*command, "--input_dir", "out").stdout for command in commands] == before
    assert (tmp_path / "page.html").read_text() == page and ">a<" in page


def test_what_else_a_run_holds_is_named_and_goes_only_when_told(main, tmp_path):
    root = box(tmp_path / "out", "abc")
    (root / "a" / "masks").mkdir()
    for file in ("a/masks/one", "a/model.pkl", "b/model.pkl"):
        (root / file).write_bytes(bytes(1_500_000))
    (root / "b" / "err.txt").touch()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix != ".lock"}
    for drop, names in (((), "masks model.pkl"), (("--drop", "masks", "out.txt"), "masks model.pkl out.txt")):
        refused = main("sweep", "pack", "--output_dir", "out", *drop, check=False)
        assert_one_line_error(refused, "model.pkl (3.0 MB of 2)", f"--drop {names},")
        assert ("masks (1.5 MB of 1)" in refused.stderr) == (not drop)
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix != ".lock"} == before
    main("sweep", "pack", "--output_dir", "out", "--drop", "masks", "model.pkl")
    assert folders(root) == ["packed"]


def test_what_is_no_finished_run_stays(main, tmp_path):
    root = box(tmp_path / "out", "abcd")
    (root / "a" / "done").unlink()
    (root / "b").rename(root / "renamed")
    both = (root / "c" / "results.jsonl").read_text() + (root / "d" / "results.jsonl").read_text()
    (root / "c" / "results.jsonl").write_text(both)
    lines = domainbeds_lines(root)
    told = main("sweep", "pack", "--output_dir", "out").stdout
    assert (
        "Left as they are (a; 1 in all): they are not finished." in told
        and "(renamed; 1 in all): their folders have other names" in told
    )
    assert "(c; 1 in all): their records are of several runs" in told
    assert folders(root) == ["a", "c", "packed", "renamed"] and domainbeds_lines(root) == lines
    assert "1 incomplete run left out" in main("collect", "--input_dir", "out", "--selection", "training-domain").stdout
    shutil.rmtree(packed_file(root).parent)
    refused = main("sweep", "pack", "--output_dir", "out", check=False)
    assert_one_line_error(refused, "no finished run to pack; of 1, they are not finished")


def test_packing_again_merges_and_changes_nothing_where_nothing_is_new(main, tmp_path):
    root = box(tmp_path / "out", "bd")
    main("sweep", "pack", "--output_dir", "out")
    first = packed_file(root)
    box(root, "ace", algorithm="CORAL")
    lines = domainbeds_lines(root)
    main("sweep", "pack", "--output_dir", "out")
    second = packed_file(root)
    assert second != first and domainbeds_lines(root) == lines
    before = second.stat().st_mtime_ns
    assert "5 runs; 0 folders are gone." in main("sweep", "pack", "--output_dir", "out").stdout
    assert packed_file(root).stat().st_mtime_ns == before
    # Two machines' packed sweeps can be copied together, and copies of one run are one.
    other = box(tmp_path / "other", "f")
    main("sweep", "pack", "--output_dir", "other")
    shutil.copytree(other, root, dirs_exist_ok=True)
    lines = domainbeds_lines(root)
    assert len(list(root.glob("packed-*"))) == 2 and dsfp.read_records(root).run.nunique() == 6
    box(root, "f")
    main("sweep", "pack", "--output_dir", "out")
    assert folders(root) == ["packed"] and domainbeds_lines(root) == lines


def test_two_runs_of_one_name_are_not_mixed(main, tmp_path):
    root = box(tmp_path / "out", "ab")
    main("sweep", "pack", "--output_dir", "out")
    box(root, "a", loss=0.1)
    before = sorted(root.rglob("*"))
    refused = main("sweep", "pack", "--output_dir", "out", check=False)
    assert_one_line_error(refused, "run 'a' has other records in 'out/a' than in 'out/packed-")
    assert [path for path in sorted(root.rglob("*")) if path.suffix != ".lock"] == [
        path for path in before if path.suffix != ".lock"
    ]
    with pytest.warns(UserWarning, match=r"once more: a \(1 in all\); sweep pack tidies up"):
        assert dsfp.read_records(root).run.tolist() == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    "change", [lambda data: data[: data.index(b"\n") + 1], lambda data: data.replace(b"0.6", b"0.7")]
)
def test_a_damaged_file_is_known(main, tmp_path, change):
    root = box(tmp_path / "out", "ab")
    main("sweep", "pack", "--output_dir", "out")
    file = packed_file(root)
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    for command in (("collect", "--input_dir"), ("sweep", "pack", "--output_dir")):
        assert_one_line_error(main(*command, "out", check=False), str(file.relative_to(tmp_path)), "copy it anew")
    file.write_bytes(whole.replace(b"\n", b"\r\n"))  # as a checkout on Windows
    assert dsfp.read_records(root).run.nunique() == 2


class Killed(BaseException):
    """Nothing catches it."""


def _kill_at(monkeypatch, count: int) -> None:
    """The process dies at the `count`-th change that it makes to the disk; removals die half-way, too."""
    left = iter(range(count))

    def dying(function, part=None):
        def call(*args, **kwargs):
            if next(left, None) is None:
                if part:
                    part(args[0])
                raise Killed
            return function(*args, **kwargs)

        return call

    def half(folder):
        for file in sorted(Path(folder).iterdir())[:1]:
            os.remove(file)

    for name in ("mkdir", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree, half))


@pytest.mark.filterwarnings("ignore:.*sweep pack tidies up")
def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    moments = 0
    for count in range(100):
        root = box(tmp_path / str(count), "ab")
        pack(str(root))
        box(root, "cde")
        for name in "cde":
            (root / name / "out.txt").write_text("x")
        frame, lines = dsfp.read_records(root), domainbeds_lines(root)
        with pytest.MonkeyPatch.context() as patched:
            _kill_at(patched, count)
            try:
                pack(str(root), ["out.txt"])
            except Killed:
                moments += 1
        assert dsfp.read_records(root).equals(frame)
        assert set(domainbeds_lines(root)) == set(lines)
        pack(str(root), ["out.txt"])
        assert folders(root) == ["packed"] and domainbeds_lines(root) == lines
        if moments <= count:
            break
    assert moments > 10


def test_a_packed_sweep_goes_on(main, tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    sweep = ("spec.yaml", "--output_dir", "out", "--jobs", 1)
    main("sweep", "launch", *sweep)
    (run,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    command = ("train", "--output_dir", run, *_arguments(run))
    dropped = ("--drop", "out.txt", "err.txt", "masks", "model.pkl")
    main("sweep", "pack", "--output_dir", "out", *dropped)
    lines = domainbeds_lines(tmp_path / "out")
    status = main("sweep", "status", *sweep).stdout
    assert "1 jobs: 1 done" in status and "packed in out/packed-" in status
    launched = main("sweep", "launch", *sweep, "--n_trials", 2).stdout
    assert "2 jobs: 1 done, 0 incomplete, 1 not launched." in launched and "2 jobs: 2 done" in launched
    assert "Deleted 0 jobs!" in main("sweep", "delete_incomplete", *sweep, "--skip_confirmation").stdout
    assert "already done" in main(*command).stdout  # whoever starts the run by hand
    main("sweep", "pack", "--output_dir", "out", *dropped)
    assert folders(tmp_path / "out") == ["packed"] and set(lines) < set(domainbeds_lines(tmp_path / "out"))
    # What needs more than records says so.
    for arguments, words in (
        (("export", run, "--output", "net.safetensors"), "sweep pack has kept its records alone"),
        (("export", "out", "--output", "net.safetensors"), "2 packed runs"),
        (("submit", "--input_dir", "out", "--algorithm", "Magnitude", "--output", "bundle"), "sweep pack keeps none"),
    ):
        assert_one_line_error(main(*arguments, check=False), words)
    submitted = ("submit", "--input_dir", "out", "--algorithm", "Magnitude", "--output", "bundle", "--without_masks")
    main(*submitted)
    assert len(list((tmp_path / "bundle" / "records").iterdir())) == 2


def _arguments(run: Path) -> list[str]:
    """The flags that compute a run again."""
    args = json.loads((run / "results.jsonl").read_text().splitlines()[0])["args"]
    names = ("algorithm", "dataset", "hparams", "seed", "steps", "checkpoint_freq")
    return [word for name in names for word in (f"--{name}", str(args[name]))] + ["--test_envs", "0"]


def test_flags_that_do_not_go_with_it(main, tmp_path):
    box(tmp_path / "out", "a")
    for arguments, words in (
        (("launch", "quickstart", "--drop", "masks"), "--drop goes with sweep pack"),
        (("pack", "quickstart"), "takes no spec"),
    ):
        assert_one_line_error(main("sweep", *arguments, "--output_dir", "out", check=False), words)
    assert_one_line_error(main("sweep", "pack", "--output_dir", "none", check=False), "no such folder")
    inside = main("collect", "--input_dir", "out", check=False)
    assert inside.returncode == 0
    main("sweep", "pack", "--output_dir", "out")
    folder = packed_file(tmp_path / "out").parent
    for command in ("collect", "rankings"):
        assert_one_line_error(main(command, "--input_dir", folder, check=False), "packed records")
