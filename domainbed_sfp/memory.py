"""The C library's memory, kept for the next step instead of given back to the system after each."""

from __future__ import annotations

import ctypes
import os
import platform

# Of glibc's malloc.h, and its variables by which a user decides for himself.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")
_NEVER = 2**31 - 1


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
