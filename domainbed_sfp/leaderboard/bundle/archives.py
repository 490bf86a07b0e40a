"""Bundles where they are kept: a folder, or one file (.tgz or .zip) here or at an address."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.download import archives, transfer
from domainbed_sfp.leaderboard.bundle.layout import CHUNK, LARGEST_BUNDLE, MOST_FILES, SUBMISSION, limit_of


@contextmanager
def opened(where: str | Path) -> Iterator[Path]:
    """The folder of a bundle. A file is unpacked into a folder that lasts as long as the block, and no more of it than
    a bundle may have; a file at an address is fetched first.

    Raises UserError for a file that cannot be had, is no archive, or holds what a bundle does not.
    """
    if not transfer.is_url(str(where)) and not Path(where).is_file():
        yield Path(where)
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = transfer.fetch(str(where), Path(scratch), "bundle")
        folder = Path(scratch) / "unpacked"
        folder.mkdir()
        try:
            _unpack(file, folder, str(where))
        except archives.DAMAGED as error:
            raise UserError(f"{where}: damaged ({error or type(error).__name__})") from error
        yield folder


def _unpack(file: Path, folder: Path, where: str) -> None:
    """The files of an archive, which may hold them in a folder, as `tar czf bundle.tgz bundle` does."""
    total, top = 0, None
    for count, member in enumerate(archives.members(file)):
        parts = PurePosixPath(member.path).parts
        if top is None:
            top = 0 if limit_of("/".join(parts)) is not None else 1
        name = "/".join(parts[top:])
        limit = limit_of(name)
        if limit is None or count == MOST_FILES:
            raise UserError(f"{where}: expected a bundle with {SUBMISSION}, found {str(member.path)[:120]!r} in it")
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        size = 0
        with member.open() as source, open(target, "xb") as out:
            while chunk := source.read(CHUNK):
                size, total = size + len(chunk), total + len(chunk)
                if size > limit or total > LARGEST_BUNDLE:
                    raise UserError(f"{where}: {name}: expected at most {limit:,} bytes, and {LARGEST_BUNDLE:,} in all")
                out.write(chunk)
