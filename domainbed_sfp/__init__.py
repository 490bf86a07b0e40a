"""Pruning and quantization for domain generalization, on DomainBed's protocol.

    import domainbed_sfp as dsfp

    settings = dsfp.RunSettings(dataset="FullColoredDigits", algorithm="SFP", test_envs=[2], output_dir="run")
    dsfp.train(settings)
    frame = dsfp.read_records("sweep")           # pandas: one row a record
    dsfp.table(frame)                            # the table that `collect` prints
    dsfp.compare(frame, "SFP", "best")           # paired tests
    dsfp.plot.fronts(frame)                      # accuracy against MACs, matplotlib
    dsfp.algorithms()                            # what there is to compare
    algorithm = dsfp.load_run("run")             # the trained algorithm
    network = dsfp.load_exported("small.safetensors")

Names are imported when they are first used, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from domainbed_sfp.core.version import __version__

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from domainbed_sfp import algorithms
    from domainbed_sfp.algorithms.base import Algorithm, ObjectiveAlgorithm
    from domainbed_sfp.algorithms.pruning.scheduled import CHANNEL_HPARAMS, PRUNING_HPARAMS, ScheduledPruning
    from domainbed_sfp.algorithms.registry import register
    from domainbed_sfp.analysis.figures import notebook as plot
    from domainbed_sfp.analysis.frames import compare, read_records, select, table
    from domainbed_sfp.core.errors import UserError
    from domainbed_sfp.core.hparam import Hparam
    from domainbed_sfp.deploy.files import load as load_exported
    from domainbed_sfp.deploy.finished_runs import load_algorithm as load_run
    from domainbed_sfp.pruning.state import Masks
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training.train import train

# Public name: (module, name in it; None for the module itself).
_FACE: dict[str, tuple[str, str | None]] = {
    "Algorithm": ("algorithms.base", "Algorithm"),
    "CHANNEL_HPARAMS": ("algorithms.pruning.scheduled", "CHANNEL_HPARAMS"),
    "Hparam": ("core.hparam", "Hparam"),
    "Masks": ("pruning.state", "Masks"),
    "ObjectiveAlgorithm": ("algorithms.base", "ObjectiveAlgorithm"),
    "PRUNING_HPARAMS": ("algorithms.pruning.scheduled", "PRUNING_HPARAMS"),
    "RunSettings": ("runs.settings", "RunSettings"),
    "ScheduledPruning": ("algorithms.pruning.scheduled", "ScheduledPruning"),
    "UserError": ("core.errors", "UserError"),
    "algorithms": ("algorithms", None),
    "compare": ("analysis.frames", "compare"),
    "load_exported": ("deploy.files", "load"),
    "load_run": ("deploy.finished_runs", "load_algorithm"),
    "plot": ("analysis.figures.notebook", None),
    "read_records": ("analysis.frames", "read_records"),
    "register": ("algorithms.registry", "register"),
    "select": ("analysis.frames", "select"),
    "table": ("analysis.frames", "table"),
    "train": ("training.train", "train"),
}

__all__ = [
    "CHANNEL_HPARAMS",
    "PRUNING_HPARAMS",
    "Algorithm",
    "Hparam",
    "Masks",
    "ObjectiveAlgorithm",
    "RunSettings",
    "ScheduledPruning",
    "UserError",
    "__version__",
    "algorithms",
    "compare",
    "load_exported",
    "load_run",
    "plot",
    "read_records",
    "register",
    "select",
    "table",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _FACE[name]
    found = importlib.import_module(f"{__name__}.{module}")
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
