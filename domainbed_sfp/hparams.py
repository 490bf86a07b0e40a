"""Hyperparameters: what they are called, their defaults and how they are drawn.

Every shared name has DomainBed's default and DomainBed's random value to the digit: each hparam is drawn
from a `RandomState` of its own, seeded by (random seed, hparam name), so that adding one never shifts another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainbed_sfp import strict_json
from domainbed_sfp.errors import LARGEST, UserError, unknown_name
from domainbed_sfp.seeds import seed_hash
from domainbed_sfp.strict_json import unique_names

Sampler = Callable[[np.random.RandomState], Any]


@dataclass(frozen=True)
class Range:
    """The values an hparam may have: in words, and as a test; `choices` where they are names."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


POSITIVE = Range("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Range("a number of at least 0", lambda value: value >= 0)
AT_LEAST_ONE = Range("a whole number of at least 1", lambda value: value >= 1)
FRACTION = Range("a fraction in [0, 1)", lambda value: 0 <= value < 1)
RUN_FRACTION = Range("a fraction of the run in [0, 1]", lambda value: 0 <= value <= 1)
SHARE = Range("a share in [0, 1]", lambda value: 0 <= value <= 1)
PROBABILITY = Range("a probability in [0, 1]", lambda value: 0 <= value <= 1)


def only(choice: str, why: str) -> Range:
    """The range of an hparam that others of its family choose, and that has one value here."""
    return Range(f"{choice!r} ({why})", lambda value: value == choice)


def but(unfit: str, why: str) -> Range:
    """The range of an hparam that is a registered name, but not `unfit`."""
    return Range(f"another than {unfit!r} ({why})", lambda value: value != unfit)


def one_of(*choices: str) -> Range:
    """The range of an hparam that is one of some words."""
    return Range("one of " + ", ".join(choices), lambda value: value in choices, choices)


@dataclass(frozen=True)
class Hparam:
    """A hyperparameter: its default, how a random search draws it, a line of explanation, and what it may be.

    foreign: a field of DomainBed's records that has no effect here; it cannot be set.
    photographs: the default on sets of photographs, where it is another than on MNIST-like ones.
    """

    default: Any
    sample: Sampler | None = None
    doc: str = ""
    foreign: bool = False
    valid: Range | None = None
    photographs: Any = None

    def on(self, small_images: bool) -> Hparam:
        """The same hparam with its default on MNIST-like images, or on photographs."""
        return self if small_images or self.photographs is None else replace(self, default=self.photographs)

    def draw(self, name: str, random_seed: int) -> Any:
        """The random value of hparam `name` for `random_seed`; the default where nothing is searched."""
        if self.sample is None:
            return self.default
        value = self.sample(np.random.RandomState(seed_hash(random_seed, name)))
        # numpy scalars are not JSON, and DomainBed's records are.
        return value.item() if isinstance(value, np.generic) else value


# Records have these fields so that DomainBed's tools read them.
FOREIGN = "no effect here"


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
    from domainbed_sfp import registry
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


def parse_overrides(text: str | None) -> dict[str, Any]:
    """The `--hparams` JSON object; a UserError says where it is malformed, or what it says twice."""
    if not text:
        return {}
    try:
        value = strict_json.parse(text, object_pairs_hook=unique_names)
    except json.JSONDecodeError as error:
        raise UserError(
            f"--hparams is not valid JSON: {error.msg} at character {error.pos} of {text!r:.200}; "
            "expected an object such as '{\"lr\": 0.001}'"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--hparams: {error}; expected an object that names each hparam once") from None
    if not isinstance(value, dict):
        raise UserError(f"--hparams must be a JSON object such as '{{\"lr\": 0.001}}', got {text!r:.200}")
    return value


def recorded_overrides(text: str | None) -> dict[str, Any]:
    """The `hparams` of a record's `args`. Whatever wrote them has taken the last of a name that is there twice."""
    try:
        value = strict_json.parse(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"a record has args.hparams {text!r:.200}; expected a JSON object")
    return value


def checked_overrides(algorithm: str, dataset: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """`overrides` as a run takes them, each of its hparam's kind: 8 for 8.0 samples, a rate of 0.0 for 0. Two that say
    the same are then the same; retired ones are left out (see `registry.AlgorithmInfo`). Raises UserError for an
    unknown name or a value of another kind."""
    from domainbed_sfp import registry

    overrides = registry.get(algorithm).current(overrides or {})
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


def checked_value(algorithm: str, name: str, value: Any, hparam: Hparam) -> Any:
    """`value` if it is in range, of the default's kind: whole floats become integers, integers floats."""
    default = hparam.default
    if isinstance(default, bool):
        matches, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        whole = isinstance(value, float) and value.is_integer()
        matches, expected = (isinstance(value, int) or whole) and not isinstance(value, bool), "a whole number"
        value = int(value) if matches else value
        if matches and abs(value) > LARGEST:
            matches, expected = False, f"a whole number of at most {LARGEST}"
    elif isinstance(default, float):
        matches, expected = _is_finite_number(value), "a number"
        value = float(value) + 0.0 if matches else value  # which turns -0.0 into 0.0
    else:
        matches, expected = isinstance(value, type(default)), f"a {type(default).__name__}"
    if not matches:
        raise UserError(f"hparam {name!r} of {algorithm}: expected {expected}, got {value!r:.80}")
    if hparam.valid is not None and not hparam.valid.holds(value):
        if hparam.valid.choices:
            raise unknown_name(f"{name} of {algorithm}", value, hparam.valid.choices)
        raise UserError(f"hparam {name!r} of {algorithm}: expected {hparam.valid.words}, got {value!r}")
    return value


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False
