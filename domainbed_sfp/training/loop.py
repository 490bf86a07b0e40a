"""The training loop: update, evaluate, record, checkpoint.

A run is a pure function of its settings. Every step is seeded from (seed, step), so that a run continued from a
checkpoint computes what it would have computed without the interruption, to the bit on one machine's CPU.
"""

from __future__ import annotations

import math
import time

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.seeds import seed_everything, seed_hash
from domainbed_sfp.training.console import Console
from domainbed_sfp.training.interruption import StopRequest
from domainbed_sfp.training.recorder import record
from domainbed_sfp.training.setup import TOO_FEW, Setup
from domainbed_sfp.training.state import State


def train_to_the_end(setup: Setup, state: State, stop: StopRequest) -> None:
    """Computes the steps that are left.

    Raises UserError where training diverges, and Interrupted, between two steps or in an evaluation, where it is asked
    to stop; `state` can be saved then.
    """
    console = Console()
    while state.step < setup.n_steps:
        if not state.update_is_done:
            with stop.postponed():
                update(setup, state)
                state.update_is_done = True
        if setup.record_is_due(state.step) and not state.is_recorded():
            record(setup, state, stop, console)
        else:
            console.progress(state.step, setup.n_steps, state.metrics)
        with stop.postponed():
            state.step += 1
            state.update_is_done = False
            if setup.is_checkpoint(state.step - 1):
                state.save()


def update(setup: Setup, state: State) -> None:
    """One step: an update of the algorithm on the step's minibatches, and what it measures."""
    start = time.perf_counter()
    minibatches, unlabeled = setup.loader.minibatches(state.step), None
    if setup.unlabeled_loader:
        unlabeled = [x for x, _ in setup.unlabeled_loader.minibatches(state.step)]
    seed_everything(seed_hash(setup.settings.seed, "step", state.step))
    try:
        values = setup.algorithm.update(minibatches, unlabeled)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(f"{setup.settings.algorithm} trains BatchNorm on single images here; {TOO_FEW}") from error
    if not math.isfinite(loss := values.get("loss", 0.0)):
        raise UserError(
            f"{setup.settings.algorithm} diverged: the loss is {loss} at step {state.step}; the {len(state.records)} "
            f"records before it are kept. Lower hparam 'lr' ({setup.hparams['lr']:g}) or the weight of a penalty"
        )
    seconds = time.perf_counter() - start
    images = sum(len(y) for _, y in minibatches)
    state.note({**values, "step_time": seconds, "images_per_second": images / seconds})
