"""Small honest bundles of every family of methods, and the tools of somebody who would like a better row."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from computed_sweeps import compute_sweep
from torch import Tensor

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.objectives.erm import ERM
from domainbed_sfp.algorithms.pruning.magnitude import Magnitude
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.deploy import shrink
from domainbed_sfp.leaderboard import summary
from domainbed_sfp.leaderboard.bundle import layout
from domainbed_sfp.leaderboard.bundle.tree import sums_text
from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.networks import Network
from domainbed_sfp.pruning import costs
from domainbed_sfp.runs import mask_files
from domainbed_sfp.runs.records import run_of
from domainbed_sfp.sweep.spec import SweepSpec

DATASET = "FullColoredDigits"
STEPS = 6
# Held out of 599 samples a fifth: 119; the others: 480.
OUT, IN = 119, 480


class FullBloom(Magnitude):
    """A stranger's method with a moment of its own at which compression is final."""

    def at_final_compression(self) -> bool:
        return self.step > self.schedule.last_step(self.total_steps)


class SeesAll(ERM):
    transductive = True


def register_strangers() -> None:
    """What a plug-in would do."""
    for cls, like in ((FullBloom, "Magnitude"), (SeesAll, "ERM")):
        if cls.__name__ not in registry.names():
            register(cls.__name__, family="pruning", reference="tests", hparams=registry.get(like).hparams)(cls)


# By name of a family: algorithm, hparams, settings of the sweep.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("ERM", {}, {}),
    "channels": ("Magnitude", {}, {}),
    "weights": ("Magnitude", {"granularity": "weight"}, {}),
    "ranked globally": ("NetworkSlimming", {"backbone": "mnist_cnn_bn"}, {}),
    "before training": ("SNIP", {}, {}),
    "gates": ("SparseIRM", {}, {}),
    "gates of channels": ("SparseIRM", {"granularity": "channel", "mask_rule": "threshold"}, {}),
    "DCWP": ("DCWP", {}, {}),
    "MRM": ("MRM", {}, {}),
    "EVIL": ("EVIL", {}, {}),
    "grown": ("RigL", {}, {}),
    "flagged": ("SFP", {}, {}),
    "attention": ("GlobalPru", {}, {}),
    "quantized": ("UniformQuant", {"bits": 3, "quantize_start": 0.4}, {}),
    "learned widths": ("StaticMixedPrecision", {}, {}),
    "adapted": ("ERM", {}, {"task": "domain_adaptation", "uda_holdout_fraction": 0.25}),
    "transductive": ("SeesAll", {}, {}),
    "stranger": ("FullBloom", {}, {}),
    "final only": ("MRM", {}, {"evaluate": "final"}),
    "nothing removed": ("Magnitude", {"sparsity": 0, "weight_decay": 0}, {}),
    "grid": ("Magnitude", {}, {"n_hparams": 2, "n_trials": 2}),
}


def make(root: Path, family: str) -> Path:
    """Trains a family's sweep of a few steps and submits it."""
    algorithm, hparams, settings = FAMILIES[family]
    (root / "sweep").mkdir(parents=True)
    spec = SweepSpec(
        [DATASET], [algorithm], **{"n_hparams": 1, "n_trials": 1, **settings}, steps=STEPS, checkpoint_freq=2,
        test_envs=[[0]], hparams={"batch_size": 16, **hparams}, skip_model_save=True,
    )  # fmt: skip
    compute_sweep(root / "sweep", spec)
    submit(str(root / "sweep"), algorithm, str(root / "bundle"))
    return root / "bundle"


# What a forger does -----------------------------------------------------------------------------------------------------

Change = Callable[[Path], None]
Records = list[dict[str, Any]]


def files(folder: Path) -> list[Path]:
    """Files of records, by (trial seed, hparams seed)."""

    def seeds(file: Path) -> tuple[int, int]:
        args = json.loads(file.read_text().splitlines()[0])["args"]
        return args["trial_seed"], args["hparams_seed"]

    return sorted((folder / "records").iterdir(), key=seeds)


