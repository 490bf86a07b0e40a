"""Sets of photographs, drawings and sketches in DomainBed's layout: `<root>/<environment>/<class>/<image>`.

Folders of environments and classes whose names begin with a dot are skipped: they are a tool's, such as
`.ipynb_checkpoints`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from domainbed_sfp.data.base import Dataset, Environment, dataset
from domainbed_sfp.data.cache import cached_images
from domainbed_sfp.data.verify import image_tree, unlike_published
from domainbed_sfp.errors import UserError
from domainbed_sfp.hparams import AT_LEAST_ONE, Hparam

# torchvision's, by which its ImageFolder (and so DomainBed) tells images from other files.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Pixels; 227 px PACS at 224 px input is cropped from its own size.
CROP_SIDE_LIMIT = 288


class ImageFolders(Dataset):
    """Base: environments are the sorted folders of the root, classes the sorted folders of an environment."""

    FOLDER: ClassVar[str] = ""
    CHECKPOINT_FREQ = 300

    @classmethod
    def build(cls, data_dir: str | None, hparams: Mapping[str, Any], seed: int, cache_dir: Path | None) -> Dataset:
        environments, classes = cls.photographs(data_dir, hparams, cache_dir)
        return cls(environments, classes, hparams["data_augmentation"])

    @classmethod
    def photographs(
        cls, data_dir: str | None, hparams: Mapping[str, Any], cache_dir: Path | None, one_crop_side: bool = False
    ) -> tuple[list[Environment], int]:
        """The environments as they lie on disk, in the cache, and the number of classes; arguments as in `build`.

        one_crop_side: copies that crops are cut from have the same side in all environments, that of the largest file.
        """
        size, augment = hparams["image_size"], hparams["data_augmentation"]
        if size < 8:
            raise UserError(f"hparam 'image_size': expected at least 8 pixels, got {size}")
        files = {folder: _files_by_class(folder) for folder in cls.environment_folders(cls.root(data_dir))}
        classes = _common_classes(files)
        paths = {folder: [path for name in classes for path in by_class[name]] for folder, by_class in files.items()}
        stored = {folder: cached_images(paths[folder], folder, size, cache_dir) for folder in files}
        largest = {folder: int(sizes.max()) for folder, (_, sizes) in stored.items()}
        environments = []
        for folder, (images, sizes) in stored.items():
            labels = torch.tensor([index for index, name in enumerate(classes) for _ in files[folder][name]])
            crop_side = _crop_side(size, max(largest.values()) if one_crop_side else largest[folder])
            larger = None
            if augment and crop_side > size:
                larger, _ = cached_images(paths[folder], folder, crop_side, cache_dir)
            environments.append(Environment(folder.name, images, labels, larger, torch.from_numpy(sizes)))
        return environments, len(classes)

    @classmethod
    def check_files(cls, data_dir: str | None) -> None:
        cls.environment_folders(cls.root(data_dir))

    @classmethod
    def data_digest(cls, data_dir: str | None) -> str | None:
        """Of the names and sizes of all images where they are not the published ones, as in an incomplete copy."""
        return cls.digest_of_files(data_dir) if cls.differences(data_dir) else None

    @classmethod
    def differences(cls, data_dir: str | None) -> list[str]:
        if image_tree(cls.__name__) is None:
            return []
        folders = cls.environment_folders(cls.root(data_dir))
        counts = {
            folder.name: [len(paths) for _, paths in sorted(_files_by_class(folder).items())] for folder in folders
        }
        return unlike_published(cls.__name__, counts)

    @classmethod
    def digest_of_files(cls, data_dir: str | None) -> str:
        """Of the names and sizes of all images: 16 hexadecimal digits."""
        root, digest = cls.root(data_dir), hashlib.sha256()
        for folder in cls.environment_folders(root):
            for paths in _files_by_class(folder).values():
                for path in paths:
                    size = path.stat().st_size if path.exists() else -1  # a broken link is told of when it is read
                    digest.update(f"{path.relative_to(root).as_posix()}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    @classmethod
    def root(cls, data_dir: str | None) -> Path:
        """The folder that holds the environments; a UserError if it is not there."""
        if data_dir is None:
            raise UserError(
                f"{cls.__name__} needs --data_dir: the folder that holds {cls.FOLDER or 'the environments'}"
            )
        root = Path(data_dir) / cls.FOLDER
        if not root.is_dir():
            hint = f"; get it with: domainbed-sfp download {cls.__name__} --data_dir {data_dir}"
            known = image_tree(cls.__name__) is not None
            raise UserError(f"{cls.__name__}: there is no folder {str(root)!r}{hint * known}")
        return root

    @classmethod
    def environment_folders(cls, root: Path) -> list[Path]:
        """Folders of the environments in DomainBed's order; a UserError if their number is not the data set's."""
        folders = _subfolders(root)
        found = ", ".join(folder.name for folder in folders) or "none"
        if cls.ENVIRONMENTS is not None and len(folders) != len(cls.ENVIRONMENTS):
            raise UserError(
                f"{cls.__name__}: expected {len(cls.ENVIRONMENTS)} environment folders in {str(root)!r} "
                f"({', '.join(cls.ENVIRONMENTS)}), found {len(folders)}: {found}"
            )
        if len(folders) < 2:
            raise UserError(f"{cls.__name__}: expected two or more environment folders in {str(root)!r}, found {found}")
        return folders


def _crop_side(size: int, largest: int) -> int:
    """Side at which photographs are kept for training at `size` px, where the largest file measures `largest` px.

    A crop of an image that is already as small as the input is resampled twice and comes out blurred, unlike the images
    of evaluation: from 128 px files at 64 px input it keeps 73-82 % of the neighbouring-pixel differences, from a copy
    at 128 px all of them. Twice the input is enough; beyond CROP_SIDE_LIMIT the disk would pay more than it brings.
    """
    return max(size, min(largest, 2 * size, CROP_SIDE_LIMIT))


def _subfolders(folder: Path) -> list[Path]:
    """Folders in `folder` by name, less the hidden ones, which would shift the numbers of all that follow."""
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted((entry for entry in visible if entry.is_dir()), key=lambda entry: entry.name)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files by class folder, in the order of torchvision's ImageFolder."""
    files: dict[str, list[Path]] = {}
    for class_folder in _subfolders(folder):
        paths = []
        for directory, _, names in sorted(os.walk(class_folder, followlinks=True)):
            paths += [Path(directory) / name for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
        if not paths:
            raise UserError(
                f"class folder {str(class_folder)!r} holds no image ({', '.join(IMG_EXTENSIONS)}); "
                "add images or remove the folder from every environment"
            )
        files[class_folder.name] = paths
    if not files:
        raise UserError(f"environment folder {str(folder)!r} holds no class folder")
    return files


def _common_classes(files: Mapping[Path, Mapping[str, list[Path]]]) -> list[str]:
    """The class names, which must be the same everywhere: labels are their positions."""
    first, *others = files
    for other in others:
        for here, there in ((first, other), (other, first)):
            missing = sorted(set(files[here]) - set(files[there]))
            if missing:
                raise UserError(
                    f"environments disagree on their classes: {missing[0]!r} is in {str(here)!r} "
                    f"but not in {str(there)!r}"
                )
    return sorted(files[first])


@dataset("VLCS")
class VLCS(ImageFolders):
    """Fang, Xu, Rockmore 2013: Caltech101, LabelMe, SUN09, VOC2007; 5 classes, 10,729 images."""

    FOLDER = "VLCS"
    ENVIRONMENTS = ["C", "L", "S", "V"]


@dataset("PACS")
class PACS(ImageFolders):
    """Li et al. 2017: art painting, cartoon, photo, sketch; 7 classes, 9,991 images."""

    FOLDER = "PACS"
    ENVIRONMENTS = ["A", "C", "P", "S"]


@dataset("OfficeHome")
class OfficeHome(ImageFolders):
    """Venkateswara et al. 2017: art, clipart, product, real; 65 classes, 15,588 images."""

    FOLDER = "office_home"
    ENVIRONMENTS = ["A", "C", "P", "R"]


@dataset("OfficeCaltech10")
class OfficeCaltech10(ImageFolders):
    """Gong, Shi, Sha, Grauman 2012: the ten classes that Office-31 (amazon, dslr, webcam) and Caltech-256 share; 2,533
    images. There is no public archive to fetch: images go into `OfficeCaltech10/<environment>/<class>/`."""

    FOLDER = "OfficeCaltech10"
    ENVIRONMENTS = ["A", "C", "D", "W"]


@dataset("TerraIncognita")
class TerraIncognita(ImageFolders):
    """Beery, Van Horn, Perona 2018: four camera-trap locations; 10 classes."""

    FOLDER = "terra_incognita"
    ENVIRONMENTS = ["L100", "L38", "L43", "L46"]


@dataset("DomainNet")
class DomainNet(ImageFolders):
    """Peng et al. 2019: six domains, 345 classes, 586,575 images."""

    FOLDER = "domain_net"
    CHECKPOINT_FREQ = 1000
    ENVIRONMENTS = ["clip", "info", "paint", "quick", "real", "sketch"]
    # DomainBed narrows the batch size of its largest set.
    HPARAMS = {
        "batch_size": Hparam(32, lambda r: int(2 ** r.uniform(3, 5)), "samples per environment", valid=AT_LEAST_ONE)
    }


@dataset("Folder")
class Folder(ImageFolders):
    """A user's own `<data_dir>/<environment>/<class>/*`; environments are named by their folders."""

    @classmethod
    def data_digest(cls, data_dir: str | None) -> str | None:
        """Of all images, always: this name stands for whatever a user has."""
        return cls.digest_of_files(data_dir)

    @classmethod
    def environment_names(cls, data_dir: str | None = None) -> list[str]:
        return cls.ENVIRONMENTS or [folder.name for folder in cls.environment_folders(cls.root(data_dir))]


@dataset("VLCSPartial")
class VLCSPartial(Folder):
    """What can be had of VLCS without LabelMe, in `VLCS_partial/<environment>/<class>/`: Caltech101, images of SUN09,
    VOC2007. Numbers on it are no results on VLCS; tables name the images by a digest."""

    FOLDER = "VLCS_partial"
    ENVIRONMENTS = ["Caltech101", "SUN09", "VOC2007"]
