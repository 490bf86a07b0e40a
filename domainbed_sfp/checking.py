"""The command `check`: an algorithm through the contract suite, and how to mend what fails."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape

from domainbed_sfp import contract, registry


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


def _place(error: BaseException, module: str | None) -> str:
    """Where it was raised: file and line, in the algorithm's own `module` where it came by there."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if frame.filename == module] or frames)[-1]
    return f"{last.filename}, line {last.lineno}"
