"""Says what a data set's folder lacks: images per domain and class, against published counts.

Facts only; nothing here downloads or writes. What counts as a domain, a class or an image is what training takes for
one (`images/contents.py`).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.data.disk import disk_error
from domainbed_sfp.data.images.contents import scan
from domainbed_sfp.data.images.published import ImageTree, layout_hint, tree_problems

# Problems told one by one; the rest become a number.
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class IdxFile:
    """A file of the idx format, gzip-compressed or not: its dimensions and the md5 of the plain bytes."""

    dimensions: tuple[int, ...]
    md5: str

    @property
    def size(self) -> int:
        """Bytes of the plain file: magic number, one 32-bit size a dimension, one byte an element."""
        elements = 1
        for length in self.dimensions:
            elements *= length
        return 4 + 4 * len(self.dimensions) + elements


def _by_class(classes: tuple[str, ...], counts: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    return {domain: dict(zip(classes, numbers)) for domain, numbers in counts.items()}


def _counted(
    folder: str,
    classes: tuple[str, ...],
    counts: Mapping[str, tuple[int, ...]],
    synonyms: Mapping[str, str] | None = None,
) -> ImageTree:
    totals = {domain: sum(numbers) for domain, numbers in counts.items()}
    return ImageTree(folder, classes, totals, _by_class(classes, counts), synonyms=synonyms or {})


# DomainBed's own list of VLCS files (domainbed/misc/vlcs_files.txt at b93c22a1cfc3); 10,729 as in its paper.
VLCS = _counted(
    "VLCS",
    ("bird", "car", "chair", "dog", "person"),
    {
        "Caltech101": (237, 123, 118, 67, 870),
        "LabelMe": (80, 1209, 88, 42, 1237),
        "SUN09": (20, 932, 1036, 30, 1264),
        "VOC2007": (330, 699, 428, 420, 1499),
    },
)

# Counted in the public archive's tree; 9,991 and the four domain totals as in Li et al., ICCV 2017.
PACS = _counted(
    "PACS",
    ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
    {
        "art_painting": (379, 255, 285, 184, 201, 295, 449),
        "cartoon": (389, 457, 346, 135, 324, 288, 405),
        "photo": (189, 202, 182, 186, 199, 280, 432),
        "sketch": (772, 740, 753, 608, 816, 80, 160),
    },
)

# Domain totals: the data set's page (hemanthdv.org/OfficeHome-Dataset) and Venkateswara et al., CVPR 2017;
# their sum, 15,588, is DomainBed's. Counts per class are not published, so only the names are checked.
OFFICE_HOME = ImageTree(
    "office_home",
    (
        *("Alarm_Clock", "Backpack", "Batteries", "Bed", "Bike", "Bottle", "Bucket", "Calculator"),
        *("Calendar", "Candles", "Chair", "Clipboards", "Computer", "Couch", "Curtains", "Desk_Lamp"),
        *("Drill", "Eraser", "Exit_Sign", "Fan", "File_Cabinet", "Flipflops", "Flowers", "Folder"),
        *("Fork", "Glasses", "Hammer", "Helmet", "Kettle", "Keyboard", "Knives", "Lamp_Shade"),
        *("Laptop", "Marker", "Monitor", "Mop", "Mouse", "Mug", "Notebook", "Oven", "Pan"),
        *("Paper_Clip", "Pen", "Pencil", "Postit_Notes", "Printer", "Push_Pin", "Radio"),
        *("Refrigerator", "Ruler", "Scissors", "Screwdriver", "Shelf", "Sink", "Sneakers", "Soda"),
        *("Speaker", "Spoon", "TV", "Table", "Telephone", "ToothBrush", "Toys", "Trash_Can"),
        "Webcam",
    ),
    {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
)

# Domain totals, and 8 to 151 images a class and domain: Gong et al., CVPR 2012; counted in a complete copy. Two classes
# and a domain are also known by the names that Office-31 and later copies give them.
OFFICE_CALTECH_10 = _counted(
    "OfficeCaltech10",
    (
        *("backpack", "bike", "calculator", "headphones", "keyboard"),
        *("laptop", "monitor", "mouse", "mug", "projector"),
    ),
    {
        "amazon": (92, 82, 94, 99, 100, 100, 99, 100, 94, 98),
        "caltech10": (151, 110, 100, 138, 85, 128, 133, 94, 87, 97),
        "dslr": (12, 21, 12, 13, 10, 24, 22, 12, 8, 23),
        "webcam": (29, 21, 31, 27, 27, 30, 43, 30, 27, 30),
    },
    {"back_pack": "backpack", "laptop_computer": "laptop", "caltech": "caltech10"},
)

# Locations and categories: domainbed/scripts/download.py at b93c22a1cfc3. Totals: DomainBed's paper, and what
# users count in today's archive (khanrc/miro issue 9, after DomainBed issue 58); its four locations as papers that
# used it state them.
TERRA_INCOGNITA = ImageTree(
    "terra_incognita",
    ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"),
    dict.fromkeys(("location_100", "location_38", "location_43", "location_46")),
    totals=(24_788, 24_330),
    domain_images_of={
        24_330: {"location_100": 4_741, "location_38": 9_736, "location_43": 3_970, "location_46": 5_883}
    },
)

# Domain totals: the clipart, infograph, ... archives of ai.bu.edu/M3SDA (48,833, 53,201, 75,759, 172,500,
# 175,327 and 70,386 images) less the duplicates listed in domain_net.txt; the sum is the 586,575 of
# DomainBed's paper. Class names: domain_net.txt. Counts per class are left out: only totals are published.
DOMAIN_NET_IMAGES = {
    "clipart": 48_129,
    "infograph": 51_605,
    "painting": 72_266,
    "quickdraw": 172_500,
    "real": 172_947,
    "sketch": 69_128,
}

# Dimensions: yann.lecun.com/exdb/mnist. md5 of the plain bytes, because copies are often recompressed.
MNIST_FOLDER = "MNIST"
MNIST_FILES = {
    "train-images-idx3-ubyte": IdxFile((60_000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": IdxFile((60_000,), "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": IdxFile((10_000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": IdxFile((10_000,), "27ae3e4e09519cfbb04c329615203637"),
}

DATASETS = ("VLCS", "PACS", "OfficeHome", "OfficeCaltech10", "TerraIncognita", "DomainNet", "MNIST")
# Data sets made from another's files when they are loaded.
MADE_OF = {
    **dict.fromkeys(("ColoredMNIST", "RotatedMNIST", "FullColoredMNIST", "TexturedMNIST"), "MNIST"),
    "StampedPACS": "PACS",
}


@cache
def domain_net_facts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """DomainNet's class names, sorted, and the duplicates' paths `DOMAIN/CLASS/FILE`, from domain_net.txt."""
    names, duplicates = [], []
    for line in (Path(__file__).parent / "domain_net.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        index, name, *groups = line.split()
        names.append(name)
        for group in groups:
            domain, _, numbers = group.partition(":")
            duplicates += [f"{domain}/{name}/{domain}_{index}_{int(number):06d}.jpg" for number in numbers.split(",")]
    return tuple(sorted(names)), tuple(duplicates)


def image_tree(dataset: str) -> ImageTree | None:
    """The layout and counts of `dataset`, None for MNIST."""
    if dataset == "DomainNet":
        return ImageTree("domain_net", domain_net_facts()[0], DOMAIN_NET_IMAGES)
    trees = {
        **{"VLCS": VLCS, "PACS": PACS, "OfficeHome": OFFICE_HOME, "TerraIncognita": TERRA_INCOGNITA},
        "OfficeCaltech10": OFFICE_CALTECH_10,
    }
    return trees.get(dataset)


def dataset_name(given: str) -> str:
    """The name under which `given` is kept on disk (RotatedMNIST needs MNIST); UserError when unknown."""
    name = MADE_OF.get(given, given)
    if name not in DATASETS:
        raise unknown_name("data set", given, (*DATASETS, *MADE_OF))
    return name


def dataset_folder(dataset: str, data_dir: Path) -> Path:
    """Where DomainBed looks for `dataset` below `data_dir`."""
    tree = image_tree(dataset)
    return data_dir / (tree.folder if tree else MNIST_FOLDER)


def verify_tree(dataset: str, data_dir: str | os.PathLike[str]) -> list[str]:
    """What is wrong with `dataset` below `data_dir`, a line each; empty when all is there.

    Raises UserError for an unknown data set or a folder that cannot be read.
    """
    dataset, root = dataset_name(dataset), Path(data_dir)
    folder = dataset_folder(dataset, root)
    if not root.is_dir():
        return [f"the folder {root} does not exist"]
    if not folder.is_dir():
        return [f"the folder {folder} does not exist{_parent_hint(dataset, root)}"]
    return folder_problems(dataset, folder)


def verify(dataset: str, data_dir: str | os.PathLike[str]) -> None:
    """Raises UserError, in one line, when `dataset` below `data_dir` is not as published."""
    problems = verify_tree(dataset, data_dir)
    if problems:
        listed = "; ".join(shortened(problems))
        name = dataset_name(dataset)
        raise UserError(
            f"{name} is not complete: {listed} (to fetch it: domainbed-sfp download {name} --data_dir {data_dir})"
        )


def shortened(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more:,} more"]


def folder_problems(dataset: str, folder: Path) -> list[str]:
    """What is wrong with the files of `dataset` in `folder`, whatever that folder is called."""
    try:
        tree = image_tree(dataset)
        if tree is None:
            return list(_mnist_problems(folder))
        problems = list(tree_problems(tree, count_images(folder)))
        if problems and (hint := layout_hint(tree, folder)):
            problems.insert(0, f"{folder.name}: not laid out as published{hint}")
        return problems
    except OSError as error:
        raise disk_error(error, f"reading {folder}") from error


def count_images(folder: Path) -> dict[str, dict[str, int]]:
    """Images by domain and class below `folder`, in sorted order."""
    return scan(folder).counts()


def left_out(dataset: str, folder: Path) -> str:
    """One line on what in the data set's folder is no part of it; empty where nothing is."""
    found = scan(folder).left_out if image_tree(dataset) and folder.is_dir() else None
    return str(found) if found else ""


