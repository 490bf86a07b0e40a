"""`domainbed-sfp download DATASET`: fetch, unpack, bring into DomainBed's layout, verify.

Everything happens in a hidden folder beside the target, which is renamed into place only when it has been
verified: a folder with a data set's name is never half written by this command.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import shutil
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from domainbed_sfp.core import crashes, locks, strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.disk import disk_error
from domainbed_sfp.data.download.archives import ArchiveError, unpack
from domainbed_sfp.data.download.transfer import (
    ChecksumError,
    TransferError,
    fetch,
    local_path,
    md5_of,
    progress,
    source_name,
)
from domainbed_sfp.data.download.verify import (
    DATASETS,
    MNIST_FILES,
    dataset_folder,
    dataset_name,
    domain_net_facts,
    folder_problems,
    image_tree,
    left_out,
    shortened,
    summary,
    undecodable,
    verify,
    verify_tree,
)

__all__ = ["add_arguments", "download", "run", "verify", "verify_tree"]

# How deep below an archive's root the folder with the domains is looked for.
SEARCH_DEPTH = 4


@dataclass(frozen=True)
class Archive:
    """A public file: its name, the addresses that have it, best first, and its md5 where published."""

    name: str
    urls: tuple[str, ...]
    md5: str | None = None


def _drive(name: str, file_id: str) -> Archive:
    return Archive(name, (f"https://drive.google.com/uc?id={file_id}",))


def _mnist(name: str, md5: str) -> Archive:
    # torchvision.datasets.MNIST's mirrors and checksums, and the copy TensorFlow's tutorials use.
    hosts = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    )
    return Archive(name, tuple(host + name for host in hosts), md5)


_VISDA = "http://csr.bu.edu/ftp/visda/2019/multi-source"
_LILA = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps"
TERRA_IMAGES, TERRA_ANNOTATIONS = "eccv_18_all_images_sm.tar.gz", "eccv_18_annotations.tar.gz"

# Addresses as in domainbed/scripts/download.py at b93c22a1cfc3, MNIST's apart. No checksums are published
# for the others: there the counts are the check.
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "VLCS": (_drive("VLCS.tar.gz", "1skwblH1_okBwxWxmRsp9_qi15hyPpxg8"),),
    "PACS": (_drive("PACS.zip", "1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd"),),
    "OfficeHome": (_drive("office_home.zip", "1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC"),),
    "TerraIncognita": (
        Archive(TERRA_ANNOTATIONS, (f"{_LILA}/{TERRA_ANNOTATIONS}",)),
        Archive(TERRA_IMAGES, (f"{_LILA}/{TERRA_IMAGES}",)),
    ),
    "DomainNet": (
        Archive("clipart.zip", (f"{_VISDA}/groundtruth/clipart.zip",)),
        Archive("infograph.zip", (f"{_VISDA}/infograph.zip",)),
        Archive("painting.zip", (f"{_VISDA}/groundtruth/painting.zip",)),
        Archive("quickdraw.zip", (f"{_VISDA}/quickdraw.zip",)),
        Archive("real.zip", (f"{_VISDA}/real.zip",)),
        Archive("sketch.zip", (f"{_VISDA}/sketch.zip",)),
    ),
    "MNIST": (
        _mnist("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _mnist("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        _mnist("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        _mnist("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
}

# Where a data set without a public archive comes from.
ORIGINS = {
    "OfficeCaltech10": "the ten classes of Office-31 (Saenko et al. 2010: amazon, dslr, webcam) and Caltech-256",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder that holds the data sets")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="FILE_OR_URL",
        help="a copy of the public archive (all of them where there are several), or a folder with them",
    )
    parser.add_argument("--verify_only", action="store_true", help="count and decode what is there; fetch nothing")
    parser.add_argument("--force", action="store_true", help="replace the folder that is there")


def run(args: argparse.Namespace) -> int:
    """The command: 0 when the data set is complete in the end; raises UserError otherwise."""
    dataset, data_dir = dataset_name(args.dataset), Path(args.data_dir)
    if args.verify_only:
        # Pixels are looked at only where all files are there: a fetch that broke off is told at once.
        problems = verify_tree(dataset, data_dir) or list(undecodable(dataset, data_dir))
        folder = dataset_folder(dataset, data_dir)
        for line in shortened(problems):
            print(line)
        if line := left_out(dataset, folder):
            print(line)
        if problems:
            number = f"{len(problems):,} problem{'s' * (len(problems) > 1)}"
            raise UserError(f"{dataset} in {data_dir} is not complete: {number}")
    else:
        folder = download(dataset, data_dir, args.sources, force=args.force)
    print("\n".join(summary(dataset, folder)))
    print(f"complete: {folder}")
    return 0


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
    archives = _gather(dataset, sources, fetched)
    with _staging(folder) as staging:
        try:
            tree = _arrange(dataset, archives, staging)
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


# Getting the archives -------------------------------------------------------------------------------------


def _gather(dataset: str, sources: list[str], fetched: Path) -> list[Path]:
    """The archives as files on this machine: the public ones, or `sources`."""
    public = ARCHIVES.get(dataset, ())
    if not sources and not public:
        raise UserError(_no_archive(dataset))
    if not sources:
        return [_first_that_works(archive, fetched) for archive in public]
    given = [each for source in sources for each in _expanded(dataset, source)]
    if not public:
        return [fetch(source, fetched, source_name(source).strip(".") or dataset) for source in given]
    by_name = {_plain_name(source_name(source)): source for source in given}
    wanted = {_plain_name(archive.name): archive for archive in public}
    # One archive of any name may hold the whole data set; several must be the public ones, told by name.
    if len(given) == 1 and (len(public) == 1 or _plain_name(source_name(given[0])) not in wanted):
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
    names = {_plain_name(archive.name) for archive in ARCHIVES[dataset]}
    found = sorted(str(each) for each in path.iterdir() if each.is_file() and _plain_name(each.name) in names)
    if not found:
        wanted = ", ".join(archive.name for archive in ARCHIVES[dataset])
        raise UserError(f"the folder {path} has none of {dataset}'s archives: {wanted}")
    return found


def _plain_name(name: str) -> str:
    """A file name to compare: MNIST's files go by `...-idx3-ubyte` and `....idx3-ubyte`, packed or not."""
    return name.removesuffix(".gz").replace(".idx", "-idx") if "-ubyte" in name else name


