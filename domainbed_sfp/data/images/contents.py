"""What a folder of images holds, in DomainBed's layout `<root>/<environment>/<class>/<image>`, and what is left out.

Environments, classes and images are found as torchvision's ImageFolder (and so DomainBed) finds them, in its order.
Left out, and counted, is what no one meant to be data: what a tool or a system keeps there (`HIDDEN`), broken links,
links that lead back, files that are empty or may not be read. One scan serves training, verification and the record.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from domainbed_sfp.core.errors import UserError

# torchvision.datasets.folder.IMG_EXTENSIONS.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Names, in lower case, that systems, file servers and file managers give to what they keep for themselves; names that
# begin with a dot are hidden anyway. Only whole names: a class may well be called "#1" or "@home".
HIDDEN = frozenset(
    (
        *("__macosx", "__pycache__", "icon\r", "network trash folder", "temporary items"),
        *("$recycle.bin", "recycler", "system volume information", "found.000", "_vti_cnf"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini"),
        *("lost+found", "~snapshot", "@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "@__thumb"),
        *("#recycle", "#snapshot"),
    )
)

# Why something is left out: the key in a record, and what it is called, one and several.
REASONS = {
    "hidden": ("hidden or system file or folder", "hidden or system files and folders"),
    "extension": ("file of another kind", "files of other kinds"),
    "misplaced": ("image outside the class folders", "images outside the class folders"),
    "empty": ("empty file", "empty files"),
    "unreadable": ("file or folder that cannot be read", "files and folders that cannot be read"),
    "broken_link": ("broken link", "broken links"),
    "repeated_link": ("link to a folder that is counted already", "links to folders that are counted already"),
}


def is_hidden(name: str) -> bool:
    """Whether an entry of this name is a tool's or a system's, at whatever depth: never data."""
    return name.startswith(".") or name.lower() in HIDDEN


def is_image(name: str) -> bool:
    """Whether a file's extension is an image's, in upper or lower case."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


@dataclass
class LeftOut:
    """What of a folder is no part of the data: how many entries by reason (keys of REASONS), and the first of each.

    A hidden folder is one entry, whatever it holds. `kinds` counts the extensions of files of other kinds.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, path: str, root: Path) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, os.path.relpath(path, root))
        if reason == "extension":
            self.kinds[os.path.splitext(path)[1].lower() or "no extension"] += 1

    def as_record(self) -> dict[str, int]:
        """Counts by reason; empty where all there is was taken."""
        return {reason: self.counts[reason] for reason in REASONS if self.counts[reason]}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """One line, as in "left out: 2 empty files (first 'a/cat/1.jpg'), 3 files of other kinds (.gif, .txt)"."""
        parts = []
        for reason, count in self.as_record().items():
            example = f"first {self.first[reason]!r}" if count > 1 else repr(self.first[reason])
            if reason == "extension" and count > 1:
                shown = [kind for kind, _ in self.kinds.most_common(3)]
                example = ", ".join([*shown, "..."] if len(self.kinds) > len(shown) else shown)
            parts.append(f"{count:,} {REASONS[reason][count > 1]} ({example})")
        return f"left out: {', '.join(parts)}"


@dataclass(frozen=True)
class ImageFile:
    """An image's path and its size in bytes."""

    path: Path
    size: int


