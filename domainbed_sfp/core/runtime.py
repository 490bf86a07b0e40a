"""What a training process keeps from step to step, instead of making it anew: memory, and compiled kernels."""

from __future__ import annotations

import ctypes
import os
import platform

# Of glibc's malloc.h, and its variables by which a user decides for himself.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")
_NEVER = 2**31 - 1

# Kernels oneDNN keeps compiled; its own default is 1024.
_ONEDNN_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_KERNELS = 16_384


def prepare_for_training() -> None:
    """Both of the below; to be called before the first convolution of a process."""
    keep_freed_memory()
    keep_compiled_kernels()


def keep_compiled_kernels() -> None:
    """Has oneDNN keep the kernels it has compiled for every shape that occurs, unless the environment sets a number.

    A network whose samples choose bit-widths runs groups of any size through every layer: thousands of shapes, of which
    the default forgets most before they come again. Compiling takes a tenth of such a training step.
    """
    os.environ.setdefault(_ONEDNN_CAPACITY, str(_KERNELS))


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; returns whether it does.

    A training step allocates and frees the same large activations again and again. By default glibc maps each anew and
    unmaps it, and the system clears every page at its first touch: an eighth of a training step and two fifths of an
    evaluation of EfficientNet-Lite0 at 64 px where it was measured. Results are the same to the bit; the process keeps
    its peak of memory to its end. Nothing happens outside glibc, or where the environment already says how malloc
    should behave or loads another one.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