# Bringing them into DomainBed's layout --------------------------------------------------------------------


def _arrange(dataset: str, archives: list[Path], staging: Path) -> Path:
    """Unpacks the archives below `staging` and returns the folder that is the data set."""
    if dataset == "MNIST":
        return _arrange_mnist(archives, staging)
    if dataset == "TerraIncognita" and len(archives) == 2:
        return _arrange_terra_incognita(archives[0], archives[1], staging)
    unpacked = staging / "unpacked"
    unpacked.mkdir()
    for archive in archives:
        _unpack(archive, unpacked)
    tree = _folder_with_domains(dataset, unpacked)
    if dataset == "DomainNet":
        for duplicate in domain_net_facts()[1]:
            (tree / duplicate).unlink(missing_ok=True)
    return tree


def _unpack(archive: Path, destination: Path, keep: Callable[[PurePosixPath], bool] | None = None) -> None:
    destination.mkdir(exist_ok=True)
    done = 0
    with progress(f"unpacking {archive.name}") as report:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done, None)

        unpack(archive, destination, keep=keep, advance=advance)


def _folder_with_domains(dataset: str, unpacked: Path) -> Path:
    """The folder that has most of the domains' folders; of several, the one nearest to the root."""
    tree = image_tree(dataset)
    assert tree is not None
    domains = set(tree.domain_images)
    best, most = unpacked, 0
    level = [unpacked]
    for _ in range(SEARCH_DEPTH):
        below: list[Path] = []
        for folder in level:
            children = sorted(child for child in folder.iterdir() if child.is_dir())
            matches = len(domains & {child.name for child in children})
            if matches > most:
                best, most = folder, matches
            below += children
        if most:
            return best
        level = below
    top = ", ".join(sorted(child.name for child in unpacked.iterdir())[:5]) or "nothing"
    raise UserError(f"no folder with {dataset}'s domains ({', '.join(sorted(domains))}) in the archive: {top}")


