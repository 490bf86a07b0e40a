"""What computing a bundle's runs here needs: their data, their weights, and time."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.core import provenance
from domainbed_sfp.core.device import choose_device
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard.bundle.places import WEIGHTS
from domainbed_sfp.leaderboard.documents.problems import shown
from domainbed_sfp.leaderboard.facts import facts_of, split_sizes
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.runs.settings import RunSettings, known_settings

# Multiply-accumulate operations a second, as a core or a GPU does them with all that is around them, and seconds that a
# step takes however small the network is: for estimates, which are right within a factor of three or so.
CPU_SPEED, GPU_SPEED, STEP_SECONDS = 1e10, 1e12, 5e-3
# A step runs the network forward and, at twice the cost, backward.
PASSES = 3
# Hours of computing that are begun without being asked for.
HOURS = 2.0


@dataclass(frozen=True)
class Place:
    """Where runs are computed again: folders of data and of decoded images, and hours that it may take."""

    data_dir: str | None = None
    cache_dir: str | None = None
    hours: float = HOURS


def place_of(args: argparse.Namespace) -> Place:
    """The place that flags describe. Raises UserError for a number of hours that is none."""
    hours = HOURS if args.hours is None else args.hours
    if not 0 < hours < float("inf"):
        raise UserError(f"--hours: expected a number of hours above 0, got {hours:g}")
    return Place(args.data_dir, args.cache_dir, hours)


def reason_not_to(run: BundleRun, place: Place) -> str | None:
    """Why a run cannot be computed here at all, whatever its records say; None where it can."""
    if run.run.algorithm not in registry.names():
        return f"{run.run.algorithm} is not installed here; install the package that has it"
    weights = run.run.hparams.get("weights", WEIGHTS[0])
    if weights not in WEIGHTS:
        what = f"its runs begin from a file of their author (hparam weights {shown(weights)})"
        return f"{what}, and no file that a bundle names is opened"
    cls = get_dataset_class(run.run.dataset)
    if not cls.EMBEDDED:
        if place.data_dir is None:
            return f"{run.run.dataset} is not at hand: give --data_dir"
        try:
            cls.check_files(place.data_dir)
        except UserError as error:
            return str(error)
    try:
        networks.make_featurizer(tuple(run.records[0]["input_shape"]), run.run.hparams)
    except Exception as error:  # an optional package or pretrained weights that are not here
        return f"its network cannot be built here ({error})"
    return None


def hours_of(runs: Sequence[BundleRun], steps: int | None, evaluations: int | None) -> float:
    """About how long runs take here. None takes each run's own number of steps, or of records."""
    speed = GPU_SPEED if torch.cuda.is_available() else CPU_SPEED
    seconds = 0.0
    for run in runs:
        macs = max(record["dense_macs"] for record in run.records)
        trained = (run.run.args["steps"] or get_dataset_class(run.run.dataset).N_STEPS) if steps is None else steps
        domains = len(run.records[0]["environments"]) - len(run.run.test_envs)
        facts = facts_of(run.run.dataset)
        samples = sum(size or 0 for size in facts.sizes) if facts else 0
        evaluated = (len(run.records) if evaluations is None else evaluations) * samples
        batch = int(run.run.hparams["batch_size"])
        seconds += trained * STEP_SECONDS + macs / speed * (PASSES * trained * batch * domains + evaluated)
    return seconds / 3600


def sizes_of(run: BundleRun) -> dict[str, int]:
    """How many samples each split of a run has, by the name of its accuracy; nothing where that is not known here."""
    facts, args = facts_of(run.run.dataset), run.run.args
    return {
        f"env{env}_{split}_acc": count
        for env, size in enumerate(facts.sizes if facts else ())
        if size is not None
        for split, count in split_sizes(
            size, env in run.run.test_envs, args["holdout_fraction"], args["uda_holdout_fraction"]
        ).items()
        if count
    }


def args_of(run: BundleRun, place: Place, folder: str) -> RunSettings:
    """The arguments that compute a run again, into `folder`, in the arithmetic of its records."""
    known = known_settings(run.run.args)
    known |= {"data_dir": place.data_dir, "output_dir": folder, "cache_dir": place.cache_dir, "device": "auto"}
    known |= {"skip_model_save": True, "save_model_every_checkpoint": False}
    return RunSettings(**{**known, "precision": run.records[0]["precision"]})


@contextlib.contextmanager
def as_recorded(run: BundleRun) -> Iterator[None]:
    """As many threads as the records were made with, where the machine has them (sums depend on their number), and
    nothing printed."""
    usual, count = torch.get_num_threads(), run.records[0]["environment"].get("threads")
    if type(count) is int and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.set_num_threads(usual)


def here() -> str:
    """The machine that computes, in a line."""
    found = provenance.fingerprint(choose_device("auto"))
    return ", ".join(f"{name} {value}" for name, value in found.items())
