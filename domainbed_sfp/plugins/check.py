"""The command `check`: an algorithm through the contract suite, and how to mend what fails; what can be pruned of a
backbone."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning.scheduled import ScheduledPruning
from domainbed_sfp.core.errors import UserError, did_you_mean
from domainbed_sfp.plugins import contract, remedies
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.training.hparams import resolve_hparams


@dataclass(frozen=True)
class Outcome:
    """One check of an algorithm. problem: what happened where it failed; mend: what usually lies behind it, None where
    it is an exception that has been told before."""

    check: str
    did: str
    passed: bool
    seconds: float
    problem: str | None = None
    mend: str | None = None


# Checks by the exception that stopped them: where it was raised, and its words, numbers aside.
Stopped = dict[tuple[str, str], list[str]]


def outcomes(name: str, stopped: Stopped, variant: str = "") -> Iterator[Outcome]:
    """Runs every check of the contract on algorithm `name`. Raises UserError for a name that is not registered.

    stopped: what has been told so far, which is told no more; what is told here is put into it. variant: the hparams in
    words.
    """
    module = sys.modules[registry.get(name).cls.__module__].__file__
    for title, check in contract.CHECKS.items():
        did = " ".join((check.__doc__ or "").split())
        start = time.perf_counter()
        problem = mend = None
        try:
            check(name)
        except Exception as error:  # a broken algorithm can raise anything, and the other checks still have to run
            place = _place(error, module)
            if isinstance(error, AssertionError) and place.startswith(f"{contract.__file__},"):
                problem, mend = str(error) or f"an assertion of its own failed: {place}", remedies.MENDS[title]
            else:
                told = f"{type(error).__name__}: {error}"
                checks = stopped.setdefault((place, re.sub(r"\d+", "", told)), [])
                problem = f"the same exception as in {checks[0]}" if checks else None
                if problem is None:
                    problem = f"{told}{_nearest(error, name)} ({place})"
                    mend = "mend what raises it first; what this check is about could not be seen"
                checks.append(f"{title} with {variant}" if variant else title)
        seconds = time.perf_counter() - start
        yield Outcome(title, did, problem is None, seconds, problem, mend)


def warnings_of(name: str) -> Iterator[str]:
    """What of algorithm `name` is within the contract, and not what its author will have meant."""
    info = registry.get(name)
    if info.family == "pruning" and not contract.whole_run(name).algorithm.masks():
        yield (
            "family is 'pruning', and masks() names no weight when training has ended: tables and the leaderboard will "
            "show it as a dense network; define masks(), sparsity() and at_final_compression()"
        )
    if not issubclass(info.cls, ScheduledPruning):
        return
    algorithm = contract.make(name, overrides={"backbone": "mnist_cnn_bn"})
    assert isinstance(algorithm, ScheduledPruning)
    contract.run(algorithm, 0, contract.STEPS // 2)
    before = {key: value.clone() for key, value in algorithm.named_buffers()}
    algorithm.train().score(contract.minibatches(contract.STEPS // 2))
    for key, value in algorithm.named_buffers():
        if key.endswith(("running_mean", "running_var")) and not torch.equal(value, before[key]):
            yield (
                f"score() moves BatchNorm's statistics ({key}): it runs the network in training mode, and evaluations "
                "see that; run a copy of it (copy.deepcopy), or call eval() before and train() after"
            )
            return


def named(algorithm: str) -> list[str]:
    """The algorithms that are meant: the registered one of that name, or those that a Python file registers.

    Raises UserError where there is no such file, or it cannot be imported or registers none.
    """
    if not algorithm.endswith(".py"):
        return [registry.get(algorithm).name]
    path = Path(algorithm)
    if not path.is_file():
        raise UserError(f"there is no file {algorithm!r}; expected an algorithm's name, or a Python file with one")
    known = set(registry.names())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # a stranger's file can raise anything
        told = f"{type(error).__name__}: {error} ({_place(error, module.__file__)})"
        raise UserError(f"{algorithm!r} cannot be imported: {told}") from error
    finally:
        sys.path.pop(0)
    if not (found := [name for name in registry.names() if name not in known]):
        raise UserError(f"{algorithm!r} registers no algorithm; expected a class with the decorator @register")
    return found


def variants(name: str) -> list[dict[str, Any]]:
    """The hparams under which an algorithm is checked: its defaults, and single weights where it offers them too."""
    granularity = registry.get(name).hparams.get("granularity")
    offers = granularity and granularity.default != "weight" and "weight" in getattr(granularity.valid, "choices", ())
    return [{}, {"granularity": "weight"}] if offers else [{}]


def run(algorithm: str, as_json: bool) -> int:
    """Checks an algorithm, or those of a file, and prints the report; 0 when every check passed, 1 otherwise."""
    return max([_run(name, as_json) for name in named(algorithm)])


def _run(name: str, as_json: bool) -> int:
    info = registry.get(name)
    found: list[tuple[dict[str, Any], Outcome]] = []
    stopped: Stopped = {}
    console = Console(highlight=False, soft_wrap=True)
    if not as_json:
        where = f"{info.cls.__module__}.{info.cls.__qualname__}"
        console.print(f"{name} ({escape(where)}): {len(contract.CHECKS)} checks of the contract")
    for overrides in variants(name):
        with contract.variant(**overrides):
            variant = ", ".join(f"{key} {value}" for key, value in overrides.items())
            if variant and not as_json:
                console.print(f"with {variant}:")
            for outcome in outcomes(name, stopped, variant):
                found.append((overrides, outcome))
                if not as_json:
                    _print(console, outcome)
    failed = sum(not outcome.passed for _, outcome in found)
    warned = [] if failed else list(warnings_of(name))
    if as_json:
        checks = [{**asdict(outcome), "hparams": overrides} for overrides, outcome in found]
        print(json.dumps({"algorithm": name, "passed": not failed, "checks": checks, "warnings": warned}, indent=1))
        return 1 if failed else 0
    for names in stopped.values():
        if len(names) > 1:
            console.print(f"The exception of {names[0]} stopped {len(names)} checks: {', '.join(names)}.")
    for warning in warned:
        console.print(f"[yellow]warning[/yellow]  {escape(warning)}")
    passed = f"{len(found) - failed} of {len(found)} checks passed"
    console.print(f"{passed}: {name} keeps the contract." if not failed else f"{passed}, {failed} failed.")
    return 1 if failed else 0


def _print(console: Console, outcome: Outcome) -> None:
    verdict = "[green]passed[/green]" if outcome.passed else "[red]FAILED[/red]"
    is_told_before = outcome.problem is not None and outcome.mend is None
    said = (outcome.problem if is_told_before else outcome.did) or ""
    console.print(f"{verdict}  {outcome.check} ({outcome.seconds:.1f} s): {escape(said)}")
    if outcome.mend:
        console.print(f"        what happened: {escape(outcome.problem or '')}")
        console.print(f"        how to mend it: {escape(outcome.mend)}")


def run_backbone(name: str, image_size: int) -> int:
    """Prints what can be pruned of a backbone, and by which methods; 0 when some method can prune it, 1 otherwise.

    Raises UserError for a backbone that cannot be built.
    """
    shape = (3, image_size, image_size)
    chosen = {"backbone": name, "weights": "none", "image_size": image_size}
    base = {**resolve_hparams("ERM", _PHOTOGRAPHS), **chosen}
    featurizer = networks.make_featurizer(shape, base)
    classifier = networks.make_classifier(featurizer.n_outputs, 2)
    print(f"{name}: {featurizer.n_outputs} features of images {shape}, {_count(featurizer):,} parameters")
    for line in _whole_layers(featurizer, classifier):
        print(line)
    able = 0
    for algorithm in registry.names():
        info = registry.get(algorithm)
        granularity = (
            info.hparams["granularity"].default
            if "granularity" in info.hparams
            else getattr(info.cls, "granularity", None)
        )
        if granularity is None:
            continue
        try:
            with networks.without_weights(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                info.make(shape, 2, 2, {**resolve_hparams(algorithm, _PHOTOGRAPHS), **chosen})
        except UserError as error:
            print(f"{algorithm} ({granularity}): no, {error}")
        else:
            able += 1
            print(f"{algorithm} ({granularity}): yes")
    return 0 if able else 1


# Whose defaults a backbone is tried with.
_PHOTOGRAPHS = "PACS"


def _whole_layers(featurizer: nn.Module, classifier: nn.Module) -> Iterator[str]:
    """What channel pruning removes, and which layers' channels stay whole."""
    try:
        groups = channel_groups(featurizer, classifier)
    except UserError as error:
        yield f"no channels can be removed: {error}"
        return
    removable = {name for group in groups for name in group.filters}
    layers = {
        name: layer
        for name, layer in featurizer.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight is not None
    }
    whole = [name for name in layers if f"featurizer.{name}.weight" not in removable]
    channels = sum(group.channels for group in groups)
    yield f"channels that can be removed: {channels:,} in {len(groups)} groups, of {len(layers) - len(whole)} layers"
    if whole:
        shown = ", ".join(whole[:_SHOWN]) + (f" and {len(whole) - _SHOWN} more" if len(whole) > _SHOWN else "")
        yield (
            f"left whole: {shown} (residual streams, unless prune_residual_streams asks for them, and what cannot be "
            "followed)"
        )


_SHOWN = 12


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _nearest(error: Exception, algorithm: str) -> str:
    """Of a name that is no key: the nearest of the algorithm's parameters, hparams and groups."""
    if not isinstance(error, KeyError) or not error.args or not isinstance(error.args[0], str):
        return ""
    try:
        made = contract.make(algorithm)
    except Exception:  # what is wrong with it is told elsewhere
        return ""
    groups = (group.name for group in getattr(made, "groups", ()))
    return did_you_mean(error.args[0], [*dict(made.named_parameters()), *made.hparams, *groups])


def _place(error: BaseException, module: str | None) -> str:
    """Where it was raised: file and line, in the algorithm's own `module` where it came by there."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if frame.filename == module] or frames)[-1]
    return f"{last.filename}, line {last.lineno}"
