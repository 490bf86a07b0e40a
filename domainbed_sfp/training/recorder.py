"""The record of a step: how well the network does, what it costs, and where that was measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from domainbed_sfp.core import provenance
from domainbed_sfp.core.seeds import seed_everything, seed_hash
from domainbed_sfp.deploy.size import exported_bytes
from domainbed_sfp.pruning import costs
from domainbed_sfp.runs import mask_files
from domainbed_sfp.training.console import Console
from domainbed_sfp.training.evaluation import evaluate, evaluate_degraded
from domainbed_sfp.training.interruption import Interrupted, StopRequest
from domainbed_sfp.training.setup import Setup
from domainbed_sfp.training.state import State


def record(setup: Setup, state: State, stop: StopRequest, console: Console) -> None:
    """Evaluates, and appends the record of this step."""
    buffers = {name: value.clone() for name, value in setup.algorithm.named_buffers()}
    try:
        made = measure(setup, state)
        with stop.postponed():
            state.records.append(made)
            state.metrics.clear()
            console.row(made)
    except Interrupted:
        if not state.is_recorded():
            # The run that continues prepares this evaluation again, and must find what this one found.
            with torch.no_grad():
                for name, value in setup.algorithm.named_buffers():
                    value.copy_(buffers[name])
        raise


def measure(setup: Setup, state: State, prepare: bool = True) -> dict[str, Any]:
    """The record of this step. `prepare` is False for a model that was saved as it was evaluated."""
    algorithm, settings, step = setup.algorithm, setup.settings, state.step
    made: dict[str, Any] = {"step": step, "epoch": step / setup.steps_per_epoch(), **state.means()}
    seed_everything(seed_hash(settings.seed, "evaluation", step))
    if prepare:
        algorithm.prepare_evaluation(setup.recalibration_batches(step))
    made.update(evaluate(algorithm, setup.dataset, setup.splits, setup.device))
    if setup.hparams["degraded_evaluation"] and step == setup.n_steps - 1:
        for env_i in settings.test_envs:
            made[f"env{env_i}_degraded"] = evaluate_degraded(algorithm, setup.dataset, env_i, setup.device)
    masks = algorithm.masks()
    made.update(asdict(costs.measure_cost(algorithm.deployed_parameters(), setup.positions, masks)))
    made.update(algorithm.costs())
    made.update(
        exported_bytes=exported_bytes(algorithm),
        sparsity=algorithm.sparsity(),
        final_compression=algorithm.at_final_compression(),
        mem_gb=torch.cuda.max_memory_allocated(setup.device) / 2**30 if setup.device.type == "cuda" else 0.0,
        wall_time=state.seconds(),
        **_facts(setup),
    )
    if masks and made["final_compression"]:
        made["masks"] = mask_files.keep(setup.folder / mask_files.FOLDER, masks)
    return made


def _facts(setup: Setup) -> dict[str, Any]:
    """What all records of a run say."""
    facts = {
        "standing": setup.info.standing,
        "precision": setup.precision,
        "environments": [env.name for env in setup.dataset.environments],
        "input_shape": setup.dataset.input_shape,
        "data_digest": setup.data_digest,
        "environment": provenance.fingerprint(setup.device),
        "commit": provenance.commit(),
        "hparams": setup.hparams,
        # Where decoded images are kept says nothing about the result.
        "args": {name: value for name, value in asdict(setup.settings).items() if name != "cache_dir"},
    }
    optional = {
        "code": setup.code,
        "left_out": setup.left_out or None,
        "weights_digest": setup.weights_digest,
        "granularity": setup.algorithm.granularity,
        "decisions": setup.algorithm.decisions() or None,
    }
    return {**facts, **{name: value for name, value in optional.items() if value is not None}}
