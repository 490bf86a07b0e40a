"""From archives to DomainBed's layout."""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.download.archives import ArchiveError, unpack
from domainbed_sfp.data.download.gather import plain_name
from domainbed_sfp.data.download.transfer import md5_of, progress
from domainbed_sfp.data.download.verify import MNIST_FILES, domain_net_facts, image_tree

# How deep below an archive's root the folder with the domains is looked for.
SEARCH_DEPTH = 4


def arrange(dataset: str, archives: list[Path], staging: Path) -> Path:
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
        name = plain_name(path.name)
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