def undecodable(dataset: str, data_dir: str | os.PathLike[str]) -> Iterator[str]:
    """The files of `dataset` below `data_dir` whose contents training could not use, a line each with the reason."""
    folder = dataset_folder(dataset_name(dataset), Path(data_dir))
    if image_tree(dataset_name(dataset)) is None:
        yield from _other_digits(folder)
        return
    # numpy and PIL are loaded only when pixels are looked at.
    from domainbed_sfp.core.progress import progress
    from domainbed_sfp.data.images.decoding import remarks, told_of, why_undecodable

    files = [file.path for file in scan(folder).files()]
    with remarks() as found, ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = progress(pool.map(why_undecodable, files), len(files), f"decoding {dataset}", "images")
        problems = {file: reason for file, reason in zip(files, reasons) if reason}
    yield from problems.values()
    if doubts := {file: words for file, words in found.items() if file not in problems}:
        warn(told_of(doubts, dataset))


def summary(dataset: str, folder: Path) -> list[str]:
    """What a complete folder holds: a line in all, a line a domain, and a note where versions differ."""
    tree = image_tree(dataset)
    if tree is None:
        return [f"MNIST: 70,000 digits in {len(MNIST_FILES)} files"]
    counts = {domain: sum(classes.values()) for domain, classes in count_images(folder).items()}
    total = sum(counts.values())
    lines = [f"{dataset}: {total:,} images, {len(counts)} domains, {len(tree.classes)} classes"]
    lines += [f"  {domain}: {count:,} images" for domain, count in counts.items()]
    if tree.totals and total != tree.totals[0]:
        known = f"; {tree.totals[1]:,} is what the public archive has held since" * (total in tree.totals)
        lines.append(f"  note: DomainBed's paper counts {tree.totals[0]:,} images{known}")
    return lines


