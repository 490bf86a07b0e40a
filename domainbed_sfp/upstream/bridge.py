"""Runs an unmodified DomainBed checkout with our algorithms, hparams and launchers registered.

The only module that imports `domainbed`. Nothing in the checkout is written to: what its modules must know
is set on them after they are imported and before one of its scripts runs as `__main__`. What the checkout has
under a name of its own (ERM, IRM, ...) stays its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.domainbed_facts import SMALL_IMAGES
from domainbed_sfp.core.errors import UserError, check_range, unknown_name
from domainbed_sfp.core.hparam import Hparam, parse_overrides
from domainbed_sfp.data import dataset_names
from domainbed_sfp.runs.record_lines import end_last_line
from domainbed_sfp.runs.records import RESULTS
from domainbed_sfp.sweep.capacity import job_environment, visible_gpus
from domainbed_sfp.sweep.launchers.local import POLL_SECONDS, TAIL_LINES
from domainbed_sfp.training import hparams

Launcher = Callable[[list[str]], None]

# Modules that DomainBed's code imports beyond our own requirements, and the packages that bring them.
REQUIREMENTS = {
    "backpack": "backpack-for-pytorch",
    "gdown": "gdown",
    "imageio": "imageio",
    "parameterized": "parameterized",
    "timm": "timm",
    "tqdm": "tqdm",
    "wilds": "wilds",
}

TRAINING_SCRIPTS = ("train", "train_autolr")

# How DomainBed's sweep begins a job's command, whatever the interpreter is called.
JOB_COMMAND = re.compile(r"\S*python\S* -m domainbed\.scripts\.(?P<script>\w+)(?= |$)")

# What our loaders and our loop do, and DomainBed's do not.
OUR_LOOPS_HPARAMS = ("degrade", "degraded_evaluation")

# Our data sets whose hparams hold for those of DomainBed that we do not have.
SMALL_STAND_IN, LARGE_STAND_IN = "RotatedMNIST", "PACS"


@dataclass(frozen=True)
class Checkout:
    """An imported DomainBed checkout."""

    root: Path
    algorithms: ModuleType
    command_launchers: ModuleType
    datasets: ModuleType
    hparams_registry: ModuleType


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
            if _top_module(error) in REQUIREMENTS:
                raise missing_requirements(error) from error
            raise
    return 1 if launcher.failures else 0


def find_checkout(domainbed_root: str | None) -> Path:
    """The absolute path of a checkout; a UserError if there is none at `domainbed_root`."""
    if not domainbed_root:
        raise UserError("which DomainBed? give its checkout with --domainbed_root or in DOMAINBED_ROOT")
    root = Path(domainbed_root).resolve()
    if not root.is_dir():
        raise UserError(f"--domainbed_root: there is no folder {domainbed_root!r}")
    if not _is_checkout(root):
        near = [place for place in (root.parent, *sorted(root.iterdir())) if _is_checkout(place)]
        hint = f"; did you mean {str(near[0])!r}?" if near else ""
        raise UserError(
            f"--domainbed_root: {domainbed_root!r} is no DomainBed checkout: "
            f"there is no domainbed/scripts/train.py in it{hint}"
        )
    return root


def _is_checkout(folder: Path) -> bool:
    return (folder / "domainbed" / "scripts" / "train.py").is_file()


def check_script(root: Path, script: str) -> None:
    """Raises UserError, naming the nearest one, unless the checkout has the script."""
    scripts = sorted(file.stem for file in (root / "domainbed" / "scripts").glob("*.py") if file.stem != "__init__")
    if script not in scripts:
        raise unknown_name("script of DomainBed", script, scripts)


@contextmanager
def opened(root: Path) -> Iterator[Checkout]:
    """The checkout's modules, imported; afterwards this process is as it was, and the checkout too.

    Raises UserError if a requirement of DomainBed is not installed, or another `domainbed` is in the way.
    """
    before = sys.path[:], sys.dont_write_bytecode, set(sys.modules)
    # The first place, since the current directory may hold another checkout.
    sys.path.insert(0, str(root))
    # No __pycache__ in a checkout that is not ours.
    sys.dont_write_bytecode = True
    try:
        yield _load(root)
    finally:
        sys.path[:], sys.dont_write_bytecode, names = before
        for name in set(sys.modules) - names:
            if name == "domainbed" or name.startswith("domainbed."):
                del sys.modules[name]


def _load(root: Path) -> Checkout:
    names = ("algorithms", "command_launchers", "datasets", "hparams_registry")
    try:
        modules = {name: importlib.import_module(f"domainbed.{name}") for name in names}
    except ModuleNotFoundError as error:
        if _top_module(error) == "domainbed":
            raise UserError(f"--domainbed_root: the checkout {str(root)!r} is incomplete: {error}") from error
        raise missing_requirements(error) from error
    for name, module in modules.items():
        if Path(module.__file__ or "").resolve().parent != root / "domainbed":
            raise UserError(
                f"domainbed.{name} was imported from {module.__file__} before the checkout {str(root)!r} "
                "could be; an installed package with algorithms must not bring a DomainBed of its own"
            )
    return Checkout(root, **modules)


@contextmanager
def _arguments(program: Path, arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [str(program), *arguments]
    try:
        yield
    finally:
        sys.argv = before


def missing_requirements(error: ModuleNotFoundError) -> UserError:
    """Names everything that DomainBed imports and is not installed, not only what `error` met first."""
    missing = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    packages = ["'domainbed_sfp[upstream]'"] if missing else []
    met = _top_module(error)
    if met not in REQUIREMENTS:
        missing.append(met)
        packages.append(met)
    return UserError(
        f"DomainBed needs modules that are not installed: {', '.join(missing)}; pip install {' '.join(packages)}"
    )


def _top_module(error: ModuleNotFoundError) -> str:
    return (error.name or str(error)).partition(".")[0]


# What the script is asked to do -----------------------------------------------------------------------------


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
            raise unknown_name("algorithm", algorithm, [*checkout.algorithms.ALGORITHMS, *ours])
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
            hparams.resolve_hparams(algorithm, stand_in(dataset), overrides=flags.overrides)
    launchers = checkout.command_launchers.REGISTRY
    if flags.command_launcher is not None and flags.command_launcher not in launchers:
        raise unknown_name("command launcher", flags.command_launcher, launchers)


def total_steps(checkout: Checkout, flags: Flags) -> int | None:
    """The length of the run; None where no run is asked for."""
    if len(flags.datasets) != 1:
        return None
    return flags.steps or getattr(checkout.datasets, flags.datasets[0]).N_STEPS


# Registration -----------------------------------------------------------------------------------------------


def own_names(checkout: Checkout) -> list[str]:
    """Names of our algorithms that mean nothing in the checkout; the others are left to it."""
    return [name for name in registry.names() if not hasattr(checkout.algorithms, name)]


def register_algorithms(checkout: Checkout, names: Sequence[str], steps: int | None) -> None:
    """Puts our classes where DomainBed looks algorithms up, and their names behind its own.

    DomainBed does not tell an algorithm how long the run is, from which schedules take their fractions: the
    class that is registered is a subclass that knows. It can be pickled: it is found where it says it is.
    """
    module = checkout.algorithms
    for name in names:
        original = registry.get(name).cls
        attributes: dict[str, Any] = {
            "__module__": module.__name__,
            "__doc__": original.__doc__,
            "__init__": _with_checked_hparams(name),
        }
        if steps is not None:
            attributes["total_steps"] = steps
        setattr(module, name, type(name, (original,), attributes))
        module.ALGORITHMS.append(name)


def _with_checked_hparams(name: str) -> Callable[..., None]:
    """The constructor of algorithm `name`, for hparams that nobody has checked yet."""
    info = registry.get(name)

    def construct(
        self: Any, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        info.cls.__init__(self, input_shape, num_classes, num_domains, info.checked(hparams))  # type: ignore[misc]

    return construct


def register_hparams(checkout: Checkout, names: Collection[str], overrides: Mapping[str, Any]) -> None:
    """Makes DomainBed's registry answer for our algorithms from our tables.

    `overrides` is the run's `--hparams`, which decides whose objective's hparams belong to the table.
    """
    theirs = checkout.hparams_registry._hparams

    def _hparams(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
        if algorithm not in names:
            return theirs(algorithm, dataset, random_seed)
        table = own_table(algorithm, dataset, overrides)
        return {name: (hparam.default, hparam.draw(name, random_seed)) for name, hparam in table.items()}

    checkout.hparams_registry._hparams = _hparams  # type: ignore[attr-defined]


def own_table(algorithm: str, dataset: str, overrides: Mapping[str, Any]) -> dict[str, Hparam]:
    """Our hparams of an algorithm on a data set of DomainBed, less `image_size`, which its loaders decide, and what
    only our loop does."""
    table = hparams.hparam_table(algorithm, stand_in(dataset), overrides)
    for name in ("image_size", *OUR_LOOPS_HPARAMS):
        del table[name]
    return table


def stand_in(dataset: str) -> str:
    """The data set of ours whose hparams hold: the same, or for one we do not have, one of its kind."""
    if dataset in dataset_names():
        return dataset
    return SMALL_STAND_IN if dataset in SMALL_IMAGES else LARGE_STAND_IN


# Launchers --------------------------------------------------------------------------------------------------


def register_launchers(checkout: Checkout, slots: int) -> SlotLauncher:
    """Adds the launcher `slots`, and makes all launchers start jobs that know our algorithms."""
    launchers: dict[str, Launcher] = checkout.command_launchers.REGISTRY
    launcher = SlotLauncher(slots)
    launchers.setdefault("slots", launcher)
    for name, launch in launchers.items():
        launchers[name] = _with_own_entry_point(launch, checkout.root)
    return launcher


def _with_own_entry_point(launch: Launcher, root: Path) -> Launcher:
    def launch_ours(commands: list[str]) -> None:
        launch([job_command(command, root) for command in commands])

    return launch_ours


def job_command(command: str, root: Path) -> str:
    """A job's shell command as DomainBed's sweep writes it, turned into one through this bridge.

    Raises UserError for a command of another form: its job would not know our algorithms.
    """
    match = JOB_COMMAND.match(command)
    if match is None:
        raise UserError(
            f"the checkout's sweep starts jobs by {command[:80]!r}, expected python -m domainbed.scripts.train ..."
        )
    words = [
        sys.executable,
        "-m",
        "domainbed_sfp",
        "upstream",
        "--domainbed_root",
        str(root),
        "--",
        match["script"],
    ]
    return shlex.join(words) + command[match.end() :]


@dataclass
class _Running:
    command: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]


class SlotLauncher:
    """A launcher for DomainBed's sweep that runs `slots` jobs at a time, and says which ones failed.

    Each job has its share of the threads, and a GPU if there is one. What jobs print is in their out.txt and
    err.txt.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.failures: list[str] = []

    def __call__(self, commands: list[str]) -> None:
        waiting = list(commands)
        slots = min(self.slots, len(waiting))
        running: dict[int, _Running] = {}
        ended = 0
        try:
            while waiting or running:
                for slot in range(slots):
                    if slot in running and running[slot].process.poll() is not None:
                        ended += 1
                        self._report(running.pop(slot), f"{ended} of {len(commands)} jobs")
                    if slot not in running and waiting:
                        running[slot] = self._start(waiting.pop(0), slot, slots)
                time.sleep(POLL_SECONDS)
        finally:
            # Only after an interruption something is left.
            for job in running.values():
                job.process.terminate()
                job.process.wait()
        print(f"{ended - len(self.failures)} jobs done, {len(self.failures)} failed")

    def _start(self, command: str, slot: int, slots: int) -> _Running:
        environment = job_environment(slot, slots, visible_gpus())
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        process = subprocess.Popen(shlex.split(command), env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        return _Running(command, process, errors)

    def _report(self, job: _Running, count: str) -> None:
        status = job.process.returncode
        print(f"{count}: {'done' if status == 0 else f'failed with exit status {status}'}", flush=True)
        if status:
            self.failures.append(job.command)
            job.errors.seek(0)
            tail = job.errors.read().decode(errors="replace").strip().splitlines()[-TAIL_LINES:]
            print(
                "\n".join([f"failed: {job.command}", *(f"    {line}" for line in tail)]),
                file=sys.stderr,
                flush=True,
            )
        job.errors.close()
