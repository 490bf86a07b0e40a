"""What a run needs before its first step: data, splits, loaders, the algorithm on its device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.core import provenance
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.device import choose_device
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.overrides import parse_overrides
from domainbed_sfp.core.seeds import seed_everything
from domainbed_sfp.data import Dataset, get_dataset_class
from domainbed_sfp.data.base import not_as_published
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.data.splits import Split, split_environment
from domainbed_sfp.networks.introspection import batchnorm_of_one_value
from domainbed_sfp.networks.precision import channels_last_is_faster, choose_precision, set_precision
from domainbed_sfp.pruning import costs
from domainbed_sfp.runs.settings import RunSettings, check_test_envs
from domainbed_sfp.training.console import print_head
from domainbed_sfp.training.folder import refuse_other_data
from domainbed_sfp.training.hparams import resolve_hparams

# Batches from which BatchNorm's statistics are taken before an evaluation, where an algorithm asks for it.
RECALIBRATION_BATCHES = 20

TOO_FEW = "raise hparam batch_size or image_size, or set freeze_bn"


@dataclass
class Setup:
    """A run before its first step. Nothing here changes afterwards but the algorithm.

    code: a hash of an outside algorithm's files. data_digest: of images that are not the published ones. left_out:
    files that hold no image. positions: by layer, where its weights are used, from which MACs follow.
    """

    settings: RunSettings
    folder: Path
    hparams: dict[str, Any]
    info: registry.AlgorithmInfo
    device: torch.device
    dataset: Dataset
    splits: list[Split]
    loader: MinibatchLoader
    unlabeled_loader: MinibatchLoader | None
    algorithm: Algorithm
    precision: str
    positions: dict[str, int]
    n_steps: int
    checkpoint_freq: int
    code: str | None
    weights_digest: str | None
    data_digest: str | None
    left_out: Any

    def is_checkpoint(self, step: int) -> bool:
        """Whether `step` is one after which the model is saved, and evaluated where a record is due."""
        return step % self.checkpoint_freq == 0 or step == self.n_steps - 1

    def record_is_due(self, step: int) -> bool:
        """Whether the model is evaluated after `step`, as it is now."""
        if not self.is_checkpoint(step):
            return False
        is_last = step == self.n_steps - 1
        return self.settings.evaluate == "all" or is_last or self.algorithm.at_final_compression()

    def steps_per_epoch(self) -> float:
        """As DomainBed counts them, the test environments among all."""
        return min(len(split.in_) for split in self.splits) / self.hparams["batch_size"]

    def training_parts(self) -> list[tuple[int, Any]]:
        """(environment, samples to train on) of the training environments."""
        return [(i, split.in_) for i, split in enumerate(self.splits) if i not in self.settings.test_envs]

    def recalibration_batches(self, step: int) -> Iterator[torch.Tensor]:
        """Training images from a stream of their own: what evaluation needs must not move training's."""
        loader = MinibatchLoader(
            self.dataset, self.training_parts(), self.hparams["batch_size"], False, self.settings.seed, self.device,
            "recalibration", degrade=self.hparams["degrade"],
        )  # fmt: skip
        try:
            for index in range(step * RECALIBRATION_BATCHES, (step + 1) * RECALIBRATION_BATCHES):
                images = [x for x, _ in loader.minibatches(index)]
                yield from images if self.algorithm.domain_by_domain else [torch.cat(images)]
        finally:
            loader.close()

    def close(self) -> None:
        """Ends the threads that load images."""
        self.loader.close()
        if self.unlabeled_loader:
            self.unlabeled_loader.close()


def prepare(settings: RunSettings, folder: Path) -> Setup:
    """Reads the data and builds the algorithm, as DomainBed's train does.

    Raises UserError for settings that the data or the algorithm does not allow, and where the folder holds a checkpoint
    made on other images or by other code.
    """
    device = choose_device(settings.device)
    hparams = resolve_hparams(
        settings.algorithm, settings.dataset, settings.hparams_seed, settings.trial_seed,
        parse_overrides(settings.hparams),
    )  # fmt: skip
    info = registry.get(settings.algorithm)
    code, weights_digest = provenance.code_of(info.cls), provenance.weights_digest(hparams["weights"])
    dataset_class = get_dataset_class(settings.dataset)
    check_test_envs(settings.dataset, settings.test_envs, dataset_class.environment_names(settings.data_dir))
    _compute_exactly()
    print_head(
        ("Environment", provenance.fingerprint(device)),
        ("Args", dict(sorted(asdict(settings).items()))),
        ("HParams", dict(sorted(hparams.items()))),
    )
    # Before images are decoded, which may take an hour.
    data_digest, left_out = _inspect(settings)
    refuse_other_data(settings, folder, code, data_digest)
    cache_dir = Path(settings.cache_dir) if settings.cache_dir else None
    dataset = dataset_class.build(settings.data_dir, hparams, settings.seed, cache_dir)
    splits = _split(settings, dataset, hparams["batch_size"])
    loaders = _loaders(settings, dataset, splits, hparams, device)
    algorithm = _build(settings, info, dataset, hparams, device)
    setup = Setup(
        settings, folder, hparams, info, device, dataset, splits, *loaders, algorithm,
        precision=choose_precision(settings.precision, device, algorithm),
        positions={},
        n_steps=algorithm.total_steps,
        checkpoint_freq=settings.checkpoint_freq or dataset_class.CHECKPOINT_FREQ,
        code=code,
        weights_digest=weights_digest,
        data_digest=data_digest,
        left_out=left_out,
    )  # fmt: skip
    set_precision(algorithm, setup.precision, channels_last_is_faster(algorithm, device))
    setup.positions = costs.count_positions(algorithm, dataset.input_shape, algorithm.predict)
    _refuse_single_samples(algorithm, hparams["batch_size"])
    return setup


