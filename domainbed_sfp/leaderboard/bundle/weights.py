"""The models of selected checkpoints in a bundle: how they are written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.tensor_files import load_tensors
from domainbed_sfp.leaderboard.bundle.layout import model_file
from domainbed_sfp.leaderboard.documents.entry_schema import object_of
from domainbed_sfp.leaderboard.documents.parsing import parse
from domainbed_sfp.leaderboard.documents.problems import problems_of
from domainbed_sfp.runs.checkpoints import without_aliases

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
