"""The command `new`: an installable package with one algorithm that trains as it stands."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.core.version import __version__

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "0.1.0"
description = "{algorithm}, an algorithm for domainbed_sfp"
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["domainbed_sfp>={version}"]

[project.optional-dependencies]
test = ["pytest>=7.4"]

# By this domainbed_sfp finds the algorithm: the name of the module whose import registers it.
[project.entry-points."domainbed_sfp.algorithms"]
{package} = "{package}.algorithm"

[tool.setuptools]
packages = ["{package}"]
"""

_INIT = '''"""{algorithm}, an algorithm for domainbed_sfp."""
'''

_ALGORITHM = '''"""{algorithm}: replace this line by what it does and where it comes from."""

from __future__ import annotations

import domainbed_sfp as dsfp


def largest_weight(group, parameters):
    """[channels]: the largest single weight of each channel's filter. The lowest go first; it is yours to change."""
    return parameters[group.filters[0]].abs().flatten(1).amax(1)


@dsfp.register(
    "{algorithm}",
    family="pruning",
    reference="described here",  # or the paper; with standing="reconstruction" where that leaves gaps you have filled
    hparams=dsfp.CHANNEL_HPARAMS,
)
class {algorithm}(dsfp.ScheduledPruning):
    """Removes the channels whose filters have the smallest weights.

    Training with the objective, the schedule, masks, export, records and resume come from `ScheduledPruning`. Every
    further value that must survive an interruption belongs into a parameter, a buffer, an optimizer that is an
    attribute, or `get_extra_state`.
    """

    channel_score = staticmethod(largest_weight)
'''

_TEST = '''"""{algorithm} keeps the contract of domainbed_sfp."""

from __future__ import annotations

import pytest
from domainbed_sfp.plugins import contract, remedies


@pytest.mark.parametrize("check", contract.CHECKS)
def test_contract(check):
    try:
        contract.CHECKS[check]("{algorithm}")
    except AssertionError as error:
        pytest.fail(f"{{error}}\\nhow to mend it: {{remedies.MENDS[check]}}", pytrace=False)
'''

_SPEC = """\
# A small sweep that needs no data: scikit-learn's digits, three test environments, two trials. A few minutes.
datasets: [FullColoredDigits]
algorithms:
  - ERM
  - {{name: Magnitude, hparams: {{sparsity: 0.5}}}}
  - {{name: {algorithm}, hparams: {{sparsity: 0.5}}}}
single_test_envs: true
n_hparams: 1
n_trials: 2
steps: 201
checkpoint_freq: 50
skip_model_save: true
"""

_README = """\
# {algorithm}

An algorithm for domainbed_sfp, in one file: `{package}/algorithm.py`. It trains as it stands; make its score your own.

From the file to the leaderboard, here, in five commands:

    python -m pip install -e .
    domainbed-sfp check {algorithm}
    domainbed-sfp sweep launch sweep.yaml --output_dir sweep --jobs 2
    domainbed-sfp submit --input_dir sweep --algorithm {algorithm} --output bundle
    domainbed-sfp leaderboard validate bundle

The first lets the command line, sweeps and tables find the algorithm. The second puts it through the contract and says
how to mend what fails; `pytest` does the same (`python -m pip install -e '.[test]'`). The third trains it beside two
baselines: `domainbed-sfp collect --input_dir sweep` shows the table. The fourth gathers records and masks, the fifth
recomputes every number from them. To submit: a pull request with this package's algorithm file and the bundle.
"""

_FILES = {
    "pyproject.toml": _PYPROJECT,
    "README.md": _README,
    "sweep.yaml": _SPEC,
    "{package}/__init__.py": _INIT,
    "{package}/algorithm.py": _ALGORITHM,
    "tests/test_contract.py": _TEST,
}


def run(name: str, output_dir: str) -> int:
    """Writes the package and says what comes next."""
    folder = write_package(name, output_dir)
    algorithm = names_of(name)[1]
    print(f"Written: {folder}. Next:")
    print(f"    cd {folder} && pip install -e . && domainbed-sfp check {algorithm}")
    print(f"Its README has the whole way to the leaderboard; the algorithm is {folder.name}/algorithm.py.")
    return 0


def names_of(name: str) -> tuple[str, str]:
    """The package's and the algorithm's name: `my_method` and `MyMethod`, from either."""
    package = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    algorithm = name if name != package else "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    return package, algorithm


def write_package(name: str, output_dir: str) -> Path:
    """Writes the package into a new folder of `output_dir` and returns the folder.

    Raises UserError for a name that cannot be, or is taken by an algorithm or a module, and for a folder that exists.
    """
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or keyword.iskeyword(name):
        nearest = re.sub("[^A-Za-z0-9]+", "_", name).strip("_0123456789").lower() or "my_method"
        nearest += "_method" if keyword.iskeyword(nearest) else ""
        raise UserError(
            f"name {name!r}: expected a python name of letters, digits and underscores that begins with a letter and "
            f"is no keyword, such as {nearest!r}"
        )
    package, algorithm = names_of(name)
    taken = {known.lower(): known for known in registry.names()}
    if algorithm.lower() in taken:
        there = registry.get(taken[algorithm.lower()])
        where = f"{there.cls.__module__}.{there.cls.__qualname__}"
        raise UserError(
            f"name {name!r} is taken: algorithm {there.name!r} is {where}; choose another, such as {'my_' + package!r}"
        )
    if package in sys.stdlib_module_names or importlib.util.find_spec(package) is not None:
        raise UserError(f"name {name!r} is taken by a module of python; choose another, such as {'my_' + package!r}")
    folder = Path(output_dir) / package
    if folder.exists():
        raise UserError(f"{str(folder)!r} exists; choose another --output_dir, or remove it")
    try:
        for path, text in _FILES.items():
            file = folder / path.format(package=package)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text.format(package=package, algorithm=algorithm, version=__version__))
    except OSError as error:
        raise UserError(f"--output_dir {output_dir!r} cannot be written: {error.strerror}") from error
    return folder
