"""The device that a name on the command line stands for."""

from __future__ import annotations

import re

import torch

from domainbed_sfp.core.errors import UserError


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this torch sees {torch.cuda.device_count()} CUDA devices; choose cpu or auto"
        )
    return device