def _arrange_terra_incognita(annotations: Path, images: Path, staging: Path) -> Path:
    """Sorts the camera traps' images of four locations into location/category folders.

    An image goes into the folder of each of its annotations' categories, as in DomainBed: an image with two
    animals appears twice.
    """
    tree = image_tree("TerraIncognita")
    assert tree is not None
    notes = staging / "annotations"
    _unpack(annotations, notes)
    places = _terra_places(notes, annotations, set(tree.domain_images), set(tree.classes))
    unpacked = staging / "images"

    def is_placed(path: PurePosixPath) -> bool:
        return path.name in places

    _unpack(images, unpacked, is_placed)
    found = {path.name: path for path in unpacked.rglob("*") if path.is_file()}
    lacking = sorted(set(places) - set(found))
    if lacking:
        raise UserError(f"{images.name} lacks {len(lacking):,} of {len(places):,} annotated images, {lacking[0]} first")
    root = staging / "terra_incognita"
    for name, folders in places.items():
        for folder in sorted(folders):
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found[name], root / folder / name)
        found[name].unlink()
    return root


def _terra_places(notes: Path, archive: Path, locations: set[str], categories: set[str]) -> dict[str, set[str]]:
    """File name -> the `location_N/category` folders it belongs to, from all annotation files together."""
    merged: dict[str, list[Any]] = defaultdict(list)
    try:
        for path in sorted(notes.rglob("*.json")):
            for key, entries in strict_json.parse(path.read_text(encoding="utf-8")).items():
                if isinstance(entries, list):
                    merged[key] += entries
        names = {entry["id"]: entry["name"] for entry in merged["categories"]}
        of_image: dict[Any, set[str]] = defaultdict(set)
        for entry in merged["annotations"]:
            of_image[entry["image_id"]].add(names[entry["category_id"]])
        places: dict[str, set[str]] = defaultdict(set)
        for image in merged["images"]:
            location = f"location_{image['location']}"
            if location in locations:
                # Only the last part: a file name from an archive must not lead elsewhere.
                name = PurePosixPath(image["file_name"]).name
                places[name] |= {f"{location}/{each}" for each in of_image[image["id"]] & categories}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArchiveError(archive, f"not in the expected format: {type(error).__name__} {error}") from error
    placed = {name: folders for name, folders in places.items() if folders}
    if not placed:
        raise ArchiveError(archive, f"no annotations of {', '.join(sorted(locations))} in it")
    return placed


def _arrange_mnist(archives: list[Path], staging: Path) -> Path:
    """MNIST/raw with the four plain files, which torchvision and upstream read without unpacking again."""
    if len(archives) == 1:
        unpacked = staging / "unpacked"
        _unpack(archives[0], unpacked)
        archives = sorted(path for path in unpacked.rglob("*") if path.is_file())
    raw = staging / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in archives:
        name = _plain_name(path.name)
        if name in MNIST_FILES:
            _write_plain(path, raw / name)
            found = md5_of(raw / name)
            if found != MNIST_FILES[name].md5:
                raise ArchiveError(path, f"not MNIST's: contents' md5 is {found}, not {MNIST_FILES[name].md5}")
    return raw.parent


def _write_plain(path: Path, target: Path) -> None:
    with path.open("rb") as opened:
        packed = opened.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as source, target.open("wb") as output:
            shutil.copyfileobj(source, output, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ArchiveError(path, f"damaged: {error}") from error


# The folders on the way -----------------------------------------------------------------------------------


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


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m domainbed_sfp.data.download.commands`: the command alone."""
    parser = argparse.ArgumentParser(prog="domainbed-sfp download", description="Fetch and verify a data set.")
    add_arguments(parser)
    return crashes.guarded("domainbed-sfp download", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
