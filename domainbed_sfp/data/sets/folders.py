"""Sets of photographs, drawings and sketches in DomainBed's layout: `<root>/<environment>/<class>/<image>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import AT_LEAST_ONE, Hparam
from domainbed_sfp.data.base import Dataset, Environment, dataset
from domainbed_sfp.data.download.verify import image_tree
from domainbed_sfp.data.images import layout
from domainbed_sfp.data.images.cache import cached_images
from domainbed_sfp.data.images.contents import Contents, scan, subfolders
from domainbed_sfp.data.images.published import layout_hint, unlike_published

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
        contents = cls.contents(data_dir)
        classes = layout.check_classes(contents, cls.__name__)
        folders = {contents.root / name: by_class for name, by_class in contents.environments.items()}
        paths = {folder: [file.path for name in classes for file in files[name]] for folder, files in folders.items()}
        stored = {folder: cached_images(paths[folder], folder, size, cache_dir) for folder in folders}
        largest = {folder: int(sizes.max()) for folder, (_, sizes) in stored.items()}
        environments = []
        for folder, (images, sizes) in stored.items():
            labels = torch.tensor([index for index, name in enumerate(classes) for _ in folders[folder][name]])
            crop_side = _crop_side(size, max(largest.values()) if one_crop_side else largest[folder])
            larger = None
            if augment and crop_side > size:
                larger, _ = cached_images(paths[folder], folder, crop_side, cache_dir)
            environments.append(Environment(folder.name, images, labels, larger, torch.from_numpy(sizes)))
        return environments, len(classes)

    @classmethod
    def check_files(cls, data_dir: str | None) -> None:
        layout.check_classes(cls.contents(data_dir), cls.__name__)

    @classmethod
    def data_digest(cls, data_dir: str | None) -> str | None:
        """Of the names and sizes of all images where they are not the published ones, as in an incomplete copy."""
        return cls.contents(data_dir).digest() if cls.differences(data_dir) else None

    @classmethod
    def differences(cls, data_dir: str | None) -> list[str]:
        tree = image_tree(cls.__name__)
        return unlike_published(tree, cls.contents(data_dir).counts()) if tree else []

    @classmethod
    def inspect(cls, data_dir: str | None) -> tuple[dict[str, int], list[str]]:
        contents = cls.contents(data_dir)
        return contents.left_out.as_record(), layout.remarks(contents, cls.__name__)

    @classmethod
    def contents(cls, data_dir: str | None) -> Contents:
        """What the folder holds; a UserError if it is not there or has another number of environments."""
        root = cls.root(data_dir)
        cls.environment_folders(root)
        return scan(root)

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
        names = subfolders(root)
        found = layout.listed(names, 10) or "none"
        tree = image_tree(cls.__name__)
        if cls.ENVIRONMENTS is not None and len(names) != len(cls.ENVIRONMENTS):
            expected = tree.domain_images if tree else cls.ENVIRONMENTS
            raise UserError(
                f"{cls.__name__}: expected {len(expected)} environment folders in {str(root)!r} "
                f"({', '.join(expected)}), found {len(names)}: {found}{layout_hint(tree, root) if tree else ''}"
            )
        if len(names) < 2:
            inner = layout.wrapped_in(root)
            hint = f"; they seem to be in {str(inner)!r}: pass that as --data_dir" if inner and not cls.FOLDER else ""
            raise UserError(
                f"{cls.__name__}: expected two or more environment folders in {str(root)!r}, found {found}{hint}"
            )
        return [root / name for name in names]


def _crop_side(size: int, largest: int) -> int:
    """Side at which photographs are kept for training at `size` px, where the largest file measures `largest` px.

    A crop of an image that is already as small as the input is resampled twice and comes out blurred, unlike the images
    of evaluation: from 128 px files at 64 px input it keeps 73-82 % of the neighbouring-pixel differences, from a copy
    at 128 px all of them. Twice the input is enough; beyond CROP_SIDE_LIMIT the disk would pay more than it brings.
    """
    return max(size, min(largest, 2 * size, CROP_SIDE_LIMIT))


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
        return cls.contents(data_dir).digest()

    @classmethod
    def environment_names(cls, data_dir: str | None = None) -> list[str]:
        return cls.ENVIRONMENTS or [folder.name for folder in cls.environment_folders(cls.root(data_dir))]


@dataset("VLCSPartial")
class VLCSPartial(Folder):
    """What can be had of VLCS without LabelMe, in `VLCS_partial/<environment>/<class>/`: Caltech101, images of SUN09,
    VOC2007. Numbers on it are no results on VLCS; tables name the images by a digest."""

    FOLDER = "VLCS_partial"
    ENVIRONMENTS = ["Caltech101", "SUN09", "VOC2007"]
