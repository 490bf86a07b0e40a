"""The command `check`: an algorithm through the contract suite, and how to mend what fails; what can be pruned of a
backbone."""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.plugins import contract
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.training.hparams import resolve_hparams


@dataclass(frozen=True)
class Outcome:
    """One check of an algorithm. problem: what happened where it failed; mend: what usually lies behind it."""

    check: str
    did: str
    passed: bool
    seconds: float
    problem: str | None = None
    mend: str | None = None


def outcomes(name: str) -> Iterator[Outcome]:
    """Runs every check of the contract on algorithm `name`. Raises UserError for a name that is not registered."""
    module = sys.modules[registry.get(name).cls.__module__].__file__
    raised: dict[str, str] = {}
    for title, check in contract.CHECKS.items():
        did = " ".join((check.__doc__ or "").split())
        start = time.perf_counter()
        problem = mend = None
        try:
            check(name)
        except AssertionError as error:
            problem = str(error) or "an assertion of its own failed: " + _place(error, module)
            mend = contract.MENDS[title]
        except Exception as error:  # a broken algorithm can raise anything, and the other checks still have to run
            told = f"{type(error).__name__}: {error} ({_place(error, module)})"
            earlier = raised.setdefault(told, title)
            problem = told if earlier == title else f"the same exception as in {earlier}"
            mend = "mend what raises it first; what this check is about could not be seen"
        seconds = time.perf_counter() - start
        yield Outcome(title, did, problem is None, seconds, problem, mend)


def run(name: str, as_json: bool) -> int:
    """Prints the report; 0 when every check passed, 1 otherwise."""
    info = registry.get(name)
    found = []
    console = Console(highlight=False, soft_wrap=True)
    if not as_json:
        where = f"{info.cls.__module__}.{info.cls.__qualname__}"
        console.print(f"{name} ({escape(where)}): {len(contract.CHECKS)} checks of the contract")
    for outcome in outcomes(name):
        found.append(outcome)
        if not as_json:
            verdict = "[green]passed[/green]" if outcome.passed else "[red]FAILED[/red]"
            console.print(f"{verdict}  {outcome.check} ({outcome.seconds:.1f} s): {escape(outcome.did)}")
            if outcome.problem:
                console.print(f"        what happened: {escape(outcome.problem)}")
                console.print(f"        how to mend it: {escape(outcome.mend or '')}")
    failed = sum(not outcome.passed for outcome in found)
    if as_json:
        document = {"algorithm": name, "passed": not failed, "checks": [asdict(outcome) for outcome in found]}
        print(json.dumps(document, indent=1))
    else:
        passed = f"{len(found) - failed} of {len(found)} checks passed"
        console.print(f"{passed}: {name} keeps the contract." if not failed else f"{passed}, {failed} failed.")
    return 1 if failed else 0


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


def _place(error: BaseException, module: str | None) -> str:
    """Where it was raised: file and line, in the algorithm's own `module` where it came by there."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if frame.filename == module] or frames)[-1]
    return f"{last.filename}, line {last.lineno}"
