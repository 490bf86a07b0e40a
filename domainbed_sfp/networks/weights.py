"""Weights from a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.tensor_files import COUNTER, load_tensors, state_dict_for


def load_file(network: nn.Module, path: str, name: str, ignore: tuple[str, ...] = ()) -> None:
    """Loads a state dict from a .safetensors or .pth file, strictly but for the `ignore`d classifier's keys."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"hparam weights of {name}: expected imagenet, none or a file, and there is no file {path!r}")
    expected = {key: value for key, value in network.state_dict().items() if not (ignore and key.startswith(ignore))}
    try:
        state = state_dict_for(load_tensors(file), expected)
    except (ValueError, OSError) as error:
        raise UserError(
            f"weights file {path!r} cannot be read: {error}; expected a state dict, .pth or .safetensors"
        ) from error
    state = {key: value for key, value in state.items() if not key.startswith(ignore)} if ignore else state
    for key in [*expected, *state]:
        if key.endswith(COUNTER) and (key not in state or key not in expected):
            state.pop(key, None)
        elif key not in state or key not in expected:
            where = "lacks" if key not in state else "has, unlike the network,"
            raise UserError(f"weights file {path!r} does not fit {name}: it {where} {key!r}")
        elif state[key].shape != expected[key].shape:
            raise UserError(
                f"weights file {path!r} does not fit {name}: {key!r} has shape {tuple(state[key].shape)}, "
                f"expected {tuple(expected[key].shape)}"
            )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of a kind of tensor that cannot be copied from, as quantized or sparse ones
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"weights file {path!r} does not fit {name}: {reason}") from error


def adapt_input_channels(network: nn.Module, name: str, channels: int) -> None:
    """Repeats the RGB filters of the first convolution over `channels` inputs, as DomainBed does."""
    conv = getattr(network, name)
    if channels == conv.in_channels:
        return
    weight = conv.weight.data[:, [index % 3 for index in range(channels)]].clone()
    conv.in_channels = channels
    conv.weight = nn.Parameter(weight)
