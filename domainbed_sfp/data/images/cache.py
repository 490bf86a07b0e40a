"""Decoded photographs, kept once as uint8 in a memory-mapped file that all jobs share.

An entry is keyed by the content of the image files, their order and the size they are resized to, so that copies of
a data set share an entry and a changed file makes a new one. Entries appear by an atomic rename, under a lock: jobs
that start together decode once. An entry that cannot be read back is made anew. All permissions follow the umask, so
that users can share a cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from domainbed_sfp.core import locks, surroundings
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.core.progress import progress
from domainbed_sfp.data.images.decoding import decode, remarks, told_of, unreadable

# Part of every key: raise it when the stored form or the decoding changes. 2: images of more than 8 bits are scaled.
FORMAT = "2"


def default_cache_dir() -> Path:
    """`DOMAINBED_SFP_CACHE`, or `domainbed_sfp` in the user's cache folder. Raises UserError for a user without one."""
    if given := os.environ.get("DOMAINBED_SFP_CACHE"):
        return Path(given)
    base = surroundings.cache_home()
    if base is None:
        raise UserError(
            "there is no folder for decoded images: this user has no home; choose one with --cache_dir, "
            "DOMAINBED_SFP_CACHE or XDG_CACHE_HOME"
        )
    return base / "domainbed_sfp"


def cached_images(
    paths: Sequence[Path], root: Path, size: int, cache_dir: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The images at `paths` below `root`, as RGB resized to `size` x `size` by PIL's bilinear filter.

    Returns:
        images: read-only memory map, uint8 [N, size, size, 3]; equal to torchvision's Resize on PIL images.
        sizes: original (width, height), int32 [N, 2].

    Raises:
        UserError: for a file that cannot be read or decoded (named), or a cache folder that cannot hold the entry.
    """
    cache = cache_dir or default_cache_dir()
    stats = [_stat(path) for path in paths]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        key = _content_key(paths, stats, root, size, cache)
        entry = cache / key
        arrays = _load(entry, len(paths), size)
        if arrays is None:
            with locks.hold(cache / f"{key}.lock", None, f"decoding {str(root)!r}"):
                # Another job may have built it while this one waited.
                arrays = _load(entry, len(paths), size)
                if arrays is None:
                    _build(entry, paths, f"{root.parent.name}/{root.name}", size)
                    arrays = _load(entry, len(paths), size)
        if arrays is None:
            raise OSError(errno.EIO, "the entry that was just written cannot be read back")
        return arrays
    except OSError as error:
        needed = len(paths) * size * size * 3 / 2**20
        raise UserError(
            f"image cache {str(cache)!r}: {error.strerror or error}; {needed:.0f} MiB are needed for "
            f"{len(paths)} images of {str(root)!r} at {size} px; "
            "choose another folder with --cache_dir or DOMAINBED_SFP_CACHE"
        ) from error


def _content_key(paths: Sequence[Path], stats: Sequence[os.stat_result], root: Path, size: int, cache: Path) -> str:
    """Hash of names and contents. Reading all files is remembered by their sizes and times, so it is done once."""
    seen = hashlib.sha256()
    for path, status in zip(paths, stats):
        seen.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    memo = cache / "contents" / seen.hexdigest()[:32]
    content = _recalled(memo)
    if content is None:
        total = hashlib.sha256()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path, digest in zip(paths, pool.map(_file_digest, paths)):
                total.update(f"{path.relative_to(root).as_posix()}\0".encode(errors="surrogateescape") + digest)
        content = total.hexdigest()
        # Forgetting only costs time: a cache that this user may read but not write still serves its entries.
        with suppress(OSError):
            memo.parent.mkdir(exist_ok=True)
            with locks.hold(memo.parent / "write.lock", None, "writing to the image cache"):
                write_atomically(memo, content)
    return hashlib.sha256(json.dumps([FORMAT, content, size]).encode()).hexdigest()[:32]


def _recalled(memo: Path) -> str | None:
    """The hash in a memo file, or None where there is no whole one that this user may read."""
    try:
        text = memo.read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def _file_digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise unreadable(path, error) from error


def _load(entry: Path, count: int, size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The arrays of an entry, or None where it is absent or not what `_build` writes."""
    try:
        images = np.lib.format.open_memmap(entry / "images.npy", mode="r")
        sizes = np.lib.format.open_memmap(entry / "sizes.npy", mode="r")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError:
        raise
    except Exception:  # numpy parses a damaged header until something fails, whatever that is
        return None
    if (images.dtype, images.shape) != (np.uint8, (count, size, size, 3)):
        return None
    if (sizes.dtype, sizes.shape) != (np.int32, (count, 2)):
        return None
    return images, np.array(sizes)


def _build(entry: Path, paths: Sequence[Path], title: str, size: int) -> None:
    """Decodes into a folder beside the entry and renames it when all is written. The caller holds the key's lock.

    The folder's name is fixed, so that what a killed process left is cleared by the next attempt.
    """
    target = entry.with_name(f"building-{entry.name}")
    _remove(target)
    target.mkdir()
    try:
        images = _allocate(target / "images.npy", (len(paths), size, size, 3))
        sizes = np.zeros((len(paths), 2), dtype=np.int32)

        def store(index: int) -> None:
            images[index], sizes[index] = decode(paths[index], size)

        # PIL releases the interpreter's lock while it decodes and resizes.
        with remarks() as found, ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for _ in progress(
                    pool.map(store, range(len(paths))), len(paths), f"decoding {title} at {size} px", "images"
                ):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if found:
            warn(told_of(found, title))
        images.flush()
        np.save(target / "sizes.npy", sizes)
        # Otherwise a power failure could leave the new name with empty files.
        for file in target.iterdir():
            _sync(file)
        _remove(entry)  # one that is damaged: a folder cannot be renamed over it
        os.replace(target, entry)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A memory map whose disk space is reserved: writing to a map on a full disk would kill the process."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        elif shutil.disk_usage(path.parent).free < array.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return array
