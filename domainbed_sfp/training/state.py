"""What a run has done so far, and how that survives it: checkpoints, records, models."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np

from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.runs import checkpoints, records
from domainbed_sfp.runs.layout import CHECKPOINT, FAILURE, MODEL, RESULTS
from domainbed_sfp.training.setup import Setup


class State:
    """How far a run is, from its checkpoint on where there is one.

    step: the step that is computed now. update_is_done: its update is in the weights, and its record, if one is due, is
    not yet made. metrics: numbers of each step since the last record, by name.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.step = 0
        self.update_is_done = False
        self.records: list[dict[str, Any]] = []
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.earlier_seconds = 0.0
        self.started = time.monotonic()

    def resume(self) -> None:
        """Goes on from the checkpoint in the run's folder, if there is one."""
        file = self.setup.folder / CHECKPOINT
        if not file.exists():
            return
        state = checkpoints.load_checkpoint(file, self.setup.algorithm)
        self.step = state["step"]
        self.update_is_done = state["update_is_done"]
        self.records = state["records"]
        self.metrics.update(state["metrics"])
        self.earlier_seconds = state["seconds"]
        records.write_records(self.setup.folder / RESULTS, self.records)
        print(f"Continuing at step {self.step} of {self.setup.n_steps}.")

    def save(self) -> None:
        """Makes the checkpoint, which holds the records too, and then results.jsonl from it: whatever moment a run
        is killed at, no record is lost and none is written twice."""
        setup = self.setup
        every = setup.settings.save_model_every_checkpoint
        if every and not self.update_is_done and setup.is_checkpoint(self.step - 1):
            # Before the checkpoint, behind which nobody would make it again.
            self.save_model(f"model_step{self.step - 1}.pkl")
        state = {
            "args": asdict(setup.settings),
            "data_digest": setup.data_digest,
            "code": setup.code,
            "weights_digest": setup.weights_digest,
            "step": self.step,
            "update_is_done": self.update_is_done,
            "records": self.records,
            "metrics": self.metrics,
            "seconds": self.seconds(),
        }
        checkpoints.save_checkpoint(setup.folder / CHECKPOINT, setup.algorithm, state)
        records.write_records(setup.folder / RESULTS, self.records)

    def save_model(self, name: str = MODEL) -> None:
        """Writes DomainBed's file of a trained model, unless the settings say no."""
        setup = self.setup
        if setup.settings.skip_model_save:
            return
        checkpoints.save_model(
            setup.folder / name,
            {
                "args": asdict(setup.settings),
                "model_input_shape": setup.dataset.input_shape,
                "model_num_classes": setup.dataset.num_classes,
                "model_num_domains": len(setup.dataset) - len(setup.settings.test_envs),
                "model_hparams": setup.hparams,
                "model_dict": setup.algorithm.state_dict(),
            },
        )

    def note_failure(self, what: str) -> None:
        """Says why the run cannot go on where `sweep status` and `collect` look."""
        failure = {
            "step": self.step,
            "error": what,
            "algorithm": self.setup.settings.algorithm,
            "hparams": self.setup.hparams,
            "args": asdict(self.setup.settings),
        }
        write_atomically(self.setup.folder / FAILURE, json.dumps(failure, sort_keys=True))

    def note(self, values: dict[str, float]) -> None:
        """Takes in what a step has measured."""
        for name, value in values.items():
            self.metrics[name].append(float(value))

    def means(self) -> dict[str, float]:
        """Of what the steps since the last record have measured."""
        return {name: float(np.mean(values)) for name, values in self.metrics.items()}

    def is_recorded(self) -> bool:
        """Whether this step has its record."""
        return bool(self.records) and self.records[-1]["step"] == self.step

    def seconds(self) -> float:
        """What the run has taken so far."""
        return self.earlier_seconds + time.monotonic() - self.started
