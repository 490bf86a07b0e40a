"""Named things that a run can be made of, one registry a kind: algorithms, objectives, data sets, backbones, launchers.

Built-in ones register when the modules of their package are imported. Other packages bring their own through
entry-point groups:

| group | an entry names |
|---|---|
| `domainbed_sfp.algorithms` | a module whose import registers algorithms, `@register` |
| `domainbed_sfp.objectives` | a module whose import registers objectives, `@register_objective` |
| `domainbed_sfp.datasets` | a module whose import registers data sets, `@dataset` |
| `domainbed_sfp.launchers` | a module whose import registers launchers of sweeps, `@launcher` |
| `domainbed_sfp.backbones` | a function (input_shape, pretrained) -> network, images [N, C, H, W] to features [N, D] |

Only what an installed package declares is ever imported, whatever a file of records, a model or a bundle names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError, unknown_name

EntryT = TypeVar("EntryT")


class Registry(Generic[EntryT]):
    """Entries by name.

    Args:
        kind: what one of them is, in words.
        package: whose modules, those of packages in it included, register the built-in ones.
        group: the entry-point group of other packages', without `domainbed_sfp.`.
        declared: makes an entry of what other packages declare, where that is no module which registers it.
        beyond: how a name that is unknown can become one that is known, told where one is.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        group: str,
        declared: Callable[[EntryPoint], EntryT] | None = None,
        beyond: str = "",
    ) -> None:
        self.kind, self.package, self.group, self.declared = kind, package, f"domainbed_sfp.{group}", declared
        self.beyond = beyond
        self.entries: dict[str, EntryT] = {}
        self._origins: dict[str, str] = {}
        self._is_loaded = False

    def add(self, name: str, entry: EntryT, origin: str) -> None:
        """Makes `entry`, which comes from `origin`, known as `name`. Raises UserError for a name that is taken."""
        if name in self._origins:
            raise UserError(
                f"{self.kind} name {name!r} is registered twice: by {self._origins[name]} and by {origin}; rename one "
                "of them"
            )
        self.entries[name], self._origins[name] = entry, origin

    def get(self, name: str) -> EntryT:
        """The entry of `name`; a UserError with the nearest name if there is none."""
        if name not in self:
            raise self.unknown(name)
        return self.entries[name]

    def unknown(self, name: str, others: Iterable[str] = ()) -> UserError:
        """The error for a name that is neither here nor among `others`, which would do as well."""
        return unknown_name(self.kind, name, dict.fromkeys([*others, *self.names()]), self.beyond)

    def names(self) -> list[str]:
        """All names, in order."""
        self._load()
        return sorted(self.entries)

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self.entries

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is registered in the block is forgotten behind it."""
        self._load()
        before = dict(self.entries), dict(self._origins)
        try:
            yield
        finally:
            self.entries, self._origins = before

    def _load(self) -> None:
        """Imports the built-in modules, then what other packages declare, once."""
        if self._is_loaded:
            return
        self._is_loaded = True
        try:
            for module in pkgutil.walk_packages(importlib.import_module(self.package).__path__, f"{self.package}."):
                importlib.import_module(module.name)
            for entry in entry_points(group=self.group):
                self._take(entry)
        except BaseException:
            self._is_loaded = False
            raise

    def _take(self, entry: EntryPoint) -> None:
        """What another package declares; where that cannot be loaded it is left out with a warning on stderr."""
        try:
            if self.declared is None:
                entry.load()
            else:
                self.add(entry.name, self.declared(entry), entry.value)
        except Exception as error:  # another's package must not take the rest away
            origin = entry.dist.name if entry.dist else "an installed package"
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            warn(
                f"entry point {entry.name!r} of {origin} ({self.group}: {entry.value}) cannot be loaded, and "
                f"its {self.kind}s are left out: {reason}"
            )


def origin_of(definition: Callable[..., object]) -> str:
    """Where a class or a function is defined."""
    return f"{definition.__module__}.{definition.__qualname__}"
