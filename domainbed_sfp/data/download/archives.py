"""Unpacks zip and tar archives of unknown origin: nothing is written outside the given folder.

No link is ever created on disk. A link member that names a file of the same archive becomes a copy of it;
absolute names, `..`, links out of the tree, devices and pipes are refused by name.
"""

from __future__ import annotations

import contextlib
import lzma
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.disk import disk_error, require_space
from domainbed_sfp.data.images.contents import is_hidden

CHUNK_BYTES = 1 << 20

DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,  # a zip compression method that Python lacks
    RuntimeError,  # zipfile's answer to an encrypted member
)


class ArchiveError(UserError):
    """The archive is damaged, is no archive at all, or holds a member that must not be unpacked."""

    def __init__(self, archive: Path, problem: str) -> None:
        super().__init__(f"{archive.name}: {problem}")
        self.archive = archive


@dataclass(frozen=True)
class Member:
    """One file of an archive: its checked relative path, its size in bytes, and how to read it."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]


def unpack(
    archive: Path,
    destination: Path,
    *,
    keep: Callable[[PurePosixPath], bool] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Unpacks the files of `archive`, those for which `keep(path)` holds, below `destination`.

    Returns how many. The kind of archive is told by its content, not by its name: zip, or tar (plain, gz,
    bz2, xz). `advance` hears the number of bytes written as they are written. Raises ArchiveError for a
    damaged archive or an unsafe member, UserError when the disk is full; what had been unpacked by then is
    left to the caller.
    """
    count = 0
    folders: set[Path] = set()
    try:
        if keep is None:
            _require_room(archive, destination)
        for member in members(archive):
            if keep is not None and not keep(member.path):
                continue
            target = destination / member.path
            if target.parent not in folders:
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.add(target.parent)
            written = _copy(member, target, advance)
            if written != member.size:
                raise ArchiveError(archive, f"damaged: {member.path} has {written} of {member.size} bytes")
            count += 1
    except DAMAGED as error:
        raise ArchiveError(archive, f"damaged: {error or type(error).__name__}") from error
    except OSError as error:
        # gzip and bz2 report bad data as an OSError without a number; the system's errors have one.
        if error.errno is None:
            raise ArchiveError(archive, f"damaged: {error}") from error
        raise disk_error(error, f"unpacking {archive.name}") from error
    return count


def _require_room(archive: Path, destination: Path) -> None:
    # A tar does not say its size without being read to its end; there a full disk is met on the way.
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            needed = sum(info.file_size for info in opened.infolist())
        require_space(destination, needed, f"unpacking {archive.name}")


def members(archive: Path) -> Iterator[Member]:
    """The files of an archive in their order, what systems and tools leave there left out."""
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_members(archive)
    else:
        with archive.open("rb") as opened:
            start = opened.read(40)
        raise ArchiveError(archive, f"neither a zip nor a tar archive (it starts with {start!r})")


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            # zipfile repairs names (absolute ones, say) only in `extract`, so the raw name is judged.
            path = _checked(archive, info.filename)
            mode = info.external_attr >> 16
            kind = stat.S_IFMT(mode)
            if path is None or info.is_dir():
                continue
            if kind == stat.S_IFLNK:
                target = _link_target(archive, path, opened.read(info).decode("utf-8", "replace"))
                try:
                    info = opened.getinfo(target)
                except KeyError:
                    raise ArchiveError(archive, f"link {path} points to no file: {target}") from None
                # A link to a link would need its own check: the archives we unpack have neither.
                if stat.S_ISLNK(info.external_attr >> 16) or info.is_dir():
                    raise ArchiveError(archive, f"link {path} does not point to a plain file")
            elif kind not in (0, stat.S_IFREG):
                raise ArchiveError(archive, f"{path} is neither a file nor a folder; refused")
            yield Member(path, info.file_size, lambda info=info: opened.open(info))  # type: ignore[misc]


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, "r:*") as opened:
        for info in opened:
            path = _checked(archive, info.name)
            if path is None or info.isdir():
                continue
            source = info
            if info.issym() or info.islnk():
                # A hard link's target counts from the archive's root, a symbolic one's from its own folder.
                start = path if info.issym() else PurePosixPath(path.name)
                target = _link_target(archive, start, info.linkname, shown=path)
                source = _tar_member(archive, opened, path, target)
                if not source.isreg():
                    raise ArchiveError(archive, f"link {path} does not point to a plain file")
            elif not info.isreg():
                raise ArchiveError(archive, f"{path} is neither a file nor a folder; refused")

            def read(opened: tarfile.TarFile = opened, source: tarfile.TarInfo = source) -> IO[bytes]:
                content = opened.extractfile(source)
                if content is None:
                    raise ArchiveError(archive, f"{source.name} cannot be read")
                return content

            yield Member(path, source.size, read)


def _tar_member(archive: Path, opened: tarfile.TarFile, link: PurePosixPath, target: str) -> tarfile.TarInfo:
    # `tar c .` writes names as ./NAME.
    for name in (target, f"./{target}"):
        with contextlib.suppress(KeyError):
            return opened.getmember(name)
    raise ArchiveError(archive, f"link {link} points to no file: {target}")


def _checked(archive: Path, name: str) -> PurePosixPath | None:
    """The relative path that `name` stands for, None for what a system or a tool left there; ArchiveError when it
    would leave the tree."""
    # Archives made on Windows may hold backslashes; treating them as separators everywhere is the safe side.
    posix = name.replace("\\", "/")
    path = PurePosixPath(posix)
    if path.is_absolute() or re.match(r"[A-Za-z]:", posix):
        raise ArchiveError(archive, f"member {name!r} has an absolute path; refused")
    if ".." in path.parts or "\0" in name:
        raise ArchiveError(archive, f"member {name!r} leads out of the folder; refused")
    if not path.parts or any(is_hidden(part) for part in path.parts):
        return None
    return path


def _link_target(archive: Path, path: PurePosixPath, link: str, shown: PurePosixPath | None = None) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(str(path)), link))
    if posixpath.isabs(target) or target == ".." or target.startswith("../"):
        raise ArchiveError(archive, f"link {shown or path} leads out of the folder ({link!r}); refused")
    return target


def _copy(member: Member, target: Path, advance: Callable[[int], None]) -> int:
    written = 0
    with member.open() as source, open_new(target) as output:
        while chunk := source.read(CHUNK_BYTES):
            output.write(chunk)
            written += len(chunk)
            advance(len(chunk))
    return written


def open_new(path: Path) -> IO[bytes]:
    """Opens a file for writing: the one place where unpacked bytes meet the disk."""
    return path.open("wb")
