"""Which checkpoints are evaluated, and that the fast form of an evaluation gives the plain one's numbers."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import pytest
import torch
from computed_sweeps import compute_sweep

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.base import Dataset, Environment
from domainbed_sfp.data.splits import split_environment
from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.networks import folding
from domainbed_sfp.networks.efficientnet_lite0 import EfficientNetLite0
from domainbed_sfp.runs import records
from domainbed_sfp.runs.settings import RunSettings, identity_of
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs
from domainbed_sfp.training import evaluation, hparams, loop
from domainbed_sfp.training import train as training
from domainbed_sfp.training.evaluation import evaluate
from domainbed_sfp.training.interruption import Interrupted

ARGUMENTS = RunSettings(
    dataset="FullColoredDigits", algorithm="Magnitude", test_envs=[2], steps=9, checkpoint_freq=2,
    hparams='{"batch_size": 8, "prune_start": 0.2, "prune_end": 0.5}', skip_model_save=True,
)  # fmt: skip


def train(folder, **changes):
    """The records of a run."""
    with contextlib.redirect_stdout(io.StringIO()):
        training.train(replace(ARGUMENTS, output_dir=str(folder), **changes))
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    """A sweep of one compressed and one dense run, with `evaluate: final`."""
    root = tmp_path_factory.mktemp("final")
    spec = SweepSpec(
        ["FullColoredDigits"], ["Magnitude", "ERM"], n_hparams=1, n_trials=1, steps=9, checkpoint_freq=2,
        test_envs=[[2]], hparams={"batch_size": 8}, evaluate="final",
    )  # fmt: skip
    return compute_sweep(root, spec)


def test_final_leaves_out_what_selection_may_not_choose_and_changes_nothing_else(tmp_path):
    everything, few = train(tmp_path / "all"), train(tmp_path / "final", evaluate="final")
    candidates = [record for record in everything if record["final_compression"]]
    assert len(candidates) < len(everything) == 5
    assert [record["step"] for record in few] == [record["step"] for record in candidates]
    for one, other in zip(few, candidates):
        assert one["args"]["evaluate"] == "final" and other["args"]["evaluate"] == "all"
        # Means of the steps since the last record differ in what they are taken over.
        for name in ("masks", "sparsity", "parameters", *(name for name in one if name.endswith("_acc"))):
            assert one[name] == other[name], name
    assert few[1:] != [] and few[-1]["loss"] == candidates[-1]["loss"]


def test_a_dense_network_has_no_checkpoint_to_leave_out_and_the_last_step_is_always_evaluated(tmp_path):
    dense = train(tmp_path / "erm", algorithm="ERM", hparams='{"batch_size": 8}', evaluate="final")
    assert [record["step"] for record in dense] == [0, 2, 4, 6, 8]
    late = {"hparams": '{"batch_size": 8, "prune_start": 0.5, "prune_end": 1}', "evaluate": "final"}
    (last,) = train(tmp_path / "late", **late)
    assert (last["step"], last["final_compression"]) == (8, True)


def test_a_run_goes_on_as_it_was_begun(tmp_path, monkeypatch):
    """Between two checkpoints that are not evaluated, too; and not with another choice."""
    whole = train(tmp_path / "whole", evaluate="final")
    update = loop.update

    def stop(setup, state):
        if state.step == 3:
            raise Interrupted(15, "stopped")
        update(setup, state)

    monkeypatch.setattr(loop, "update", stop)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", evaluate="final")
    assert records.saved_step(tmp_path / "run") == 3
    assert (tmp_path / "run" / "results.jsonl").read_text() == ""
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"another run .evaluate 'final' there, 'all' here"):
        train(tmp_path / "run")
    again = train(tmp_path / "run", evaluate="final")
    for one, other in zip(again, whole, strict=True):
        for name in one.keys() - records.VOLATILE_FIELDS - {"args"}:
            assert one[name] == other[name], name
    # Records of DomainBed and of earlier versions do not have it: they are of all checkpoints.
    assert identity_of({"hparams": None})["evaluate"] == "all"


def test_tables_say_so_and_domainbeds_formats_refuse(main, final):
    text = main("collect", "--input_dir", final, "--selection", "training-domain").stdout
    assert "; checkpoints evaluated final;" in text and "left out" not in text
    for flags in (
        ["--format", "domainbed"],
        ["--top_hparams", "--dataset", "X", "--algorithm", "ERM", "--test_env", "2"],
    ):
        done = main("collect", "--input_dir", final, *flags, check=False)
        assert done.returncode == 2 and "(--evaluate final); use another format" in done.stderr
    assert not (final / "results.txt").exists()


def test_such_runs_can_be_submitted_to_the_open_track_alone(final, tmp_path):
    outcome = submit(str(final), "Magnitude", str(tmp_path / "bundle"))
    assert outcome.tier == "records-verified"
    assert "not every checkpoint evaluated, closed takes --evaluate all" in outcome.reasons_for_open(
        "FullColoredDigits"
    )


def test_a_sweep_keeps_its_folders_and_its_choice(tmp_path):
    spec = SweepSpec(["FullColoredDigits"], ["ERM"], n_hparams=1, n_trials=1, steps=9, test_envs=[[2]])
    (job,) = make_jobs(spec, None)
    assert job.name == "781ec27ffc5823e4749c5eca6b0ee1ea"  # as before there was the setting
    (other,) = make_jobs(spec.updated(evaluate="final"), None)
    assert other.name != job.name and other.domainbed_name(None) == job.domainbed_name(None)
    directory = SweepDirectory(tmp_path)
    (tmp_path / job.domainbed_name(None)).mkdir()
    assert directory.job_dir(job) != directory.job_dir(other)
    directory.register([job])
    manifest = json.loads((tmp_path / "sweep.json").read_text())
    del manifest["protocol"]["evaluate"]  # as earlier versions wrote it
    (tmp_path / "sweep.json").write_text(json.dumps(manifest))
    assert directory.listed() == [job]
    directory.register([job])
    with pytest.raises(UserError, match=r"another sweep .evaluate 'all' there, 'final' here"):
        directory.register([other])
    with pytest.raises(UserError, match="--evaluate: expected one of all, final, got 'last'"):
        make_jobs(spec.updated(evaluate="last"), None)


@pytest.fixture
def photographs(monkeypatch):
    """Two environments of 30 images, and a network of convolutions with BatchNorm that is small."""
    monkeypatch.setattr(EfficientNetLite0, "STAGES", ((1, 3, 1, 1, 8), (2, 3, 2, 2, 12)))
    monkeypatch.setattr(EfficientNetLite0, "n_outputs", 16)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 30, 3, 24, 24, generator=generator)
    labels = torch.randint(4, (2, 30), generator=generator)
    return Dataset([Environment(str(i), images[i], labels[i]) for i in range(2)], num_classes=4)


@pytest.mark.parametrize("name", registry.names())
def test_the_fast_form_gives_the_accuracies_of_the_plain_one(photographs, monkeypatch, name):
    """Also behind steps in which gates are open, masks closed and statistics have moved."""
    own = {"backbone": "efficientnet_lite0", "weights": "none", "freeze_bn": False, "batch_size": 8, "lr": 1e-3}
    if "target_bitops" in registry.get(name).hparams:
        own["target_bitops"] = 0.7  # the first layer, which stays at 8 bits, is half of this network
    torch.manual_seed(0)
    algorithm = registry.get(name).cls((3, 24, 24), 4, 2, hparams.resolve_hparams(name, "PACS", overrides=own))
    algorithm.total_steps = 4
    batches = [(environment.images[:8], environment.labels[:8]) for environment in photographs]
    splits = [split_environment(30, env_i, 0, 0.2) for env_i in range(2)]
    seen, folded, plain = [], [], folding.folded_parameters
    monkeypatch.setattr(folding, "folded_parameters", lambda *pair: folded.append(pair) or plain(*pair))
    monkeypatch.setattr(evaluation, "_is_correct", lambda logits, y: seen.append(logits) or logits.argmax(1).eq(y))
    for step in range(3):
        algorithm.update(batches)
        fast = evaluate(algorithm, photographs, splits, torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(folding, "_is_foldable", lambda *pair: False)
            assert evaluate(algorithm, photographs, splits, torch.device("cpu")) == pytest.approx(fast), step
        one, other = seen[-4:-2], seen[-2:]
        assert torch.allclose(torch.cat(one), torch.cat(other), rtol=1e-4, atol=1e-5)
    # A quantizer's grid is that of the weight itself.
    assert bool(folded) == (registry.get(name).family != "quantization")