def _compute_exactly() -> None:
    """The same digits every time; and what records call fp32 is not TF32, which torch takes for convolutions."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _inspect(settings: RunSettings) -> tuple[str | None, Any]:
    """(digest, files left out) of the data set's files, with what a user should know of them told on stderr."""
    dataset_class = get_dataset_class(settings.dataset)
    dataset_class.check_files(settings.data_dir)
    digest = dataset_class.data_digest(settings.data_dir)
    if digest and (differences := dataset_class.differences(settings.data_dir)):
        warn(not_as_published(settings.dataset, differences))
    left_out, remarks = dataset_class.inspect(settings.data_dir)
    for line in remarks:
        print(line, file=sys.stderr)
    return digest, left_out


def _split(settings: RunSettings, dataset: Dataset, batch_size: int) -> list[Split]:
    splits = []
    for env_i, env in enumerate(dataset.environments):
        is_test = env_i in settings.test_envs
        uda_fraction = settings.uda_holdout_fraction if is_test else 0.0
        split = split_environment(len(env), env_i, settings.trial_seed, settings.holdout_fraction, uda_fraction)
        for part in ("in_", "out"):
            if not len(getattr(split, part)):
                raise UserError(
                    f"environment {env_i} ({env.name}) has {len(env)} samples: --holdout_fraction "
                    f"{settings.holdout_fraction} leaves its {part.strip('_')}-split empty"
                )
        if not is_test and len(split.in_) < batch_size:
            raise UserError(
                f"environment {env_i} ({env.name}) has {len(split.in_)} training samples, fewer than "
                f"hparam batch_size {batch_size}; lower batch_size"
            )
        splits.append(split)
    return splits


def _loaders(
    settings: RunSettings, dataset: Dataset, splits: list[Split], hparams: dict[str, Any], device: torch.device
) -> tuple[MinibatchLoader, MinibatchLoader | None]:
    """Of labelled samples of the training environments, and, for domain adaptation, of unlabelled ones of the test
    environments."""

    def loader(parts: list[tuple[int, Any]], stream: str, **images: Any) -> MinibatchLoader:
        batch_size, balanced = hparams["batch_size"], hparams["class_balanced"]
        return MinibatchLoader(dataset, parts, batch_size, balanced, settings.seed, device, stream, **images)

    training = [(i, split.in_) for i, split in enumerate(splits) if i not in settings.test_envs]
    labeled = loader(training, "train", degrade=hparams["degrade"])
    if settings.task == "domain_generalization":
        return labeled, None
    unlabeled = [(i, split.uda) for i, split in enumerate(splits) if len(split.uda)]
    if not unlabeled:
        raise UserError("--task domain_adaptation needs unlabelled samples: set --uda_holdout_fraction above 0")
    # The images of test environments are what they are, in DomainBed too.
    return labeled, loader(unlabeled, "uda", augment=False)


def _build(
    settings: RunSettings, info: registry.AlgorithmInfo, dataset: Dataset, hparams: dict[str, Any], device: torch.device
) -> Algorithm:
    seed_everything(settings.seed)
    domains = len(dataset) - len(settings.test_envs)
    algorithm: Algorithm = info.make(dataset.input_shape, dataset.num_classes, domains, hparams)
    algorithm.total_steps = settings.steps or get_dataset_class(settings.dataset).N_STEPS
    return algorithm.to(device)


def _refuse_single_samples(algorithm: Algorithm, batch_size: int) -> None:
    """BatchNorm has no variance to divide by where a batch is one sample and a channel of it one value."""
    if algorithm.images_at_once(batch_size) > 1:
        return
    name = batchnorm_of_one_value(algorithm, algorithm.input_shape, algorithm.predict)
    if name is not None:
        raise UserError(f"BatchNorm {name!r} would have one value a channel, which has no variance; {TOO_FEW}")
