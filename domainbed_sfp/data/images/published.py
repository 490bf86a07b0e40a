"""How a folder of images compares with a published data set: names of domains and classes, and numbers of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from domainbed_sfp.core.errors import look_alike, spelled
from domainbed_sfp.data.images.contents import subfolders
from domainbed_sfp.data.images.layout import LAYOUT, listed, split_folders, wrapped_in

_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageTree:
    """A data set of the layout FOLDER/DOMAIN/CLASS/IMAGE and how many images it is known to have."""

    folder: str
    classes: tuple[str, ...]
    # None where only the total is published.
    domain_images: Mapping[str, int | None]
    # domain -> class -> images, where published.
    class_images: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # Published sizes of the whole where they differ, DomainBed's paper first. Fewer images than the smallest
    # are an error, a number that differs from the paper's is worth a note.
    totals: tuple[int, ...] = ()
    # What copies in circulation call a folder -> its name here. Both must sort to the same place: labels are positions.
    synonyms: Mapping[str, str] = field(default_factory=dict)
    # total -> domain -> images, where a version of this total is known by its domains.
    domain_images_of: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def renamed(self, images: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """Numbers of images by domain and class, by their names here."""
        return {domain: self._by_own_names(classes) for domain, classes in self._by_own_names(images).items()}

    def _by_own_names(self, found: Mapping[str, _T]) -> dict[str, _T]:
        """`found` by our names; a synonym beside what it stands for stays, as one folder too many."""
        own = {name: self.synonyms.get(name, name) for name in found}
        return {name if own[name] != name and own[name] in found else own[name]: value for name, value in found.items()}

    def images_in(self, domain: str, total: int) -> int | None:
        """Images of a domain where all domains have `total`; None where that is not known."""
        return self.domain_images_of.get(total, self.domain_images).get(domain)


def tree_problems(tree: ImageTree, counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Everything in which images, counted by domain and class, differ from the published ones: what verification says,
    a line each."""
    counts = tree.renamed(counts)
    total = sum(sum(classes.values()) for classes in counts.values())
    for domain in tree.domain_images:
        expected = tree.images_in(domain, total)
        if domain not in counts:
            wanted = f" ({expected:,} images expected)" if expected is not None else ""
            yield f"{domain}: the domain's folder is missing{wanted}"
            continue
        yield from _domain_problems(tree, domain, counts[domain], expected)
    for domain in counts:
        if domain not in tree.domain_images:
            # Environments are numbered by the sorted folders, so one more shifts their numbers.
            yield f"{domain}: unexpected folder (the domains are {', '.join(tree.domain_images)})"
    if tree.totals and total < min(tree.totals):
        yield f"all domains: expected at least {min(tree.totals):,} images, found {total:,}"


def _domain_problems(tree: ImageTree, domain: str, counts: Mapping[str, int], total: int | None) -> Iterator[str]:
    if splits := split_folders(counts):
        yield f"{domain}: its class folders look like splits ({listed(splits)}), {LAYOUT} is expected"
    by_class = tree.class_images.get(domain, {})
    for name in tree.classes:
        expected = by_class.get(name)
        wanted = f" ({expected:,} images expected)" if expected is not None else ""
        if name not in counts:
            yield f"{domain}/{name}: the class's folder is missing{wanted}"
        elif expected is not None and counts[name] != expected:
            yield f"{domain}/{name}: expected {expected:,} images, found {counts[name]:,}"
        elif counts[name] == 0:
            yield f"{domain}/{name}: the class has no image"
    for name in counts:
        if name not in tree.classes:
            # Labels are numbered by the sorted folders, so one more shifts them.
            unlike = f" ({name!a})" if any(look_alike(name, each) for each in tree.classes) else ""
            yield f"{domain}/{name}: unexpected folder{unlike}"
    found = sum(counts.get(name, 0) for name in tree.classes)
    if not by_class and total is not None and found != total:
        yield f"{domain}: expected {total:,} images, found {found:,}"


def unlike_published(tree: ImageTree, images: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Where images differ from the published ones, in a few words each: what training says. Empty where they agree.

    Args:
        images: numbers by domain and class. Domains are compared in sorted order, in which environments are numbered.
    """
    images = tree.renamed(images)
    found = {domain: sum(classes.values()) for domain, classes in images.items()}
    differences = []
    if set(images) != set(tree.domain_images):
        differences.append(f"domains called {', '.join(images)}, not {', '.join(tree.domain_images)}")
    for (domain, classes), name in zip(sorted(images.items()), sorted(tree.domain_images)):
        expected, by_class = tree.images_in(name, sum(found.values())), tree.class_images.get(name)
        if expected is not None and found[domain] != expected:
            differences.append(f"{domain} has {found[domain]:,} images of {expected:,}")
        elif by_class and set(classes) == set(by_class) and dict(classes) != by_class:
            differences.append(f"{domain} has other numbers of images in its classes")
    total = sum(found.values())
    if tree.totals and total < min(tree.totals):
        differences.append(f"{total:,} images of {min(tree.totals):,}")
    return [*differences, *_unlike_classes(tree, images)]


def _unlike_classes(tree: ImageTree, images: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    by_classes: dict[frozenset[str], list[str]] = {}
    for domain, classes in images.items():
        if set(classes) != set(tree.classes):
            by_classes.setdefault(frozenset(classes), []).append(domain)
    for names, domains in by_classes.items():
        where = "every domain" if len(domains) == len(images) else listed(domains)
        if len(names) != len(tree.classes):
            yield f"{len(names)} classes in {where} ({listed(sorted(names))}) of {len(tree.classes)}"
        else:
            other, missing = sorted(names - set(tree.classes))[0], sorted(set(tree.classes) - names)
            yield f"class {spelled(other, missing)} in {where}, and no {missing[0]!r}"


def layout_hint(tree: ImageTree, root: Path) -> str:
    """What a folder seems to be that does not hold the domains of `tree`, and what to do; empty where unknown."""
    domains, found = set(tree.domain_images), subfolders(root)
    if splits := split_folders(found):
        return f"; they look like splits ({listed(splits)}): merge them, {LAYOUT} is expected"
    if set(found) & set(tree.classes) and any(domains & set(subfolders(root / name)) for name in found):
        return f"; its levels are swapped, {LAYOUT} is expected"
    if (inner := wrapped_in(root, domains)) is not None:
        return f"; they are in {inner.name!r}: move them a level up"
    if extra := [name for name in found if name not in domains and domains < set(found)]:
        return f"; move {listed([repr(name) for name in extra])} elsewhere"
    return ""