def read(file: Path) -> Records:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, records: Records) -> None:
    file.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def each(change: Callable[[dict[str, Any]], Any], lines: slice = slice(None), run: slice = slice(None)) -> Change:
    """Changes records by `change(record)`: the given lines of the given runs."""

    def apply(folder: Path) -> None:
        for file in files(folder)[run]:
            records = read(file)
            for record in records[lines]:
                change(record)
            write(file, records)

    return apply


def fields(lines: slice = slice(None), run: slice = slice(None), /, **values: Any) -> Change:
    """Sets fields of records; a value of `None` takes the field away."""

    def change(record: dict[str, Any]) -> None:
        record.update(values)
        for name in [name for name, value in values.items() if value is None]:
            del record[name]

    return each(change, lines, run)


def inside(part: str, run: slice = slice(None), /, **values: Any) -> Change:
    """Sets arguments or hparams in all records."""
    return each(lambda record: record[part].update(values), slice(None), run)


def overrides(run: slice = slice(None), /, **values: Any) -> Change:
    """Sets hparams where they are declared and where they are used."""

    def change(record: dict[str, Any]) -> None:
        record["args"]["hparams"] = json.dumps({**json.loads(record["args"]["hparams"]), **values}, sort_keys=True)
        record["hparams"].update(values)

    return each(change, slice(None), run)


def claims(path: str, value: Any) -> Change:
    """Sets a field of submission.json, at most one data set and one rule deep; `...` takes it away."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / "submission.json").read_text())
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        inner = document
        for part in parents:
            inner = inner[part]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value(inner[last]) if callable(value) else value
        (folder / "submission.json").write_text(json.dumps(document))

    return apply


def both(*changes: Change) -> Change:
    """One change after the other."""

    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def submitted(file: Path) -> BundleRun:
    records = read(file)
    return BundleRun(file.stem, records, run_of(file.stem, [dict(record) for record in records]))


def resubmitted(change: Change) -> Change:
    """A change, after which the submission follows from the records again."""

    def apply(folder: Path) -> None:
        change(folder)
        name = json.loads((folder / "submission.json").read_text())["name"]
        document = summary.document_of(name, [submitted(file) for file in sorted(files(folder))])
        (folder / "submission.json").write_text(json.dumps(document))

    return apply


Masks = dict[str, Tensor]


def masked(change: Callable[[Masks], None], lines: slice = slice(-1, None)) -> Change:
    """Other masks at final compression, with all digests, costs and claims that follow from them."""

    @resubmitted
    def apply(folder: Path) -> None:
        for file in files(folder):
            records = read(file)
            network = Network(submitted(file))
            masks = _masks(folder, records[-1])
            change(masks)
            for old in (folder / "masks").glob("*"):
                old.unlink()
            digest = mask_files.keep(folder / "masks", masks)
            for record in records[lines]:
                record.update(masks=digest, final_compression=True, **_costs(network, masks))
            write(file, records)

    return apply


def _masks(folder: Path, record: Mapping[str, Any]) -> Masks:
    if "masks" not in record:
        return {}
    return mask_files.unpack((folder / "masks" / f"{record['masks']}.safetensors").read_bytes())


def _costs(network: Network, masks: Masks) -> dict[str, Any]:
    known = {name: mask for name, mask in masks.items() if network.shapes.get(name) == mask.shape}
    cost = costs.measure_cost(network.deployed, network.positions, known)
    removed = costs.sparsities_of(network.algorithm, known)
    size = shrink.exported_bytes(network.algorithm.export(), known)
    counted = {"surviving_parameters": cost.surviving_parameters, "macs": cost.macs, "exported_bytes": size}
    return {**counted, "sparsity": next(iter(removed.values()), 0.0)}


def resum(folder: Path) -> None:
    """Makes SHA256SUMS anew."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != layout.SUMS]
    sums = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}
    (folder / layout.SUMS).write_text(sums_text(sums))


def tampered(folder: Path, target: Path, change: Change) -> Path:
    """A copy of a bundle, changed and with new sums."""
    copy = Path(shutil.copytree(folder, target))
    change(copy)
    resum(copy)
    return copy
