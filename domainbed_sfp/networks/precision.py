"""Arithmetic and memory format: which a network has, and which suit a device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from domainbed_sfp.networks.featurizer import Featurizer


def set_precision(model: nn.Module, precision: str, channels_last: bool) -> None:
    """Sets arithmetic ("fp32" or "bf16") and memory format of every featurizer inside `model`, in place."""
    for module in model.modules():
        if isinstance(module, Featurizer):
            module.precision = precision
            module.channels_last = channels_last
            if channels_last:
                module.to(memory_format=torch.channels_last)


def channels_last_is_faster(model: nn.Module, device: torch.device) -> bool:
    """Whether a training step is.

    On a CPU everywhere it was measured: a ResNet-18 step at 224 px takes 3.4 s instead of 5.1 s in fp32 on two cores,
    EfficientNet-Lite0's at 64 px half the time. On a GPU (NVIDIA H200, fp32) ResNet-18's is, EfficientNet-Lite0's is
    not."""
    return device.type == "cpu" or not has_depthwise_convolutions(model)


def has_depthwise_convolutions(model: nn.Module) -> bool:
    """True where bf16 is slower than fp32 on a CPU: oneDNN's bf16 depthwise kernels are slow (measured)."""
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())


def choose_precision(name: str, device: torch.device, network: torch.nn.Module) -> str:
    """The arithmetic that `name` stands for on this device and network: "fp32" or "bf16"."""
    if name != "auto":
        return name
    if getattr(network, "full_precision", False):
        return "fp32"
    if device.type == "cuda":
        # Since Ampere; torch also says yes to older GPUs, which only emulate it.
        has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return "bf16" if has_bf16 else "fp32"
    fast = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    return "bf16" if fast and not has_depthwise_convolutions(network) else "fp32"


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.split())
    except OSError:
        pass
    return set()
