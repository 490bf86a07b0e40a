"""Runs an unmodified DomainBed checkout with our algorithms, hparams and launchers registered.

The only package that imports `domainbed`. Nothing in the checkout is written to: what its modules must know
is set on them after they are imported and before one of its scripts runs as `__main__`. What the checkout has
under a name of its own (ERM, IRM, ...) stays its own.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from domainbed_sfp.core.errors import check_range
from domainbed_sfp.runs.layout import RESULTS
from domainbed_sfp.runs.record_lines import end_last_line
from domainbed_sfp.upstream.checkout import (
    REQUIREMENTS,
    check_script,
    find_checkout,
    missing_requirements,
    opened,
    top_module,
)
from domainbed_sfp.upstream.flags import check_flags, read_flags, total_steps
from domainbed_sfp.upstream.launcher import register_launchers
from domainbed_sfp.upstream.registration import own_names, register_algorithms, register_hparams


def run(domainbed_root: str | None, script: str, arguments: Sequence[str], slots: int = 1) -> int:
    """Runs `domainbed.scripts.SCRIPT ARGUMENTS` of a checkout as `__main__`, knowing our algorithms.

    Relative paths among the arguments start from the current directory, as in any command. (DomainBed's
    `download` also reads two lists of its own relative to its root, and so works from there only.)

    Args:
        domainbed_root: the checkout.
        script: a module of its `domainbed.scripts`, such as train, sweep or collect_results.
        arguments: the script's own; a leading `--` is dropped.
        slots: jobs that the launcher `slots` runs at the same time.

    Returns:
        0, or 1 where the launcher `slots` has seen a job fail.

    Raises:
        UserError: for a folder that is no checkout, an unknown script, algorithm, data set, launcher or
            hparam, or requirements of DomainBed that are not installed.
        SystemExit: where the script exits by itself.
    """
    check_range("--jobs", slots, 1)
    root = find_checkout(domainbed_root)
    check_script(root, script)
    arguments = list(arguments[1:] if list(arguments[:1]) == ["--"] else arguments)
    with opened(root) as checkout, _arguments(root / "domainbed" / "scripts" / f"{script}.py", arguments):
        flags = read_flags(script, arguments)
        launcher = register_launchers(checkout, slots)
        ours = own_names(checkout)
        check_flags(checkout, flags, ours)
        register_algorithms(checkout, ours, total_steps(checkout, flags))
        register_hparams(checkout, ours, flags.overrides)
        if flags.output_dir:
            # DomainBed appends to what is there.
            end_last_line(Path(flags.output_dir) / RESULTS)
        try:
            runpy.run_module(f"domainbed.scripts.{script}", run_name="__main__", alter_sys=True)
        except ModuleNotFoundError as error:
            if top_module(error) in REQUIREMENTS:
                raise missing_requirements(error) from error
            raise
    return 1 if launcher.failures else 0


@contextmanager
def _arguments(program: Path, arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [str(program), *arguments]
    try:
        yield
    finally:
        sys.argv = before
