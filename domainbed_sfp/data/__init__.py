"""Data sets of several environments, their splits, their cache and their minibatches."""

from __future__ import annotations

from domainbed_sfp.data.base import Dataset, Environment, dataset_names, get_dataset_class

__all__ = ["Dataset", "Environment", "dataset_names", "get_dataset_class"]
