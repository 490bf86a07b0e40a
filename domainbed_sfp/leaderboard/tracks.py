"""The tracks: what a submission must keep to be compared as equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard.bundle.places import WEIGHTS
from domainbed_sfp.runs.records import Run

# Words of `analysis.protocol.backbone_of`. DomainBed's networks: of its tables of 2020, its default of today, and that
# of small images, whose variant with BatchNorm is this project's.
PHOTOGRAPHS = ("resnet50 (tv V1, frozen BN)", "resnet50 (tv V1)", "resnet50 (augmix)", "resnet50 (augmix, frozen BN)")
SMALL_IMAGES = ("MNIST_CNN", "MNIST_CNN (BatchNorm)")
# The hparams behind these words: a backbone or a file may be called anything, such as "MNIST_CNN" or "./none".
BACKBONES = ("auto", "resnet50", "mnist_cnn", "mnist_cnn_bn")
HOLDOUT_FRACTION = 0.2
# As DomainBed's tables have them: with fewer, a lucky split is taken for a good method.
TRIALS = 3

# How training samples reach the network.
SAMPLING = {"data_augmentation": True, "class_balanced": False}


def reasons_for_open(dataset: str, protocol: Mapping[str, Any], runs: Sequence[Run]) -> Iterator[str]:
    """Why a submission is not of the closed track; nothing where it is.

    Closed: the data set's own number of steps and steps between checkpoints (more checkpoints are more to select from),
    all of them evaluated, and DomainBed's held-out fraction; DomainBed's backbone for it with its usual weights;
    photographs at 224 px; plain sampling with DomainBed's augmentation; every environment tested, in at least TRIALS
    trials.
    """
    cls = get_dataset_class(dataset)
    backbones, weights = (SMALL_IMAGES, "none") if cls.SMALL_IMAGES else (PHOTOGRAPHS, "imagenet")
    if protocol["steps"] != cls.N_STEPS:
        yield f"{protocol['steps']:,} steps, closed takes {cls.N_STEPS:,}"
    if protocol["checkpoint_freq"] != cls.CHECKPOINT_FREQ:
        yield f"a checkpoint every {protocol['checkpoint_freq']:,} steps, closed takes {cls.CHECKPOINT_FREQ:,}"
    if (trials := len(protocol["trial_seeds"])) < TRIALS:
        yield f"{trials} trial{'s' * (trials != 1)}, closed takes at least {TRIALS}"
    if protocol["backbone"] not in backbones:
        yield f"backbone {protocol['backbone']}, closed takes {' or '.join(backbones)}"
    if protocol["weights"] != weights:
        yield f"weights {protocol['weights']}, closed takes {weights}"
    for name, usual_values in (("backbone", BACKBONES), ("weights", WEIGHTS)):
        if others := {run.hparams.get(name, usual_values[0]) for run in runs} - set(usual_values):
            yield f"hparam {name} {', '.join(sorted(map(repr, others)))}, closed takes {' or '.join(usual_values)}"
    if protocol["image_size"] != cls.IMAGE_SIZE:
        yield f"{protocol['image_size']} px images, closed takes {cls.IMAGE_SIZE}"
    if protocol["holdout_fraction"] != HOLDOUT_FRACTION:
        yield f"held-out fraction {protocol['holdout_fraction']}, closed takes {HOLDOUT_FRACTION}"
    if any(run.evaluate != "all" for run in runs):
        yield "not every checkpoint evaluated, closed takes --evaluate all"
    if kept := {run.args.get("uda_holdout_fraction", 0) for run in runs} - {0}:
        yield f"unlabelled fraction {', '.join(map(str, sorted(kept)))} left out of the tests, closed takes 0"
    if protocol["task"] != "domain_generalization":
        yield f"task {protocol['task']}"
    for name, usual in SAMPLING.items():
        if others := {run.hparams.get(name, usual) for run in runs} - {usual}:
            yield f"{name} {', '.join(map(str, others))}, closed takes {usual}"
    missing = [env for env in range(len(protocol["environments"])) if [env] not in protocol["test_envs"]]
    if missing:
        yield f"{', '.join(protocol['environments'][env] for env in missing)} not tested"
