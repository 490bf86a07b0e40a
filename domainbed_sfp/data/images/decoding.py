"""Image files as 8-bit RGB, as DomainBed's loader decodes them: `PIL.Image.open(path).convert("RGB")`.

Of what holds more than 8 bits a channel, PIL's conversion clips to 255 what lies above it. Grey levels are therefore
scaled by their format's range where it has one (16-bit PNG, PGM and JPEG 2000, TIFF of 9 to 16 bits), and refused where
any range would be a guess (32-bit integers, signed integers, floats).
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from domainbed_sfp.core.errors import UserError

# The range of formats that store 16-bit grey levels; PIL brings those of fewer bits (maxval, JPEG 2000) to it, too.
_RANGE_16 = {"PNG": 65535, "PPM": 65535, "JPEG2000": 65535}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _UNSPECIFIED = 0, 1, 4

_KINDS = {"I": "32-bit or signed integers", "F": "floating-point numbers"}

# `path`: what a thread is decoding.
_now = threading.local()


@contextmanager
def remarks() -> Iterator[dict[Path, str]]:
    """What PIL warns of in files that are decoded meanwhile, in whatever thread: its first words on each. PIL's own
    warnings, of damaged metadata for the most part, do not say which file they are about."""
    found: dict[Path, str] = {}

    def note(message: Warning | str, *args: Any, **options: Any) -> None:
        if path := getattr(_now, "path", None):
            found.setdefault(path, " ".join(str(message).split()))
        else:
            shown(message, *args, **options)

    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.showwarning = note
        for kind in (UserWarning, Image.DecompressionBombWarning):
            warnings.simplefilter("always", kind)
        yield found


def told_of(found: dict[Path, str], where: str) -> str:
    """One line on the `remarks` of files in a folder."""
    path, words = next(iter(found.items()))
    name = f"{len(found):,} images, first {str(path)!r}" if len(found) > 1 else f"image {str(path)!r}"
    return f"{where}: decoded, but PIL has its doubts about {name} ({words})"


def decode(path: Path, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """An image resized to `size` x `size` by PIL's bilinear filter, and its original (width, height).

    Returns:
        pixels: uint8 [size, size, 3].

    Raises:
        UserError: for a file that cannot be read or decoded, whatever is wrong with it; names the file.
    """
    _now.path = path
    try:
        with Image.open(path) as image:
            original = image.size
            return np.asarray(rgb(image).resize((size, size), Image.Resampling.BILINEAR)), original
    except OSError as error:
        if error.errno is not None:
            raise unreadable(path, error) from error
        raise _undecodable(path, error) from error
    except Exception as error:  # PIL's plugins raise whatever their parsing of a damaged file runs into
        raise _undecodable(path, error) from error
    finally:
        _now.path = None


def why_undecodable(path: Path) -> str | None:
    """What `decode` would say of a file, None where it can be decoded."""
    try:
        decode(path, 1)
    except UserError as error:
        return str(error)
    return None


def unreadable(path: Path, error: OSError) -> UserError:
    """The one-line error for an image file that the system does not let us read."""
    target = f", a link to {os.readlink(path)!r}," if path.is_symlink() else ""
    return UserError(
        f"image {str(path)!r}{target} cannot be read ({error.strerror or error}); make it readable or remove it"
    )


def _undecodable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    # Most of PIL's messages are sentences; what escapes from its parsers needs the kind of the error beside it.
    if not isinstance(error, OSError | _Unscaled):
        reason = f"{type(error).__name__}: {reason}"
    return UserError(f"image {str(path)!r} cannot be decoded ({reason}); replace the file or remove it")


class _Unscaled(ValueError):
    """Pixels of unknown range."""


def rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB; of several frames or pages the first."""
    is_tiff = image.format == "TIFF"
    if is_tiff and not set(image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))) <= {_UNSIGNED, _UNSPECIFIED}:  # type: ignore[attr-defined]
        kind = _KINDS.get(image.mode, "signed integers")
        raise _Unscaled(f"its pixels are {kind}, whose range is not defined: convert it to 8 bits")
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    largest = _RANGE_16.get(str(image.format))
    if is_tiff and image.mode.startswith("I;"):
        largest = 2 ** int(image.tag_v2[_BITS_PER_SAMPLE][0]) - 1  # type: ignore[attr-defined]
    if largest is None or image.mode == "F":
        kind = _KINDS.get(image.mode, "16-bit integers")
        raise _Unscaled(f"its pixels are {kind}, whose range {image.format} does not define: convert it to 8 bits")
    levels = np.asarray(image).astype(np.float64) * (255 / largest)
    # PIL inverts such images of 8 bits and fewer itself.
    if is_tiff and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # type: ignore[attr-defined]
        levels = 255 - levels
    return Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8)).convert("RGB")
