"""Where a record was made: versions, hardware, commit."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL
import torch

from domainbed_sfp.core.version import __version__


def fingerprint(device: torch.device) -> dict[str, str | int]:
    """Versions and hardware, as plain values. Threads belong to it: sums differ in the last bit with their number."""
    return {
        "domainbed_sfp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


@functools.cache
def commit() -> str | None:
    """The commit of the checkout this package runs from, with `+changes` where the package's files differ from it;
    None outside a checkout."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        # An installation that merely lies inside someone's repository is not a checkout of ours.
        if not git("ls-files", "__init__.py"):
            return None
        return head + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def code_of(algorithm: type) -> str | None:
    """Twelve digits of a hash of the Python files of another package's algorithm: of its top-level package, or of its
    module where that is none. None for this package's own, which `commit` tells, and where there are no files."""
    top = algorithm.__module__.partition(".")[0]
    if top == __name__.partition(".")[0]:
        return None
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        return None
    root = Path(file).parent
    files = sorted(root.rglob("*.py")) if Path(file).name == "__init__.py" else [Path(file)]
    digest = hashlib.sha256()
    for path in files:
        digest.update(
            path.relative_to(root).as_posix().encode(errors="surrogateescape") + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:12]


def weights_digest(weights: object) -> str | None:
    """Twelve digits of a hash of the file that hparam `weights` names; None for a word, and where there is no file."""
    if not isinstance(weights, str) or weights in ("imagenet", "none"):
        return None
    digest = hashlib.sha256()
    try:
        with open(weights, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):  # whoever loads it says so
        return None
    return digest.hexdigest()[:12]


@functools.cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
