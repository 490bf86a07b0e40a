"""A data set, whole: fetched, unpacked, brought into DomainBed's layout, verified.

Everything happens in a hidden folder beside the target, which is renamed into place only when it has been
verified: a folder with a data set's name is never half written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from domainbed_sfp.core import locks
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.disk import disk_error
from domainbed_sfp.data.download.archives import ArchiveError
from domainbed_sfp.data.download.arrange import arrange
from domainbed_sfp.data.download.gather import gather
from domainbed_sfp.data.download.verify import dataset_folder, dataset_name, folder_problems, shortened


def download(
    dataset: str, data_dir: str | os.PathLike[str], sources: Sequence[str] = (), *, force: bool = False
) -> Path:
    """Puts `dataset` below `data_dir` in DomainBed's layout and returns its folder.

    `sources` are files, addresses or folders to take the archives from; by default the public ones. A
    complete data set that is there stays as it is, unless `force`; an incomplete one is replaced only with
    `force`. Raises UserError, with `data_dir` as before apart from fetched archives in `.downloads`.
    """
    dataset, root = dataset_name(dataset), Path(data_dir)
    folder = dataset_folder(dataset, root)
    fetched = root / ".downloads" / folder.name
    try:
        # Asked before anything is written: a complete data set may well lie on a read-only disk.
        if not force and _already_complete(dataset, folder):
            return folder
        fetched.parent.mkdir(parents=True, exist_ok=True)
        with _alone(dataset, root):
            _remove_abandoned(folder)
            # Another command may have been at it until we got the lock.
            if not force and _already_complete(dataset, folder):
                return folder
            _build(dataset, folder, list(sources), fetched)
    except OSError as error:
        raise disk_error(error, f"putting {dataset} into {root}") from error
    return folder


def _already_complete(dataset: str, folder: Path) -> bool:
    """Whether nothing needs doing; UserError for a folder with other contents: not ours to remove."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    problems = folder_problems(dataset, folder) if folder.is_dir() else ["it is a file"]
    if problems:
        raise UserError(
            f"{folder} exists but is not complete: {'; '.join(shortened(problems))} "
            "(pass --force to replace the folder)"
        )
    return True


def _build(dataset: str, folder: Path, sources: list[str], fetched: Path) -> None:
    archives = gather(dataset, sources, fetched)
    with _staging(folder) as staging:
        try:
            tree = arrange(dataset, archives, staging)
        except ArchiveError as error:
            if error.archive.parent != fetched:
                raise
            # A bad download would be found and be bad again the next time; a user's own file is not touched.
            error.archive.unlink(missing_ok=True)
            raise UserError(f"{error}; the fetched file was removed, so the next try fetches it anew") from error
        problems = folder_problems(dataset, tree)
        if problems:
            names = ", ".join(path.name for path in archives)
            raise UserError(f"{names}: not {dataset} as published: {'; '.join(shortened(problems))}")
        _put_in_place(tree, folder, staging)
    shutil.rmtree(fetched, ignore_errors=True)


@contextlib.contextmanager
def _alone(dataset: str, data_dir: Path) -> Iterator[None]:
    """Holds the lock of this data set in this folder: two commands would write the same partial files."""
    lock = data_dir / ".downloads" / f"{dataset}.lock"
    with locks.hold(lock, 0, f"putting {dataset} into {str(data_dir)!r}"):
        yield


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, so that renaming stays on one disk; removed in the end."""
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.unpacking-", dir=folder.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what a killed command left; nobody else is at it, for we hold the lock."""
    for staging in folder.parent.glob(f".{folder.name}.unpacking-*"):
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(tree: Path, folder: Path, staging: Path) -> None:
    old = staging / "replaced"
    if folder.is_symlink() or folder.exists():
        folder.rename(old)
    try:
        tree.rename(folder)
    except OSError:
        if old.is_symlink() or old.exists():
            old.rename(folder)
        raise
