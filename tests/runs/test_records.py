"""Records: written atomically, read with forgiveness for a torn end and for nothing else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_on_disk import record, write_run

from domainbed_sfp.core import domainbed_facts
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.runs.manifests import read_manifests
from domainbed_sfp.runs.record_lines import end_last_line
from domainbed_sfp.runs.records import (  # fmt: skip
    is_done,
    last_record,
    last_step,
    load_records,
    read_records,
    write_records,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def fail(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def test_facts_are_domainbeds():
    registry = json.loads((GOLDEN / "registry.json").read_text())
    assert list(domainbed_facts.DATASETS) == registry["order"]
    assert list(domainbed_facts.ALGORITHMS) == registry["algorithms_order"]
    for name, facts in registry["datasets"].items():
        assert list(domainbed_facts.ENVIRONMENTS[name]) == facts["ENVIRONMENTS"]
        assert facts["N_STEPS"] == domainbed_facts.DEFAULT_STEPS


def test_written_records_have_sorted_keys_and_plain_numbers(tmp_path):
    path = tmp_path / "results.jsonl"
    write_records(path, [{"b": np.float32(0.5), "a": np.int64(3), "c": np.array([1, 2]), "d": np.bool_(True)}])
    assert path.read_text() == '{"a": 3, "b": 0.5, "c": [1, 2], "d": true}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.jsonl"
    write_records(path, [{"step": 0}])
    with pytest.raises(TypeError, match="cannot hold a set"):
        write_records(path, [{"step": 0}, {"step": {1}}])
    assert path.read_text() == '{"step": 0}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats())))
def test_what_is_written_is_read(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("records") / "results.jsonl"
    write_records(path, records)
    assert repr(list(read_records(path.parent, fail))) == repr([dict(sorted(one.items())) for one in records])


@settings(deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_loses_at_most_its_last_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("records") / "results.jsonl"
    records = [{"step": step, "loss": 0.5} for step in range(3)]
    write_records(path, records)
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    warnings: list[str] = []
    got = list(read_records(path.parent, warnings.append))
    # A record is whole with or without the line break after it.
    ends = [len(b"\n".join(whole.split(b"\n")[: n + 1])) for n in range(3)]
    assert got == records[: sum(size >= end for end in ends)]
    torn = size not in {0, *ends, *(end + 1 for end in ends)}
    assert [str(path) in message for message in warnings] == [True] * torn


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path):
    run = write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4), step=step) for step in (0, 1, 2)])
    lines = (run / "results.jsonl").read_text().splitlines()
    (run / "results.jsonl").write_text("\n".join([lines[0], lines[1][:30], lines[2]]))
    with pytest.raises(UserError, match=r"run/results\.jsonl, line 2: not a JSON record"):
        load_records(tmp_path, warn=fail)


def test_a_torn_last_line_is_skipped_with_a_warning(tmp_path):
    run = write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4), step=step) for step in (0, 1, 2)])
    whole = (run / "results.jsonl").read_text()
    (run / "results.jsonl").write_text(whole[:-40])
    warnings: list[str] = []
    (loaded,) = load_records(tmp_path, warn=warnings.append)
    assert loaded.steps == [0, 1]
    # It was done, so what is lost was its end: it must not count by an earlier checkpoint.
    assert not loaded.complete and "although it is done: launch it again" in str(loaded.failure)
    assert warnings == [f"{run / 'results.jsonl'}: the last line (3) is torn and skipped"]


def test_a_run_by_columns(tmp_path):
    write_run(
        tmp_path,
        "run",
        [
            record((0.1, 0.2, 0.3, 0.4), step=0, sparsity=0.0, final_compression=False, loss=math.nan),
            record((0.5, 0.6, 0.7, 0.8), step=9, sparsity=0.5, macs=12, precision="bf16", commit="abc"),
        ],
        done=False,
    )
    (run,) = load_records(tmp_path, warn=fail)
    assert (run.directory, run.complete, run.steps) == ("run", False, [0, 9])
    assert run.in_acc.tolist() == [[0.1, 0.3], [0.5, 0.7]]
    assert run.out_acc.tolist() == [[0.2, 0.4], [0.6, 0.8]]
    assert run.final.tolist() == [False, True]
    assert run.costs["sparsity"].tolist() == [0.0, 0.5]
    assert math.isnan(run.costs["macs"][0]) and run.costs["macs"][1] == 12
    assert run.facts == {"precision": "bf16", "commit": "abc"}


def test_args_that_change_midway_make_two_runs(tmp_path):
    one = record((0.1, 0.2, 0.3, 0.4), step=0)
    two = record((0.1, 0.2, 0.3, 0.4), step=0, trial_seed=1)
    write_run(tmp_path, "run", [one, one, two])
    assert [(run.trial_seed, len(run.steps)) for run in load_records(tmp_path, warn=fail)] == [(0, 2), (1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "has no field 'step'"),
        ({"args": None}, "has no field 'args'"),
        ({"env0_out_acc": None}, "has no field 'env0_out_acc'"),
        ({"env1_in_acc": None}, "has no field 'env1_in_acc'"),
        ({"args": {"dataset": "Tiny"}}, "has no field 'algorithm'"),
    ],
)
def test_a_record_without_a_field_says_which(tmp_path, change, message):
    broken = {**record((0.1, 0.2, 0.3, 0.4)), **change}
    broken = {name: value for name, value in broken.items() if value is not None}
    write_run(tmp_path, "run", [broken])
    with pytest.raises(UserError, match=rf"results\.jsonl, line 1: the record {message}"):
        load_records(tmp_path, warn=fail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hparams_seed": [0]}, r"args\.hparams_seed is \[0\]; expected a whole number"),
        ({"trial_seed": "0"}, r"args\.trial_seed is '0'; expected a whole number"),
        ({"dataset": {}}, r"args\.dataset is \{\}; expected a name"),
        ({"algorithm": 3}, r"args\.algorithm is 3; expected a name"),
    ],
)
def test_arguments_of_another_kind_name_the_field(tmp_path, change, message):
    write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4), args=change)])
    with pytest.raises(UserError, match=rf"results\.jsonl, line 1: {message}"):
        load_records(tmp_path, warn=fail)


@settings(deadline=None)
@given(
    st.binary(max_size=80)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["format", "jobs", "protocol", "name", "test_envs"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_a_sweep_json_holds_it_is_read_or_named(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("sweep")
    (root / "sweep.json").write_bytes(data)
    try:
        read_manifests(root)
    except UserError as error:
        assert "sweep.json" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "..", ".", "", "a\0b", "a/b"])
def test_a_job_lies_in_its_sweep_and_nowhere_else(tmp_path, name):
    args = record((0.5, 0.5))["args"]
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "jobs": [{**args, "name": name}]}))
    with pytest.raises(UserError, match="no folder's"):
        read_manifests(tmp_path)


@pytest.mark.parametrize("value", [None, math.nan, "high", [0.5]])
def test_an_accuracy_that_is_no_number_names_the_file(tmp_path, value):
    write_run(tmp_path, "run", [{**record((0.1, 0.2, 0.3, 0.4)), "env1_in_acc": value}])
    with pytest.raises(UserError, match=r"run/results\.jsonl: an accuracy is no fraction in \[0, 1\], or"):
        load_records(tmp_path, warn=fail)


@pytest.mark.parametrize("value", [7.5, -0.1, math.inf])
def test_an_accuracy_outside_its_range_names_file_field_and_step(tmp_path, value):
    steps = [record((0.1, 0.2, 0.3, 0.4)), {**record((0.1, 0.2, 0.3, 0.4), step=5), "env1_in_acc": value}]
    write_run(tmp_path, "run", steps)
    with pytest.raises(UserError, match=rf"run/results\.jsonl: .*\(env1_in_acc of step 5 is {value}\)"):
        load_records(tmp_path, warn=fail)


def test_a_step_that_is_no_number_names_the_line(tmp_path):
    write_run(tmp_path, "run", [{**record((0.1, 0.2, 0.3, 0.4)), "step": "last"}])
    with pytest.raises(UserError, match=r"results\.jsonl, line 1: 'step' is 'last'; expected a whole number"):
        load_records(tmp_path, warn=fail)


def test_a_test_environment_the_record_lacks(tmp_path):
    write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4), test_envs=(2,))])
    with pytest.raises(UserError, match=r"args\.test_envs has 2; the record has environments 0 to 1"):
        load_records(tmp_path, warn=fail)


def test_input_dirs_that_hold_no_sweep(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        load_records(tmp_path / "missing", warn=fail)
    with pytest.raises(UserError, match="holds no run with a record"):
        load_records(tmp_path, warn=fail)
    run = write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4))])
    with pytest.raises(UserError, match=f"is a single run .* expected the directory above it, {tmp_path}"):
        load_records(run, warn=fail)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "jobs": []}', '{"format": 1, "jobs": [{"name": "a"}]}'])
@pytest.mark.parametrize("name", ["sweep.json", "sweep-0123456789ab.json"])
def test_a_sweep_description_that_is_none(tmp_path, name, text):
    assert read_manifests(tmp_path) == []
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_manifests(tmp_path)


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for text in ("first", "second"):
        write_atomically(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == text
    write_atomically(os.devnull, "nothing")
    assert not os.path.isfile(os.devnull)


# How users' scripts, editors and other systems leave a file of whole records.
WHOLE = {
    "as written": lambda text: text,
    "no final newline": lambda text: text.removesuffix("\n"),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CRLF without the last": lambda text: text.removesuffix("\n").replace("\n", "\r\n"),
    "blank lines at the end": lambda text: text + "\n \n\r\n",
    "blank lines between": lambda text: text.replace("\n", "\n\n"),
    "a byte order mark": lambda text: "\ufeff" + text,
    "longer than what is read first": lambda text: text + " " * 200_000 + "\n",
}


@pytest.mark.parametrize("how", WHOLE)
def test_whole_records_are_whole_for_everyone(tmp_path, how):
    run = write_run(tmp_path, "run", [record((0.1, 0.2, 0.3, 0.4), step=step) for step in (0, 1, 2)])
    (run / "results.jsonl").write_bytes(WHOLE[how]((run / "results.jsonl").read_text()).encode())
    (loaded,) = load_records(tmp_path, warn=fail)
    assert loaded.complete and loaded.steps == [0, 1, 2]
    assert is_done(run) and last_step(run) == 2
    (run / "done").unlink()
    assert not is_done(run) and not load_records(tmp_path, warn=fail)[0].complete


@settings(deadline=None)
@given(
    st.integers(0, 3),
    st.binary(max_size=40) | st.sampled_from([b"{", b"[]\n", b"3", b"{}{}\n", b"\0\0", b'{"a": NaN}']),
)
def test_a_run_is_done_where_collect_counts_it(tmp_path_factory, lines, end):
    root = tmp_path_factory.mktemp("sweep")
    run = write_run(root, "run", [record((0.1, 0.2, 0.3, 0.4), step=step) for step in range(lines)])
    with open(run / "results.jsonl", "ab") as file:
        file.write(end)
    try:
        counted = any(loaded.complete for loaded in load_records(root, warn=lambda message: None))
    except UserError:  # a line that is no record, or none at all: collect says so
        return
    assert is_done(run) == counted


def test_done_without_records_and_records_without_done(tmp_path):
    run = write_run(tmp_path, "run", [])
    assert not is_done(run) and last_step(run) == -1 and last_record(run) is None
    (run / "results.jsonl").unlink()
    assert not is_done(run) and last_record(run) is None
    assert not is_done(tmp_path / "nowhere") and last_step(tmp_path / "nowhere") == -1


@pytest.mark.parametrize("end, kept", [("", 2), ("\n", 2), ('\n{"step": 2, "en', 2), ('{"step": 1}', 1), ("\n\n", 2)])
def test_what_is_appended_is_never_glued_to_what_is_there(tmp_path, end, kept):
    path = tmp_path / "results.jsonl"
    end_last_line(path)
    assert not path.exists()
    path.write_text('{"step": 0}\n{"step": 1}' + end)
    end_last_line(path)
    with open(path, "a") as file:
        file.write('{"step": 9}\n')
    assert [one["step"] for one in read_records(path.parent, fail)] == [*range(kept), 9]
