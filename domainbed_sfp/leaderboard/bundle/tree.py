"""The files of a bundle from a stranger, read in bounds and without following a link."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from domainbed_sfp.leaderboard.bundle import layout
from domainbed_sfp.leaderboard.bundle.layout import CHUNK, LAYOUT, MASKS, MODELS, RECORDS, SIGNATURE, SUMS, limit_of
from domainbed_sfp.leaderboard.bundle.plain_files import open_plain
from domainbed_sfp.leaderboard.documents.problems import Problem


@dataclass
class Tree:
    """The files of a bundle by their names in it, with their SHA-256, and what must not be there. `is_refused`: there
    is too much of it, and nothing was read."""

    root: Path
    sums: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    is_refused: bool = False

    def names(self, folder: str) -> list[str]:
        """The files below `folder`, sorted."""
        return sorted(name for name in self.sums if name.startswith(folder + "/"))

    def read(self, name: str) -> bytes:
        """The contents of a file that `sums` names. Raises OSError if it has changed since."""
        data = b"".join(_chunks(self.root / name, limit_of(name) or 0))
        self._expect(name, hashlib.sha256(data))
        return data

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of such a file, one in memory at a time. One that is longer than LONGEST_LINE is cut behind it and
        is the last. Raises OSError at the end if the file has changed since."""
        digest = hashlib.sha256()
        with open_plain(self.root / name) as file:
            while line := file.readline(layout.LONGEST_LINE + 1):
                digest.update(line)
                yield line
                if not line.endswith(b"\n"):
                    while rest := file.read(CHUNK):
                        digest.update(rest)
        self._expect(name, digest)

    def _expect(self, name: str, digest: Any) -> None:
        if digest.hexdigest() != self.sums[name]:
            raise OSError(f"{name} has changed while the bundle was read")


def read_tree(root: Path) -> Tree:
    """Looks through a bundle's folder without following a link; every file is hashed once, but none before the sizes of
    all are known to be within bounds.

    Raises OSError where the folder itself cannot be read.
    """
    tree = Tree(root)
    sizes: dict[str, int] = {}
    for count, (name, entry) in enumerate(_walk(root, "")):
        if count == layout.MOST_FILES:
            tree.problems.append(Problem(str(root), "", f"at most {layout.MOST_FILES:,} files", "more"))
            tree.is_refused = True
            return tree
        limit, status = limit_of(name), entry.stat(follow_symlinks=False)
        if entry.is_symlink():
            tree.problems.append(Problem(name, "", "a plain file", "a symbolic link"))
        elif stat.S_ISDIR(status.st_mode):
            tree.problems.append(Problem(name, "", LAYOUT, "a folder"))
        elif not stat.S_ISREG(status.st_mode):
            tree.problems.append(Problem(name, "", "a plain file", "a device, pipe or socket"))
        elif limit is None:
            tree.problems.append(Problem(name, "", LAYOUT, "a file that does not belong there"))
        elif status.st_nlink > 1:
            tree.problems.append(Problem(name, "", "a file of its own", "a hard link to a file elsewhere"))
        elif status.st_size > limit:
            tree.problems.append(Problem(name, "", f"at most {limit:,} bytes", f"{status.st_size:,}"))
        else:
            sizes[name] = status.st_size
    for folder, most in ((RECORDS, layout.LARGEST_RECORDS), ("", layout.LARGEST_BUNDLE)):
        size = sum(size for name, size in sizes.items() if name.startswith(folder))
        if size > most:
            words = f"at most {most:,} bytes in all files together"
            tree.problems.append(Problem(folder or str(root), "", words, f"{size:,}"))
            tree.is_refused = True
    for name in () if tree.is_refused else sizes:
        try:
            digest = hashlib.sha256()
            for chunk in _chunks(root / name, limit_of(name) or 0):
                digest.update(chunk)
            tree.sums[name] = digest.hexdigest()
        except OSError as error:
            tree.problems.append(Problem(name, "", "a file that can be read", str(error.strerror or error)))
    return tree


# What SHA256SUMS cannot name.
_UNLISTED = (SUMS, SIGNATURE)


def sums_text(sums: Mapping[str, str]) -> str:
    """SHA256SUMS of files by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()) if name not in _UNLISTED)


def check_sums(tree: Tree) -> Iterator[Problem]:
    """Where SHA256SUMS and the files disagree."""
    if SUMS not in tree.sums:
        yield Problem(SUMS, "", "the sums of all files", "nothing")
        return
    listed: dict[str, str] = {}
    lines = tree.read(SUMS).decode("utf-8", "replace").split("\n")
    if lines.pop():
        yield Problem(SUMS, f"line {len(lines) + 1}", "a line that ends", "the end of the file")
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None:
            yield Problem(SUMS, f"line {number}", "64 hexadecimal digits, two spaces and a name", repr(line[:120]))
        elif limit_of(match[2]) is None or match[2] in _UNLISTED:
            yield Problem(SUMS, f"line {number}", f"the name of a file of the bundle ({LAYOUT})", repr(match[2][:120]))
        elif match[2] in listed:
            yield Problem(SUMS, f"line {number}", "each file only once", f"{match[2]} again")
        else:
            listed[match[2]] = match[1]
    for name, digest in listed.items():
        if name not in tree.sums:
            yield Problem(name, "", "a file, because SHA256SUMS names it", "none")
        elif tree.sums[name] != digest:
            yield Problem(name, "SHA-256", f"{digest} (SHA256SUMS)", tree.sums[name])
    for name in sorted(set(tree.sums) - set(listed) - {*_UNLISTED}):
        yield Problem(name, "SHA-256", "a line in SHA256SUMS", "none")


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything in a folder, by its name in the bundle; only the folders of the layout are entered."""
    with os.scandir(folder) as found:
        for entry in sorted(islice(found, layout.MOST_FILES + 1), key=lambda entry: entry.name):
            name = prefix + entry.name
            if name in (RECORDS, MASKS, MODELS) and entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, name + "/")
            else:
                yield name, entry


def _chunks(path: Path, limit: int) -> Iterator[bytes]:
    """A plain file's contents; OSError behind `limit` bytes, whatever its size was a moment ago."""
    total = 0
    with open_plain(path) as file:
        while chunk := file.read(CHUNK):
            total += len(chunk)
            if total > limit:
                raise OSError(f"{path} has more than {limit:,} bytes")
            yield chunk