@dataclass
class Contents:
    """What a folder holds: environment -> class -> images, each in the order that numbers environments, labels and
    samples; `left_out` says what it holds beside them."""

    root: Path
    environments: dict[str, dict[str, list[ImageFile]]] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images by environment and class."""
        return {
            name: {each: len(files) for each, files in classes.items()} for name, classes in self.environments.items()
        }

    def files(self) -> Iterator[ImageFile]:
        """All images in order."""
        for classes in self.environments.values():
            for files in classes.values():
                yield from files

    def digest(self) -> str:
        """Of the names and sizes of all images: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for file in self.files():
            name = file.path.relative_to(self.root).as_posix()
            digest.update(f"{name}\0{file.size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones: the environments of a root, without looking into
    them. Raises UserError where the folder, or a link in it, cannot be read: leaving it out would shift the numbers
    of all environments that follow."""
    names = []
    for entry in _entries(folder):
        if is_hidden(entry.name):
            continue
        if _is_broken(entry) and not os.path.splitext(entry.name)[1]:
            raise UserError(
                f"{entry.path!r} is a link to {os.readlink(entry.path)!r}, which is not there; "
                "without it the environments would be numbered anew: mend the link or remove it"
            )
        if _is_folder(entry):
            names.append(entry.name)
    return names


def scan(root: Path) -> Contents:
    """Everything below `root`. Raises UserError for a folder of an environment, or the root, that cannot be read."""
    return _Scan(root).contents


class _Scan:
    """One scan of a root."""

    def __init__(self, root: Path) -> None:
        self.contents = Contents(root)
        self.root_id = _identity(root)
        environments = subfolders(root)
        self._note_others(root, environments)
        for name in environments:
            folder = root / name
            environment_id = _identity(folder)
            if environment_id == self.root_id:
                self._leave("repeated_link", str(folder))
                continue
            self.contents.environments[name] = self._classes(folder, environment_id)

    def _leave(self, reason: str, path: str) -> None:
        self.contents.left_out.add(reason, path, self.contents.root)

    def _note_others(self, folder: Path, names: list[str]) -> None:
        """Counts what lies beside the folders `names`. Documents do: they are not counted."""
        known = set(names)
        for entry in _entries(folder):
            if entry.name in known:
                continue
            if is_hidden(entry.name):
                self._leave("hidden", entry.path)
            elif _is_broken(entry):
                self._leave("broken_link", entry.path)
            elif is_image(entry.name):
                self._leave("misplaced", entry.path)

    def _classes(self, folder: Path, environment_id: tuple[int, int]) -> dict[str, list[ImageFile]]:
        classes = {}
        names = [entry.name for entry in _entries(folder) if not is_hidden(entry.name) and _is_folder(entry)]
        self._note_others(folder, names)
        for name in names:
            if _identity(folder / name) in (self.root_id, environment_id):
                self._leave("repeated_link", str(folder / name))
            else:
                classes[name] = self._images(str(folder / name), environment_id)
        return classes

    def _images(self, class_folder: str, environment_id: tuple[int, int]) -> list[ImageFile]:
        """The images at any depth below a class folder, in the order of torchvision's ImageFolder, each folder once."""
        seen = {self.root_id, environment_id, _identity(class_folder)}
        found: dict[str, list[ImageFile]] = {}
        # Links are followed after all folders that lie here themselves.
        folders, links = [class_folder], list[str]()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            if folder != class_folder:
                identity = _identity(folder)
                if identity in seen:
                    self._leave("repeated_link", folder)
                    continue
                seen.add(identity)
            found[folder] = []
            try:
                entries = _entries(folder)
            except UserError:
                self._leave("unreadable", folder)
                continue
            for entry in entries:
                if is_hidden(entry.name):
                    self._leave("hidden", entry.path)
                elif _is_folder(entry):
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif (file := self._image(entry)) is not None:
                    found[folder].append(file)
        return [file for folder in sorted(found) for file in found[folder]]

    def _image(self, entry: os.DirEntry[str]) -> ImageFile | None:
        """The image file that an entry is, None where it is left out."""
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                self._leave("broken_link", entry.path)
            elif error.errno in (errno.EACCES, errno.EPERM):
                self._leave("unreadable", entry.path)
            else:
                raise UserError(f"{entry.path!r} cannot be read: {error.strerror}") from error
            return None
        if not is_image(entry.name):
            self._leave("extension", entry.path)
        elif not stat.S_ISREG(status.st_mode) or not os.access(entry.path, os.R_OK):
            self._leave("unreadable", entry.path)
        elif status.st_size == 0:
            self._leave("empty", entry.path)
        else:
            return ImageFile(Path(entry.path), status.st_size)
        return None


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # `entry.is_dir()` raises for a link that leads to itself.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _is_broken(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _identity(folder: str | Path) -> tuple[int, int]:
    """What two paths to one folder have in common."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino
