"""The hyperparameters of a run: those every algorithm has, with DomainBed's defaults and draws to the digit, those of
the algorithm, its objective and its data set, and how a run's values follow from its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.hparam import (
    AT_LEAST_ONE,
    FOREIGN,
    FRACTION,
    NOT_NEGATIVE,
    PROBABILITY,
    Hparam,
    Sampler,
    checked_value,
)
from domainbed_sfp.core.seeds import seed_hash


def common_hparams(small_images: bool, image_size: int) -> dict[str, Hparam]:
    """The hparams every algorithm has. `small_images`: MNIST-like, trained from scratch; `image_size`: the usual."""
    table = {
        "data_augmentation": Hparam(True, doc="augment training batches (image-folder sets)"),
        "resnet18": Hparam(False, doc="ResNet-18 instead of ResNet-50 (needs resnet50_augmix=false)"),
        "resnet50_augmix": Hparam(True, doc="timm's resnet50.ram_in1k; overrides resnet18, as in DomainBed"),
        "dinov2": Hparam(False, doc=f"{FOREIGN}; choose a timm name through backbone", foreign=True),
        "vit": Hparam(False, doc=f"{FOREIGN}; choose a timm name through backbone", foreign=True),
        "vit_attn_tune": Hparam(False, doc=f"{FOREIGN}; choose a timm name through backbone", foreign=True),
        "freeze_bn": Hparam(False, doc="keep BatchNorm in evaluation mode while training"),
        "lars": Hparam(False, doc=f"{FOREIGN}; DomainBed's ERM++ uses it", foreign=True),
        "linear_steps": Hparam(500, doc=f"{FOREIGN}; DomainBed's ERM++ uses it", foreign=True),
        "resnet_dropout": Hparam(
            0.0, lambda r: r.choice([0.0, 0.1, 0.5]), "dropout before the classifier", valid=FRACTION
        ),
        "vit_dropout": Hparam(0.0, lambda r: r.choice([0.0, 0.1, 0.5]), f"{FOREIGN}; for DomainBed's ViT", True),
        "class_balanced": Hparam(False, doc="draw classes equally often within an environment"),
        "nonlinear_classifier": Hparam(False, lambda r: bool(r.choice([False, False])), "3-layer classifier"),
        "image_size": Hparam(image_size, doc="side of the square input, pixels", valid=AT_LEAST_ONE),
        "backbone": Hparam(
            "auto", doc="auto, mnist_cnn, mnist_cnn_bn, resnet18, resnet50, efficientnet_lite0, or a timm name"
        ),
        "weights": Hparam("imagenet", doc="imagenet, none, or a file (.pth or .safetensors)"),
        "degrade": Hparam(0.0, doc="probability with which a training sample is degraded", valid=PROBABILITY),
        "degraded_evaluation": Hparam(
            False, doc="evaluate the finished model on degraded copies of the test environments"
        ),
    }
    draws: dict[str, tuple[Any, Sampler]]
    if small_images:
        draws = {
            "lr": (1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5)),
            "weight_decay": (0.0, lambda r: 0.0),
            "batch_size": (64, lambda r: int(2 ** r.uniform(3, 9))),
        }
    else:
        draws = {
            "lr": (5e-5, lambda r: 10 ** r.uniform(-5, -3.5)),
            "weight_decay": (0.0, lambda r: 10 ** r.uniform(-6, -2)),
            "batch_size": (32, lambda r: int(2 ** r.uniform(3, 5.5))),
        }
    table["lr"] = Hparam(*draws["lr"], doc="Adam's learning rate", valid=NOT_NEGATIVE)
    table["weight_decay"] = Hparam(*draws["weight_decay"], doc="Adam's weight decay", valid=NOT_NEGATIVE)
    table["batch_size"] = Hparam(*draws["batch_size"], doc="samples per environment", valid=AT_LEAST_ONE)
    return table


def hparam_table(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Hparam]:
    """Every hparam of `algorithm` on `dataset`, by name.

    An algorithm with an `objective` hparam also has the hparams of the objective chosen in `overrides`.
    """
    from domainbed_sfp.algorithms import registry
    from domainbed_sfp.data import get_dataset_class

    info = registry.get(algorithm)
    data = get_dataset_class(dataset)
    table = common_hparams(data.SMALL_IMAGES, data.IMAGE_SIZE)
    table.update(data.HPARAMS)
    table.update({name: hparam.on(data.SMALL_IMAGES) for name, hparam in info.hparams.items()})
    if "objective" in info.hparams:
        chosen = (overrides or {}).get("objective", info.hparams["objective"].default)
        if not isinstance(chosen, str):
            raise UserError(f"hparam 'objective' of {algorithm}: expected the name of an objective, got {chosen!r}")
        table.update(registry.get_objective(chosen).hparams)
    return table


def checked_overrides(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """`overrides` as a run takes them, each of its hparam's kind: 8 for 8.0 samples, a rate of 0.0 for 0. Two that say
    the same are then the same; retired ones are left out (see `registry.AlgorithmInfo`). Raises UserError for an
    unknown name or a value of another kind."""
    from domainbed_sfp.algorithms import registry

    overrides = registry.get(algorithm).without_retired(overrides or {})
    table = hparam_table(algorithm, dataset, overrides)
    for name in overrides:
        if name not in table:
            raise unknown_name(f"hparam of {algorithm}", name, sorted(table))
    return {name: checked_value(algorithm, name, value, table[name]) for name, value in overrides.items()}


def resolve_hparams(
    algorithm: str,
    dataset: str,
    hparams_seed: int = 0,
    trial_seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The hparams of a run, as DomainBed's train chooses them.

    hparams_seed 0 takes the defaults; any other is a random draw seeded by (hparams_seed, trial_seed).
    `overrides` (the `--hparams` object) come last; an unknown name or a value of another kind is a UserError.
    """
    overrides = checked_overrides(algorithm, dataset, overrides)
    table = hparam_table(algorithm, dataset, overrides)
    if hparams_seed == 0:
        values = {name: hparam.default for name, hparam in table.items()}
    else:
        random_seed = seed_hash(hparams_seed, trial_seed)
        values = {name: hparam.draw(name, random_seed) for name, hparam in table.items()}
    for name, value in overrides.items():
        if table[name].foreign and value != values[name]:
            raise UserError(f"hparam {name!r} cannot be set: {table[name].doc}")
        values[name] = value
    return values
