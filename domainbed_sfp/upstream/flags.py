"""What a script of DomainBed is asked to do."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from domainbed_sfp.algorithms.registry import ALGORITHMS
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.overrides import parse_overrides
from domainbed_sfp.training.hparams import resolve_hparams
from domainbed_sfp.upstream.checkout import Checkout
from domainbed_sfp.upstream.registration import OUR_LOOPS_HPARAMS, stand_in

TRAINING_SCRIPTS = ("train", "train_autolr")


@dataclass(frozen=True)
class Flags:
    """What the bridge must know of a script's arguments. Empty where the script has no such flag, or where
    its own parser will refuse it."""

    datasets: list[str] = field(default_factory=list)
    algorithms: list[str] = field(default_factory=list)
    steps: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    command_launcher: str | None = None
    output_dir: str | None = None


class _QuietParser(argparse.ArgumentParser):
    """Leaves complaints about flags to the script's own parser, which knows them all."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read_flags(script: str, arguments: Sequence[str]) -> Flags:
    """The flags of a training script or of sweep. Raises UserError for --hparams that is no JSON object."""
    parser = _QuietParser(add_help=False)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--hparams")
    if script in TRAINING_SCRIPTS:
        parser.add_argument("--dataset", dest="datasets", type=lambda name: [name], default=["RotatedMNIST"])
        parser.add_argument("--algorithm", dest="algorithms", type=lambda name: [name], default=["ERM"])
        parser.add_argument("--output_dir", default="train_output")
        parser.set_defaults(command_launcher=None)
    elif script == "sweep":
        parser.add_argument("--datasets", nargs="+", default=[])
        parser.add_argument("--algorithms", nargs="+", default=[])
        parser.add_argument("--command_launcher")
        parser.set_defaults(output_dir=None)
    else:
        return Flags()
    try:
        values, _ = parser.parse_known_args(arguments)
    except ValueError:
        return Flags()
    return Flags(
        datasets=values.datasets,
        algorithms=values.algorithms,
        steps=values.steps,
        overrides=parse_overrides(values.hparams),
        command_launcher=values.command_launcher,
        output_dir=values.output_dir,
    )


def check_flags(checkout: Checkout, flags: Flags, ours: Collection[str]) -> None:
    """Raises UserError for names that neither the checkout nor we know, and for hparams our algorithms lack.

    DomainBed itself notices them late, and its sweep not at all: its launchers ignore exit codes.
    """
    for dataset in flags.datasets:
        if not hasattr(checkout.datasets, dataset):
            raise unknown_name("data set of DomainBed", dataset, checkout.datasets.DATASETS)
    for algorithm in flags.algorithms:
        if algorithm not in ours and not hasattr(checkout.algorithms, algorithm):
            raise ALGORITHMS.unknown(algorithm, checkout.algorithms.ALGORITHMS)
    for algorithm in set(flags.algorithms) & set(ours):
        if "image_size" in flags.overrides:
            raise UserError(
                "hparam 'image_size' has no effect in DomainBed, whose loaders fix the size (224 px for "
                "photographs); use domainbed-sfp train for another one"
            )
        for name in OUR_LOOPS_HPARAMS:
            if name in flags.overrides:
                raise UserError(f"hparam {name!r} has no effect in DomainBed's own loop; use domainbed-sfp train")
        for dataset in flags.datasets:
            resolve_hparams(algorithm, stand_in(dataset), overrides=flags.overrides)
    launchers = checkout.command_launchers.REGISTRY
    if flags.command_launcher is not None and flags.command_launcher not in launchers:
        raise unknown_name("command launcher", flags.command_launcher, launchers)


def total_steps(checkout: Checkout, flags: Flags) -> int | None:
    """The length of the run; None where no run is asked for."""
    if len(flags.datasets) != 1:
        return None
    return flags.steps or getattr(checkout.datasets, flags.datasets[0]).N_STEPS
