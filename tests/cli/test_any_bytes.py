"""Every reader of files and texts, given anything: it reads them, or says in one line what is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs_on_disk import record, write_run
from safetensors.torch import save
from synthetic_entries import many

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.analysis import degraded, rankings
from domainbed_sfp.cli.main import make_parser
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.overrides import parse_overrides
from domainbed_sfp.data.images.cache import cached_images
from domainbed_sfp.deploy import exported, files, finished_runs, packed
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.documents import entry as entries
from domainbed_sfp.leaderboard.site import build
from domainbed_sfp.runs import checkpoints, records
from domainbed_sfp.sweep import slurm_batches, spec
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.training import hparams

# The same examples each time: what fails fails for everybody.
EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

# Numbers that arithmetic, indexing and conversions trip over, and words that mean something in some file.
NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, -0.0, float("nan"), float("inf")])
WORDS = st.sampled_from(["", "ERM", "Magnitude", "ColoredDigits", "PACS", "lr", "name", "\0", "\udc80", "é\n", "../x"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


# Too deep for a parser that calls itself, too long for a number, not one text, twice the same name.
HOSTILE = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"-9e999",
    b"{}{}",
    b'{"lr": 1, "lr": 2}',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{",
]


def texts_of(valid: object) -> st.SearchStrategy[bytes]:
    """JSON texts: anything, `valid` with one of its values at any depth replaced or left out, and what parsers dislike."""
    changed = st.builds(lambda value: json.dumps(value).encode(), VALUES | _changed(valid))
    return st.one_of(changed, changed, changed, st.sampled_from(HOSTILE))


def _changed(valid: object) -> st.SearchStrategy[object]:
    paths = list(_paths(valid))
    return st.builds(
        lambda path, value, out: _with(valid, path, value, out), st.sampled_from(paths), VALUES, st.booleans()
    )


def _paths(value: object, path: tuple = ()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _paths(inner, (*path, key))


def _with(value: object, path: tuple, new: object, leave_out: bool) -> object:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
    if len(path) == 1 and leave_out:
        del copy[path[0]]
    else:
        copy[path[0]] = _with(copy[path[0]], path[1:], new, leave_out)
    return copy


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Anything, and `valid` cut off, with bytes changed, or with others put in."""

    def change(at: int, length: int, new: bytes) -> bytes:
        return valid[:at] + new + valid[at + length :]

    at = st.integers(0, min(len(valid), 600))
    return st.binary(max_size=60) | st.builds(change, at, st.sampled_from([0, 1, 3, len(valid)]), st.binary(max_size=4))


