"""Checkpoints: one safetensors file that holds the tensors, with everything else as JSON in its header.

One file is replaced by one atomic rename: a run killed at any moment finds the old checkpoint or the new one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically

# What the names of tensors begin with.
WEIGHTS, OPTIMIZER = "model/", "optimizer/"


def save_checkpoint(path: Path, algorithm: nn.Module, state: Mapping[str, Any]) -> None:
    """Saves parameters, buffers, extra states and optimizers of `algorithm`, and the JSON-safe `state`."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"state": state, "aliases": {}, "values": {}, "optimizers": {}}
    for key, value in algorithm.state_dict().items():
        if isinstance(value, Tensor):
            tensors[WEIGHTS + key] = value
        else:
            header["values"][key] = value
    for name, optimizer in _optimizers(algorithm).items():
        described = optimizer.state_dict()
        scalars: dict[str, dict[str, Any]] = {}
        for index, slots in described["state"].items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{name}/{index}/{slot}"] = value
                else:
                    scalars.setdefault(str(index), {})[slot] = value
        header["optimizers"][name] = {"param_groups": described["param_groups"], "scalars": scalars}
    unique, header["aliases"] = without_aliases(tensors)
    write_atomically(path, save(unique, metadata={"domainbed_sfp": json.dumps(header)}))


def without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, on the CPU, and the names of those that are another one: safetensors refuses tensors that share
    memory, and `network` shares its own with `featurizer`."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for key, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in first:
            aliases[key] = first[identity]
        else:
            first[identity] = key
            unique[key] = tensor.detach().contiguous().cpu()
    return unique, aliases


def read_state(path: Path) -> dict[str, Any]:
    """The JSON-safe state of a checkpoint. Raises UserError where the file is no checkpoint."""
    state: dict[str, Any] = _read_header(path)["state"]
    return state


def load_checkpoint(path: Path, algorithm: nn.Module) -> dict[str, Any]:
    """Restores `algorithm` from a checkpoint, in place, and returns the JSON-safe state.

    Raises UserError if the file is no checkpoint, or one of another algorithm or network.
    """
    header = _read_header(path)
    try:
        _restore(path, header, algorithm)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, SafetensorError) as error:
        raise UserError(f"checkpoint {str(path)!r} is damaged ({error}); remove it to start anew") from error
    state: dict[str, Any] = header["state"]
    return state


def _restore(path: Path, header: Mapping[str, Any], algorithm: nn.Module) -> None:
    """Puts the tensors of a checkpoint into `algorithm` and its optimizers."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors.update({alias: tensors[key] for alias, key in header["aliases"].items()})
    model = {key.removeprefix(WEIGHTS): value for key, value in tensors.items() if key.startswith(WEIGHTS)}
    try:
        algorithm.load_state_dict({**model, **header["values"]})
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {str(path)!r} is of another network: {str(error).splitlines()[-1].strip()}"
        ) from error
    for name, optimizer in _optimizers(algorithm).items():
        described = header["optimizers"][name]
        state: dict[int, dict[str, Any]] = {int(i): dict(slots) for i, slots in described["scalars"].items()}
        prefix = f"{OPTIMIZER}{name}/"
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, slot = key.removeprefix(prefix).split("/", 1)
                state.setdefault(int(index), {})[slot] = value
        # JSON has no tuples, and Adam's betas are one.
        groups = [
            {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
            for group in described["param_groups"]
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                if isinstance(value, Tensor) and value.dim() > 1 and value.shape == parameter.shape:
                    # In the parameter's own order in memory, as they were before: updates are twice as fast then.
                    slots[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_model(path: Path, contents: Mapping[str, Any]) -> None:
    """DomainBed's model.pkl: a torch file of tensors and plain values, which loads with `weights_only=True`."""
    buffer = io.BytesIO()
    torch.save(dict(contents), buffer)
    write_atomically(path, buffer.getvalue())


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = strict_json.parse(file.metadata()["domainbed_sfp"])
        for part in ("state", "aliases", "values", "optimizers"):
            if not isinstance(header[part], dict):
                raise TypeError(f"{part} is not an object")
        return header
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is not a checkpoint of this package ({error}); remove it to start anew"
        ) from error


def _optimizers(algorithm: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {name: value for name, value in vars(algorithm).items() if isinstance(value, torch.optim.Optimizer)}
