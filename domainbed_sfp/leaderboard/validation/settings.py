"""The hparams of a run are the draw of its seeds, under the overrides that it declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from domainbed_sfp import hparams, registry
from domainbed_sfp.errors import UserError
from domainbed_sfp.leaderboard import bundle as layout
from domainbed_sfp.leaderboard.schema import Problem, parse, shown
from domainbed_sfp.leaderboard.summary import SubmittedRun
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of


def check_hparams(bundle: Bundle, run: SubmittedRun) -> Iterator[Problem]:
    """Overrides are in their ranges, the other hparams drawn, and the algorithm's standing is the registered one."""
    file, args = records_of(run), run.run.args
    try:
        overrides = _overrides(args["hparams"])
    except ValueError as error:
        bundle.unfit.add(run.name)
        yield Problem(file, "line 1.args.hparams", "a JSON object as text", f"{shown(args['hparams'])} ({error})")
        return
    yield from _places(file, overrides, run.run.hparams)
    try:
        info = registry.get(args["algorithm"])
    except UserError as error:
        bundle.cannot(f"hparams, masks and costs of {args['algorithm']}: {error}; install the package that has it")
        return
    words = f"hparams of {args['algorithm']}, in their ranges"
    try:
        drawn = hparams.resolve_hparams(
            args["algorithm"], args["dataset"], args["hparams_seed"], args["trial_seed"], overrides
        )
    except Exception as error:  # values from a stranger can be anything
        bundle.unfit.add(run.name)
        yield Problem(file, "line 1.args.hparams", words, str(error))
        return
    if refused := _refusal(info, drawn, args["dataset"]):
        bundle.unfit.add(run.name)
        yield Problem(file, "line 1.args.hparams", words, refused)
    yield from _differing(bundle, run, drawn, overrides)
    if run.records[0]["standing"] != info.standing:
        yield Problem(file, "line 1.standing", info.standing, run.records[0]["standing"])


def _overrides(text: str | None) -> dict[str, Any]:
    overrides = parse((text or "{}").encode())
    if not isinstance(overrides, dict):
        raise ValueError("it is no object")
    return overrides


def _places(file: str, overrides: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Problem]:
    """Paths of a machine among hparams."""
    for where, values in (("args.hparams", overrides), ("hparams", own)):
        for name, plain in layout.without_places(values).items():
            if plain != values[name]:
                words = f"{shown(plain)}, no path of a machine"
                yield Problem(file, f"line 1.{where}.{name}", words, shown(values[name]))


def _differing(
    bundle: Bundle, run: SubmittedRun, drawn: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Iterator[Problem]:
    args, own = run.run.args, run.run.hparams
    seeds = f"the draw of hparams_seed {args['hparams_seed']} and trial_seed {args['trial_seed']}"
    for name in sorted({*drawn, *own}):
        there, found = drawn.get(name), own.get(name)
        if there != found or isinstance(there, bool) != isinstance(found, bool):
            source = "args.hparams" if name in overrides else seeds
            expected = f"{shown(there)}, {source}" if name in drawn else "no such hparam"
            told = "nothing" if found is None else shown(found)
            yield Problem(records_of(run), f"line 1.hparams.{name}", expected, told)
            if _kind(there) != _kind(found):
                bundle.unfit.add(run.name)


def _kind(value: Any) -> type:
    """Of an hparam: whole numbers count as numbers."""
    return float if type(value) is int else type(value)


def _refusal(info: registry.AlgorithmInfo, values: Mapping[str, Any], dataset: str) -> str | None:
    """Why an algorithm does not take these hparams, None where it does: it checks most ranges when it is made. A small
    network serves, if the defaults do with it: the run's own may need a package that is not here."""
    small = {"backbone": "mnist_cnn", "weights": "none"}
    usual = hparams.resolve_hparams(info.name, dataset)
    with torch.random.fork_rng(devices=[]):
        try:
            info.cls((3, 8, 8), 4, 3, {**values, **small})
            return None
        except Exception as error:  # values from a stranger can be anything
            refused = str(error) or type(error).__name__
        try:
            info.cls((3, 8, 8), 4, 3, {**usual, **small})
        except Exception:  # it needs another network: nothing can be said
            return None
    return refused