def _mnist_problems(folder: Path) -> Iterator[str]:
    for name, expected in MNIST_FILES.items():
        plain, packed = folder / "raw" / name, folder / "raw" / f"{name}.gz"
        if plain.is_file():
            yield from _idx_problems(plain, plain.stat().st_size, expected)
        elif packed.is_file():
            yield from _idx_problems(packed, _unpacked_size(packed), expected)
        else:
            yield f"raw/{name} (or {name}.gz) is missing ({expected.size:,} bytes expected)"


def _other_digits(folder: Path) -> Iterator[str]:
    for name, expected in MNIST_FILES.items():
        plain = folder / "raw" / name
        path = plain if plain.is_file() else plain.with_name(f"{name}.gz")
        digest = hashlib.md5()
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
                while chunk := opened.read(1 << 20):
                    digest.update(chunk)
        except (OSError, EOFError, zlib.error) as error:
            yield f"raw/{path.name}: damaged ({error})"
        else:
            if digest.hexdigest() != expected.md5:
                yield f"raw/{path.name}: not MNIST's contents (their md5 is {digest.hexdigest()}, not {expected.md5})"


def _idx_problems(path: Path, size: int, expected: IdxFile) -> Iterator[str]:
    # The magic number: two zero bytes, 8 for unsigned bytes, the number of dimensions.
    rank = len(expected.dimensions)
    header = struct.pack(f">{1 + rank}I", 0x800 + rank, *expected.dimensions)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
            found = opened.read(len(header))
    except (gzip.BadGzipFile, EOFError):
        found = b""
    if found != header:
        shape = " x ".join(str(length) for length in expected.dimensions)
        yield f"raw/{path.name}: not an idx file of {shape} bytes"
    elif size != expected.size:
        yield f"raw/{path.name}: expected {expected.size:,} bytes, found {size:,}"


def _unpacked_size(path: Path) -> int:
    """A gzip file's unpacked size, from its last four bytes: no need to unpack 47 MB to see a torn file."""
    with path.open("rb") as opened:
        if path.stat().st_size < 4:
            return 0
        opened.seek(-4, os.SEEK_END)
        return int(struct.unpack("<I", opened.read(4))[0])


def _parent_hint(dataset: str, data_dir: Path) -> str:
    """A hint for the frequent slip of passing the data set's own folder as --data_dir."""
    tree = image_tree(dataset)
    name, inside = (tree.folder, list(tree.domain_images)) if tree else (MNIST_FOLDER, ["raw"])
    if all((data_dir / each).is_dir() for each in inside):
        return f"; {data_dir} itself looks like it: call it {name} and pass its parent folder"
    return ""