def answered(read: Callable[[], object]) -> None:
    """It returns, or raises a UserError of one line that can be printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            read()
        except UserError as error:
            assert str(error) and "\n" not in str(error)


# texts ---------------------------------------------------------------------------------------------------------------

SPEC = {
    "datasets": ["ColoredDigits"], "algorithms": ["ERM", {"name": "Magnitude", "hparams": {"sparsity": 0.5}}],
    "n_hparams": 1, "n_trials": 1, "steps": 3, "test_envs": [[0]], "hparams": {"lr": 0.001}, "single_test_envs": True,
}  # fmt: skip


def _jobs(path: Path) -> None:
    found = spec.read_spec(str(path))
    # A grid of a billion jobs is one that can be asked for.
    if max(found.n_hparams - found.n_hparams_from, found.n_trials - found.n_trials_from) < 100:
        spec.make_jobs(found, None)


@EXAMPLES
@given(data=texts_of(SPEC) | damaged(json.dumps(SPEC).encode()))
def test_specs(tmp_path, data):
    path = tmp_path / "spec.yaml"
    path.write_bytes(data)
    answered(lambda: _jobs(path))


@EXAMPLES
@given(
    text=texts_of({"lr": 0.1, "batch_size": 8, "backbone": "mnist_cnn", "objective": "ERM"}).map(
        lambda data: data.decode(errors="replace")
    )
    | st.text(max_size=20)
)
def test_hparams(text):
    def read():
        for algorithm in ("Magnitude", "SFP", "DQMQ"):
            hparams.resolve_hparams(algorithm, "ColoredDigits", overrides=parse_overrides(text))

    answered(read)


PARSER = make_parser()

# a sweep on disk -----------------------------------------------------------------------------------------------------

RECORD = record(
    (0.5, 0.5, 0.5, 0.5), sparsity=0.5, macs=10, final_compression=True, environments=["a", "b"], input_shape=[1, 2, 2],
    env0_degraded=[{"degradation": "none", "severity": 0, "samples": 4, "accuracy": 0.5, "mean_bits": 4.0}],
    rank_tau_env0=0.5, rank_overlap_env0=0.5,
)  # fmt: skip
SWEEP = {
    "format": 1, "protocol": {"task": "domain_generalization", "steps": 5, "holdout_fraction": 0.2},
    "jobs": [{"name": "x", "dataset": "Tiny", "algorithm": "ERM", "test_envs": [0], "hparams_seed": 0, "trial_seed": 0,
              "seed": 0, "steps": 5, "hparams": {}}],
}  # fmt: skip


def _collected(root: Path) -> None:
    args = PARSER.parse_args(["collect", "--input_dir", str(root)])
    args.run(args)


@EXAMPLES
@given(data=texts_of(RECORD) | damaged(json.dumps(RECORD).encode()))
def test_records(tmp_path, data):
    run = write_run(tmp_path, "run", [RECORD])
    (run / "results.jsonl").write_bytes(json.dumps(RECORD).encode() + b"\n" + data)
    answered(lambda: _collected(tmp_path))
    answered(lambda: (records.is_done(run), records.last_step(run), records.last_record(run)))
    answered(lambda: degraded.cases_of(tmp_path, print))
    answered(lambda: rankings.agreement_rows(tmp_path, print))


@EXAMPLES
@given(data=texts_of(SWEEP) | damaged(json.dumps(SWEEP).encode()))
def test_sweep_json(tmp_path, data):
    write_run(tmp_path, "run", [RECORD])
    (tmp_path / "sweep.json").write_bytes(data)
    answered(lambda: _collected(tmp_path))
    answered(lambda: SweepDirectory(tmp_path).listed())


@EXAMPLES
@given(data=texts_of({"step": 1, "error": "e"}) | st.binary(max_size=20))
def test_notes_of_failures_and_of_slurm(tmp_path, data):
    batch = tmp_path / "slurm" / "sfp-1"
    batch.mkdir(parents=True, exist_ok=True)
    for name in ("tasks.json", "0.json"):
        (batch / name).write_bytes(data)
    (tmp_path / "failure.json").write_bytes(data)
    answered(lambda: records.load_failure(tmp_path))
    answered(lambda: slurm_batches.read_tasks(batch))
    answered(lambda: slurm_batches.read_note(batch, 0))


# images and tensors --------------------------------------------------------------------------------------------------


def _image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@settings(EXAMPLES, max_examples=12)
@given(data=st.data())
def test_images(tmp_path, kind, data):
    path = tmp_path / "a" / "b" / f"image.{kind.lower()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.draw(damaged(_image(kind))))
    answered(lambda: cached_images([path], tmp_path / "a", 4, tmp_path / "cache"))


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@settings(EXAMPLES, max_examples=25)
@given(data=st.data())
def test_weights(tmp_path, suffix, data):
    tensors = {"conv1.weight": torch.zeros(2)}
    valid = _saved({"state_dict": tensors}) if suffix == "pth" else save(tensors)
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(data.draw(damaged(valid)))
    answered(lambda: networks.make_featurizer((1, 8, 8), {"backbone": "mnist_cnn", "weights": str(path)}))


@functools.cache
def _erm() -> torch.nn.Module:
    values = hparams.resolve_hparams("ERM", "ColoredDigits", overrides={"backbone": "mnist_cnn"})
    return registry.get("ERM").cls((2, 8, 8), 2, 2, values)


DESCRIPTION = {
    "format": 1, "backbone": "mnist_cnn", "input_shape": [1, 8, 8], "num_classes": 2, "nonlinear_classifier": False,
    "normalization": None, "group_norms": {"featurizer.bn0": [8] * 8}, "gates": {}, "origin": {},
}  # fmt: skip


@EXAMPLES
@given(
    text=texts_of(DESCRIPTION).map(lambda data: data.decode(errors="replace")),
    header=st.sampled_from([exported.HEADER, packed.HEADER, "domainbed_sfp"]),
    damage=st.none() | st.integers(0, 80),
)
def test_exported_files_and_checkpoints(tmp_path, text, header, damage):
    data = save({"classifier.weight": torch.zeros(2, 128)}, metadata={header: text})
    path = tmp_path / "file.safetensors"
    path.write_bytes(data if damage is None else data[:damage] + b"\xff" + data[damage + 1 :])
    answered(lambda: files.load(path))
    answered(lambda: exported.read_description(path))
    answered(lambda: checkpoints.read_state(path))
    answered(lambda: checkpoints.load_checkpoint(path, _erm()))


@settings(EXAMPLES, max_examples=25)
@given(
    value=VALUES,
    name=st.sampled_from(["args", "model_hparams", "model_dict", "model_input_shape", "model_num_classes", None]),
    setting=st.sampled_from(["backbone", "lr", "nonlinear_classifier", "weights", "freeze_bn"]) | st.none(),
)
def test_saved_models(tmp_path, value, name, setting):
    run = write_run(tmp_path, "run", [RECORD])
    saved = {
        "args": {"algorithm": "ERM", "dataset": "ColoredDigits"}, "model_input_shape": (2, 8, 8), "model_num_classes": 2,
        "model_num_domains": 2, "model_hparams": dict(_erm().hparams), "model_dict": _erm().state_dict(),
    }  # fmt: skip
    if setting is None:
        saved = value if name is None else {**saved, name: value}
    else:
        saved["model_hparams"][setting] = value
    (run / "model.pkl").write_bytes(_saved(saved))
    answered(lambda: finished_runs.load_run(run))


# the leaderboard -----------------------------------------------------------------------------------------------------

ENTRY = json.loads(entries.text_of(many()[0]))


@EXAMPLES
@given(data=texts_of(ENTRY) | damaged(json.dumps(ENTRY).encode()))
def test_entries(tmp_path, data):
    path = tmp_path / "entries" / ENTRY["dataset"] / "ERM.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    answered(lambda: build.build(tmp_path / "entries", tmp_path / "page", list(build.FILES)))


@EXAMPLES
@given(
    name=st.sampled_from(["submission.json", "SHA256SUMS", "records/x.jsonl", "masks/x", "x"]),
    data=texts_of({"format": 1, "name": "ERM", "datasets": {"PACS": {"protocol": {}}}}) | st.binary(max_size=60),
)
def test_bundles(tmp_path, name, data):
    root = tmp_path / "bundle"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    answered(lambda: validation.text_of(validation.validate(root)))
