"""Data sets of several environments, their splits, their cache and their minibatches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domainbed_sfp.data.base import Dataset, Environment, dataset_names, get_dataset_class

__all__ = ["Dataset", "Environment", "dataset_names", "get_dataset_class"]


def __getattr__(name: str) -> Any:
    # torch is loaded only when a data set is asked for: commands that do without it start at once.
    if name in __all__:
        from domainbed_sfp.data import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
