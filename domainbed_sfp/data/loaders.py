"""Minibatches of every training environment, a pure function of (seed, step).

Because a step's samples and augmentations depend on nothing but the seed and the step, a run resumes exactly, and the
next step's images can be read while the current one is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from domainbed_sfp.core.seeds import seed_hash
from domainbed_sfp.data.base import Dataset
from domainbed_sfp.data.images import augmentation
from domainbed_sfp.data.images.degradations import DegradationParameters, degrade_batch, draw_degradations


class Minibatch(tuple[Tensor, Tensor]):
    """(x [N, C, H, W], y [N]) of one environment, as DomainBed passes it, with what else is known of the samples.

    aligned: bool [N], where the data set knows whether the spurious attribute agrees with the label, else None.
    """

    aligned: Tensor | None

    def __new__(cls, x: Tensor, y: Tensor, aligned: Tensor | None = None) -> Minibatch:
        self = super().__new__(cls, (x, y))
        self.aligned = aligned
        return self


@dataclass(frozen=True)
class _Raw:
    """A minibatch as it is read: stored images, and how they will be augmented."""

    images: Tensor
    labels: Tensor
    aligned: Tensor | None
    parameters: augmentation.AugmentationParameters | None
    degradations: DegradationParameters | None


class MinibatchLoader:
    """Draws `batch_size` samples with replacement from each given part of the data set, as DomainBed does.

    Args:
        dataset: the data set.
        parts: (environment number, indices to draw from) in the order of the minibatches.
        batch_size: samples per environment.
        class_balanced: draw classes equally often, where True.
        seed: the run's seed.
        device: where minibatches go; augmentation runs there.
        stream: names the random stream, so that two loaders of one run draw independently.
        degrade: probability with which a sample is degraded, after augmentation.
        augment: whether photographs are augmented, as for training.
    """

    def __init__(
        self,
        dataset: Dataset,
        parts: Sequence[tuple[int, np.ndarray]],
        batch_size: int,
        class_balanced: bool,
        seed: int,
        device: torch.device,
        stream: str = "train",
        degrade: float = 0.0,
        augment: bool = True,
    ) -> None:
        self.dataset = dataset
        self.parts = list(parts)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.stream = stream
        self.degrade = degrade
        self.augment = augment and dataset.augment
        self.cumulative = [
            _balanced_weights(dataset[env_i].labels[torch.from_numpy(keys)]).cumsum() if class_balanced else None
            for env_i, keys in self.parts
        ]
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="minibatches")
        self.ahead: tuple[int, Future[list[_Raw]]] | None = None

    def minibatches(self, step: int) -> list[Minibatch]:
        """The minibatches of `step`, one per part; those of the next step are read in the background."""
        raw = self.ahead[1].result() if self.ahead is not None and self.ahead[0] == step else self._read(step)
        self.ahead = (step + 1, self.reader.submit(self._read, step + 1))
        return self._finish(raw)

    def close(self) -> None:
        """Ends the reading thread."""
        self.reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[_Raw]:
        return [self._read_part(step, position) for position in range(len(self.parts))]

    def _read_part(self, step: int, position: int) -> _Raw:
        env_i, keys = self.parts[position]
        environment = self.dataset[env_i]
        seed = seed_hash(self.seed, self.stream, env_i, step)
        rng = np.random.default_rng(seed)
        cumulative = self.cumulative[position]
        if cumulative is None:
            chosen = rng.integers(len(keys), size=self.batch_size)
        else:
            chosen = np.searchsorted(cumulative, rng.random(self.batch_size) * cumulative[-1], side="right")
        indices = keys[chosen]
        picked = torch.from_numpy(indices)
        parameters = None
        if self.augment and environment.sizes is not None:
            generator = torch.Generator().manual_seed(seed)
            parameters = augmentation.draw_parameters(self.batch_size, environment.sizes[picked], generator)
        images = environment.gather(indices, for_crops=parameters is not None)
        if self.device.type == "cuda":
            images = images.pin_memory()
        aligned = None if environment.aligned is None else environment.aligned[picked]
        degradations = None
        if self.degrade:
            # A seed of its own: what else is drawn stays as it is without degradations.
            own_seed = seed_hash(self.seed, self.stream, env_i, step, "degrade")
            degradations = draw_degradations(self.batch_size, self.degrade, own_seed)
        return _Raw(images, environment.labels[picked], aligned, parameters, degradations)

    def _finish(self, parts: list[_Raw]) -> list[Minibatch]:
        inputs = [part.images.to(self.device, non_blocking=True) for part in parts]
        parameters = [part.parameters for part in parts if part.parameters is not None]
        if len(parameters) == len(parts) and len({x.shape[1:] for x in inputs}) == 1:
            # All at once: augmentation is many small operations, each of which a GPU waits for.
            joined = augmentation.join_parameters(parameters)
            images = augmentation.augment(torch.cat(inputs), joined, out_size=self.dataset.input_shape[1])
            inputs = list(images.split([len(x) for x in inputs]))
        else:
            inputs = [self._prepare(x, part) for x, part in zip(inputs, parts)]
        minibatches = []
        for x, part in zip(inputs, parts):
            if part.degradations is not None:
                x = degrade_batch(x, part.degradations, is_normalized=part.images.dtype == torch.uint8)
            y = part.labels.to(self.device, non_blocking=True)
            minibatches.append(Minibatch(x, y, part.aligned if part.aligned is None else part.aligned.to(self.device)))
        return minibatches

    def _prepare(self, x: Tensor, part: _Raw) -> Tensor:
        if part.parameters is not None:
            return augmentation.augment(x, part.parameters, out_size=self.dataset.input_shape[1])
        return augmentation.normalize(x) if x.dtype == torch.uint8 else x


def _balanced_weights(labels: Tensor) -> np.ndarray:
    """A weight per sample with which every class present is drawn equally often."""
    counts = torch.bincount(labels).double()
    return (1 / (counts[labels] * (counts > 0).sum())).numpy()
