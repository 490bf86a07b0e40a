"""Whether a folder of images is laid out as `<environment>/<class>/<image>`, and what it seems to be otherwise."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from domainbed_sfp.core.errors import UserError, did_you_mean, look_alike, spelled
from domainbed_sfp.data.images.contents import IMAGE_EXTENSIONS, Contents, subfolders

LAYOUT = "<environment>/<class>/<image>"

_TRAINING = "train|training|trn|trainval|train_val"
_HELD_OUT = "val|valid|validation|dev|test|testing|tst|eval|evaluation|holdout|held_?out|query|gallery"
_OTHER = "unlabell?ed|labell?ed|extra|all|full"
# "Train", "01_val", "test2017", "train-images", "testset": a split's name with what is often put around it.
_SPLIT = r"(\d+[-_. ]*)?({})[-_. ]*(set|split|data|images?|imgs?|x)?[-_. ]*\d*"


def split_folders(names: Iterable[str]) -> list[str]:
    """Those of `names` that are splits of one data set, such as train and val; empty where the names are no splits.

    A class may be called "train": it takes a training split and a held-out one, or names that are all splits.
    """
    names = list(names)

    def matching(words: str) -> list[str]:
        return [name for name in names if re.fullmatch(_SPLIT.format(words), name.lower())]

    training, held_out, splits = matching(_TRAINING), matching(_HELD_OUT), matching(f"{_TRAINING}|{_HELD_OUT}|{_OTHER}")
    return splits if (training and held_out) or (len(splits) == len(names) > 1) else []


def check_classes(contents: Contents, dataset: str) -> list[str]:
    """The names of the classes, sorted: labels are their positions.

    Raises:
        UserError: where an environment has no class or a class no image, environments disagree on their classes, there
            is but one class, or the classes look like splits.
    """
    for environment, classes in contents.environments.items():
        folder = contents.root / environment
        if splits := split_folders(classes):
            raise UserError(
                f"{dataset}: the class folders in {str(folder)!r} look like splits ({listed(splits)}); expected "
                f"{LAYOUT}: move the class folders of all splits into {environment!r}"
            )
        if not classes:
            raise UserError(f"environment folder {str(folder)!r} holds no class folder{_beside(contents)}")
        for name, files in classes.items():
            if not files:
                raise UserError(
                    f"class folder {str(folder / name)!r} holds no image ({', '.join(IMAGE_EXTENSIONS)})"
                    f"{_beside(contents)}; add images or remove the folder from every environment"
                )
    _check_agreement(contents)
    names = sorted(next(iter(contents.environments.values())))
    if len(names) < 2:
        first = next(iter(contents.environments))
        inside = subfolders(contents.root / first / names[0])
        hint = f"; the classes seem to lie a level deeper ({listed(inside)})" if len(inside) > 1 else ""
        raise UserError(
            f"{dataset}: expected two or more class folders in every environment ({LAYOUT}), found one, "
            f"{names[0]!r}{hint}"
        )
    return names


def _check_agreement(contents: Contents) -> None:
    first, *others = contents.environments
    for other in others:
        for here, there in ((first, other), (other, first)):
            theirs = contents.environments[there]
            missing = [name for name in contents.environments[here] if name not in theirs]
            if not missing:
                continue
            name = missing[0]
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            message = (
                f"environments disagree on their classes: {spelled(name, theirs)} is in {str(contents.root / here)!r} "
                f"but not in {str(contents.root / there)!r}{more}"
            )
            if any(look_alike(name, each) for each in theirs):
                raise UserError(f"{message}{did_you_mean(name, theirs)} (they look alike; rename one of the folders)")
            free = [each for each in theirs if each not in contents.environments[here]]
            raise UserError(message + did_you_mean(name, free))


def remarks(contents: Contents, dataset: str) -> list[str]:
    """What a user should know before a run, a line each: what is left out, and a layout that may be another one."""
    lines = []
    if splits := split_folders(contents.environments):
        lines.append(
            f"warning: {dataset}: the environments look like splits of one domain ({listed(splits)}): expected {LAYOUT}"
        )
    paths = (file.path.relative_to(contents.root) for file in contents.files())
    if (example := next(paths, None)) and all(len(path.parts) > 3 for path in itertools.chain([example], paths)):
        lines.append(
            f"warning: {dataset}: all images lie deeper than {LAYOUT}, as {example.as_posix()!r} does; the classes are "
            f"{listed(next(iter(contents.environments.values())))}"
        )
    classes = sorted({name for each in contents.environments.values() for name in each})
    for kind, names in (("environments", list(contents.environments)), ("classes", classes)):
        for one, other in itertools.combinations(names, 2):
            if look_alike(one, other):
                lines.append(f"warning: {dataset}: the {kind} {one!a} and {other!a} look alike, but are two folders")
    if contents.left_out:
        lines.append(f"{dataset}: {contents.left_out}")
    return lines


def wrapped_in(root: Path, wanted: Collection[str] = ()) -> Path | None:
    """The one folder in `root` that seems to hold the environments in its place: the only one, or the one with all of
    the `wanted` folders; None where there is none."""
    children = [root / name for name in subfolders(root)]
    if wanted:
        return next((child for child in children if set(wanted) <= set(subfolders(child))), None)
    if len(children) != 1 or len(inner := subfolders(children[0])) < 2:
        return None
    return children[0] if all(subfolders(children[0] / name) for name in inner) else None


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and dots where there are more."""
    names = list(names)
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def _beside(contents: Contents) -> str:
    return f" ({contents.left_out})" if contents.left_out else ""
