"""Short runs through the training loop, with and without a poisoned test environment, for a check of the contract."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from domainbed_sfp.data import base
from domainbed_sfp.data.base import Dataset
from domainbed_sfp.data.sets.digits import FullColoredDigits
from domainbed_sfp.runs import records
from domainbed_sfp.runs.layout import RESULTS
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.training import train as training

# Of a run: samples of the data set, those a batch takes from each environment, steps, and those from one evaluation to
# the next.
SAMPLES, BATCH, STEPS, FREQ = 120, 8, 9, 4


class Small(FullColoredDigits):
    """A few of the digits."""

    @staticmethod
    def read(data_dir: str | None) -> tuple[Tensor, Tensor]:
        images, labels = FullColoredDigits.read(data_dir)
        return images[:SAMPLES], labels[:SAMPLES]


class Poisoned(Small):
    """Their second environment, which is tested on, is rubbish."""

    @classmethod
    def build(cls, *args: Any, **options: Any) -> Dataset:
        dataset = super().build(*args, **options)
        images = dataset[1].images
        assert isinstance(images, Tensor)
        images.fill_(torch.nan)
        dataset[1].labels.fill_(3)
        return dataset


def final_record(name: str, overrides: Mapping[str, Any], poisoned: bool) -> dict[str, Any]:
    """What the last record of a run of algorithm `name` says, but for the test environment, time and place."""
    base.dataset_names()  # all are registered before one is replaced for a while: what came meanwhile would be lost
    data = Poisoned if poisoned else Small
    # Degraded images of the test environment are evaluated behind the last step alone, and at length.
    hparams = {"batch_size": BATCH, "degraded_evaluation": False, **overrides}
    with (
        mock.patch.dict(base.DATASETS.entries, {"FullColoredDigits": data}),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        settings = RunSettings(
            dataset="FullColoredDigits", algorithm=name, test_envs=[1], steps=STEPS, checkpoint_freq=FREQ,
            hparams=json.dumps(hparams), output_dir=folder, skip_model_save=True,
        )  # fmt: skip
        training.train(settings)
        record = json.loads((Path(folder) / RESULTS).read_text().splitlines()[-1])
    volatile = {*records.VOLATILE_FIELDS, "args"}
    return {key: value for key, value in record.items() if key not in volatile and not key.startswith("env1_")}
