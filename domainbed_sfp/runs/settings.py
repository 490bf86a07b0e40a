"""The settings of a run, each written down once: flags of `train`, keys of a sweep's spec, what makes two runs the same
and what a submission may say all follow from the fields of `RunSettings`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from domainbed_sfp.core.errors import UserError, check_range
from domainbed_sfp.core.overrides import overrides_text, recorded_overrides

TASKS = ("domain_generalization", "domain_adaptation")
PRECISIONS = ("fp32", "bf16", "auto")
# Which checkpoints are evaluated: all, as DomainBed does, or those that selection may choose.
EVALUATIONS = ("all", "final")

# What torch takes as a seed.
_SEEDS = (-(2**63), 2**64 - 1)


def _setting(default: Any, text: str = "", **about: Any) -> Any:
    """A field of RunSettings. text: the flag's help. about: see `Setting`."""
    return field(default=default, metadata={"setting": Setting(text, **about)})


@dataclass(frozen=True)
class Setting:
    """What is to be known of a setting besides its default.

    choices: the words it may be. span: the least and the most number it may be. is_place: it says where things lie,
    where a run is computed and which files it leaves, not what is computed. is_protocol: all runs of one directory
    share it, so that one table can hold them.
    """

    help: str = ""
    choices: tuple[str, ...] | None = None
    span: tuple[int, ...] | None = None
    is_place: bool = False
    is_protocol: bool = False


@dataclass(frozen=True)
class RunSettings:
    """What a run computes; names and defaults are DomainBed's, `precision`, `evaluate`, `device`, `cache_dir` are ours.

    hparams is the `--hparams` JSON text; a mapping becomes one. precision: arithmetic of the featurizer, fp32, bf16, or
    auto (bf16 where the hardware has it and the network gains by it). steps and checkpoint_freq: None takes the data
    set's. evaluate: "final" leaves out, and writes no record of, the checkpoints at which the network is not yet
    compressed as far as it will be: they are no candidates for selection. A dense network has none of them. The last
    step is always evaluated.
    """

    data_dir: str | None = _setting(None, is_place=True)
    dataset: str = _setting("RotatedMNIST")
    algorithm: str = _setting("ERM")
    task: str = _setting("domain_generalization", choices=TASKS, is_protocol=True)
    hparams: str | None = _setting(None, "JSON object of hparams that replace the drawn ones")
    hparams_seed: int = _setting(0, "0 takes the default hparams, others a random draw", span=_SEEDS)
    trial_seed: int = _setting(0, "seeds the splits and, with hparams_seed, the draw", span=_SEEDS)
    seed: int = _setting(0, "seeds everything else", span=_SEEDS)
    steps: int | None = _setting(None, "default: the data set's", span=(1,), is_protocol=True)
    checkpoint_freq: int | None = _setting(
        None, "steps between records; default: the data set's", span=(1,), is_protocol=True
    )
    test_envs: list[int] = field(default_factory=lambda: [0], metadata={"setting": Setting()})
    output_dir: str = _setting("train_output", is_place=True)
    holdout_fraction: float = _setting(0.2, is_protocol=True)
    uda_holdout_fraction: float = _setting(0.0, is_protocol=True)
    skip_model_save: bool = _setting(False, is_place=True)
    save_model_every_checkpoint: bool = _setting(False, is_place=True)
    precision: str = _setting("fp32", "featurizer's arithmetic", choices=PRECISIONS, is_protocol=True)
    evaluate: str = _setting(
        "all",
        "checkpoints to evaluate: all, or final: those of a compressed network that selection may choose",
        choices=EVALUATIONS,
        is_protocol=True,
    )
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N", is_place=True)
    cache_dir: str | None = _setting(
        None, "decoded images; default: $DOMAINBED_SFP_CACHE or the user's cache folder", is_place=True
    )

    def __post_init__(self) -> None:
        for name in _FRACTIONS:
            if type(value := getattr(self, name)) is int:
                object.__setattr__(self, name, float(value))
        if isinstance(self.hparams, Mapping):
            object.__setattr__(self, "hparams", overrides_text(self.hparams))


# What is to be known of every setting, in their order.
SETTINGS: dict[str, Setting] = {one.name: one.metadata["setting"] for one in fields(RunSettings)}
# Those that say what is computed, and of them those that all runs of one directory share.
IDENTITY = tuple(name for name, about in SETTINGS.items() if not about.is_place)
PROTOCOL = tuple(name for name, about in SETTINGS.items() if about.is_protocol)

_FRACTIONS = tuple(one.name for one in fields(RunSettings) if type(one.default) is float)


def is_place(name: str) -> bool:
    """Whether `name` is a setting that says where things lie, and nothing of what is computed."""
    return name in SETTINGS and SETTINGS[name].is_place


def known_settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record's `args`, those that are settings of ours."""
    return {name: value for name, value in args.items() if name in SETTINGS}


def check_settings(settings: Any) -> None:
    """Raises UserError where settings cannot be: those of a run, or those that a sweep shares with its runs."""
    for name, about in SETTINGS.items():
        value = getattr(settings, name, None)
        if about.span is not None:
            check_range(f"--{name}", value, *about.span)
        elif about.choices is not None and value not in about.choices:
            raise UserError(f"--{name}: expected one of {', '.join(about.choices)}, got {value!r}")
    if not 0 < settings.holdout_fraction < 1:
        raise UserError(f"--holdout_fraction: expected a fraction in (0, 1), got {settings.holdout_fraction}")
    if not 0 <= settings.uda_holdout_fraction < 1:
        raise UserError(f"--uda_holdout_fraction: expected a fraction in [0, 1), got {settings.uda_holdout_fraction}")


def check_test_envs(dataset: str, test_envs: Collection[int], names: list[str]) -> None:
    """Raises UserError unless `test_envs` are distinct environments and leave one to train on."""
    for index in test_envs:
        if not 0 <= index < len(names):
            listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            raise UserError(f"--test_envs: {dataset} has no environment {index} (it has {listed})")
    if len(set(test_envs)) != len(test_envs):
        raise UserError(f"--test_envs: {test_envs} names an environment twice")
    if len(test_envs) >= len(names):
        raise UserError(f"--test_envs: {test_envs} leaves no environment of {dataset} to train on")


def identity_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """What a run computes: a record's `args` without places; hparams as values, the data set's numbers of steps where
    none are given, test environments in order."""
    from domainbed_sfp.data import dataset_names, get_dataset_class

    # DomainBed, and records from before there was the choice, evaluate all checkpoints.
    identity: dict[str, Any] = {"evaluate": EVALUATIONS[0]}
    identity.update((name, value) for name, value in args.items() if not is_place(name))
    identity["hparams"] = recorded_overrides(identity.get("hparams"))
    if isinstance(identity.get("test_envs"), list):
        identity["test_envs"] = sorted(identity["test_envs"], key=str)
    if identity.get("dataset") in dataset_names():  # a record of DomainBed's own may have another
        dataset = get_dataset_class(identity["dataset"])
        for name, usual in (("steps", dataset.N_STEPS), ("checkpoint_freq", dataset.CHECKPOINT_FREQ)):
            if name in identity and identity[name] is None:
                identity[name] = usual
    return identity
