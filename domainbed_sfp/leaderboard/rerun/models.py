"""The models of selected checkpoints in a bundle: how they are written, and evaluated without training anything."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.tensor_files import load_tensors
from domainbed_sfp.leaderboard.bundle.layout import MODELS, Tree, model_file
from domainbed_sfp.leaderboard.documents.entry_schema import object_of
from domainbed_sfp.leaderboard.documents.problems import Problem, parse, problems_of
from domainbed_sfp.leaderboard.rerun.comparing import compare_model
from domainbed_sfp.leaderboard.rerun.place import Place, args_of, as_recorded, hours_of, reason_not_to, sizes_of
from domainbed_sfp.leaderboard.summary import SubmittedRun
from domainbed_sfp.leaderboard.validation import Validation
from domainbed_sfp.leaderboard.validation.outcomes import Models
from domainbed_sfp.runs.checkpoints import without_aliases
from domainbed_sfp.training import train as training

# Bytes of names, shapes and plain values.
LONGEST_HEADER = 2**22
_METADATA = "domainbed_sfp"
_HEADER = object_of(
    {"aliases": {"type": "object", "additionalProperties": {"type": "string"}}, "values": {"type": "object"}}
)


def pack(state: Mapping[str, Any]) -> bytes:
    """A model's state as a safetensors file: tensors that are one are stored once, plain values stand in the header."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    unique, aliases = without_aliases(tensors)
    values = {name: value for name, value in state.items() if name not in tensors}
    return save(unique, metadata={_METADATA: json.dumps({"aliases": aliases, "values": values}, sort_keys=True)})


def unpack(data: bytes) -> dict[str, Any]:
    """The state of a file that `pack` made. Raises ValueError, saying what is wrong, for any other bytes."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(LONGEST_HEADER, len(data) - 8):
        raise ValueError(f"a header of {length:,} bytes in a file of {len(data):,}, at most {LONGEST_HEADER:,}")
    header = parse(data[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_METADATA), str):
        raise ValueError(f"a header without {_METADATA}")
    plain = parse(metadata[_METADATA].encode())
    for problem in problems_of("", plain, _HEADER, "header"):
        raise ValueError(f"{problem.field}: expected {problem.expected}, found {problem.found}")
    try:
        tensors: dict[str, Any] = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    for name, of in plain["aliases"].items():
        if of not in tensors or name in tensors:
            raise ValueError(f"{name!r} as another name of {of!r}")
    return {**tensors, **{name: tensors[of] for name, of in plain["aliases"].items()}, **plain["values"]}


def take(folder: Path, run: str, step: int, is_last: bool, target: Path) -> None:
    """Puts the model of a checkpoint of the run in `folder` into the bundle at `target`. Raises UserError where the run
    did not keep it."""
    source = folder / f"model_step{step}.pkl"
    if not source.exists() and is_last:
        source = folder / "model.pkl"
    if not source.exists():
        raise UserError(
            f"--with_models: {folder} has no model of step {step}, which a selection rule chooses; train it with "
            "--save_model_every_checkpoint, and submit before sweep pack, which keeps none"
        )
    try:
        state = load_tensors(source)["model_dict"]
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{source} cannot be read as a trained model: {error}") from error
    file = target / model_file(run, step)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pack(state))


def check_models(outcome: Validation, tree: Tree, place: Place) -> None:
    """Evaluates the models that the bundle has, where that can be done here; what disagrees is among the problems
    then, and costs that nothing but the model determines are no longer unverified."""
    outcome.models = Models()
    held = set(tree.names(MODELS))
    for dataset in sorted({run.run.dataset for run in outcome.runs}):
        cited = outcome.cited(dataset)
        runs = [run for run in outcome.runs if run.name in {name for name, _ in cited}]
        if not any(model_file(*one) in held for one in cited):
            continue
        reasons = (reason for run in runs if (reason := reason_not_to(run, place)))
        if reason := next(reasons, None):
            outcome.models.skipped[dataset] = reason
        elif (hours := hours_of(runs, 0, len(cited) // len(runs) + 1)) > place.hours:
            outcome.models.skipped[dataset] = f"it would take about {hours:,.1f} hours; --hours raises the limit"
        else:
            before = len(outcome.problems)
            for run in runs:
                for number, record in enumerate(run.records, start=1):
                    if (run.name, record["step"]) in cited:
                        outcome.problems += _check(run, number, tree, place, outcome.models)
            if len(outcome.problems) == before and outcome.models.document(cited):
                outcome.unverified[dataset] = []


def _check(run: SubmittedRun, number: int, tree: Tree, place: Place, found: Models) -> Iterator[Problem]:
    record = run.records[number - 1]
    file = model_file(run.name, record["step"])
    try:
        with tempfile.TemporaryDirectory() as folder, as_recorded(run):
            again = training.measure_model(args_of(run, place, folder), record["step"], unpack(tree.read(file)))
    except ValueError as error:
        yield Problem(file, "", "a model, as tensors", f"not a file of a model ({error})")
        return
    except UserError as error:
        yield Problem(file, "", f"the model of {run.run.algorithm}, which can be evaluated", str(error))
        return
    compared = compare_model(run.name, number, record, again, sizes_of(run))
    found.differences[run.name, record["step"]] = compared.difference
    yield from compared.problems
