"""The archives of a data set as files on this machine: the public ones, or a user's."""

from __future__ import annotations

import sys
from pathlib import Path

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.download.recipes import ARCHIVES, ORIGINS, Archive
from domainbed_sfp.data.download.transfer import ChecksumError, TransferError, fetch, local_path, source_name
from domainbed_sfp.data.download.verify import image_tree


def gather(dataset: str, sources: list[str], fetched: Path) -> list[Path]:
    """The archives as files on this machine: the public ones, or `sources`."""
    public = ARCHIVES.get(dataset, ())
    if not sources and not public:
        raise UserError(_no_archive(dataset))
    if not sources:
        return [_first_that_works(archive, fetched) for archive in public]
    given = [each for source in sources for each in _expanded(dataset, source)]
    if not public:
        return [fetch(source, fetched, source_name(source).strip(".") or dataset) for source in given]
    by_name = {plain_name(source_name(source)): source for source in given}
    wanted = {plain_name(archive.name): archive for archive in public}
    # One archive of any name may hold the whole data set; several must be the public ones, told by name.
    if len(given) == 1 and (len(public) == 1 or plain_name(source_name(given[0])) not in wanted):
        return [fetch(given[0], fetched, source_name(given[0]).strip(".") or public[0].name)]
    missing = [archive.name for name, archive in wanted.items() if name not in by_name]
    unknown = [source for name, source in by_name.items() if name not in wanted]
    if missing or unknown:
        wrong = f"--from lacks {', '.join(missing)}" if missing else f"{', '.join(unknown)} is none of them"
        raise UserError(f"{dataset} is made of {len(public)} files: {wrong}")
    return [fetch(by_name[name], fetched, source_name(by_name[name])) for name in wanted]


def _no_archive(dataset: str) -> str:
    """That there is nothing to fetch, what the images are, and where they belong."""
    tree = image_tree(dataset)
    assert tree is not None
    return (
        f"{dataset} ({ORIGINS[dataset]}) has no public archive of known contents; pass a copy with --from, or put the "
        f"images into DATA_DIR/{tree.folder}/<{'|'.join(tree.domain_images)}>/<class>/ and check with --verify_only"
    )


def _first_that_works(archive: Archive, fetched: Path) -> Path:
    for number, url in enumerate(archive.urls, start=1):
        try:
            return fetch(url, fetched, archive.name, md5=archive.md5)
        except (TransferError, ChecksumError) as error:
            if number == len(archive.urls):
                others = f" ({number} addresses tried)" if number > 1 else ""
                raise TransferError(f"{error}{others}; a copy can be passed with --from") from error
            print(f"{error}; trying the next address", file=sys.stderr)
    raise AssertionError(f"{archive.name} has no address")


def _expanded(dataset: str, source: str) -> list[str]:
    """A folder stands for the public archives in it, any other source for itself."""
    path = local_path(source)
    if path is None or not path.is_dir():
        return [source]
    if dataset not in ARCHIVES:
        raise UserError(f"--from {path} is a folder: name the archives in it; {_no_archive(dataset)}")
    names = {plain_name(archive.name) for archive in ARCHIVES[dataset]}
    found = sorted(str(each) for each in path.iterdir() if each.is_file() and plain_name(each.name) in names)
    if not found:
        wanted = ", ".join(archive.name for archive in ARCHIVES[dataset])
        raise UserError(f"the folder {path} has none of {dataset}'s archives: {wanted}")
    return found


def plain_name(name: str) -> str:
    """A file name to compare: MNIST's files go by `...-idx3-ubyte` and `....idx3-ubyte`, packed or not."""
    return name.removesuffix(".gz").replace(".idx", "-idx") if "-ubyte" in name else name
