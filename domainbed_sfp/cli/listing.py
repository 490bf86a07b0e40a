"""What `domainbed-sfp list` shows: the registry's and the data sets' own data."""

from __future__ import annotations

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.console import Rows
from domainbed_sfp.data import dataset_names, get_dataset_class
from domainbed_sfp.sweep.spec import read_spec, shipped_specs
from domainbed_sfp.training.hparams import hparam_table


def algorithms() -> Rows:
    """Name, family, standing and reference of every algorithm."""
    infos = [registry.get(name) for name in registry.names()]
    rows: Rows = [("algorithm", "family", "standing", "reference")]
    return rows + [(info.name, info.family, info.standing, info.reference) for info in infos]


def datasets() -> Rows:
    """Name, environments, steps and source of every data set."""
    rows: Rows = [("data set", "environments", "steps", "what it is")]
    for name in dataset_names():
        cls = get_dataset_class(name)
        environments = " ".join(cls.ENVIRONMENTS) if cls.ENVIRONMENTS else "your folders"
        rows.append((name, environments, str(cls.N_STEPS), " ".join((cls.__doc__ or "").split())))
    return rows


def hparams(algorithm: str, dataset: str) -> Rows:
    """Name, default, whether a random search draws it, and meaning of every hparam."""
    rows: Rows = [("hparam", "default", "searched", "what it is")]
    for name, hparam in sorted(hparam_table(algorithm, dataset).items()):
        rows.append((name, str(hparam.default), "yes" if hparam.sample else "", hparam.doc))
    return rows


def sweeps() -> Rows:
    """Name and grid of every shipped sweep spec."""
    rows: Rows = [("spec", "data sets", "algorithms", "trials x hparams")]
    for name in shipped_specs():
        spec = read_spec(name)
        names = list(dict.fromkeys(e if isinstance(e, str) else e["name"] for e in spec.algorithms))
        draws = spec.n_hparams - spec.n_hparams_from
        rows.append((name, " ".join(spec.datasets), " ".join(names), f"{spec.n_trials - spec.n_trials_from} x {draws}"))
    return rows
