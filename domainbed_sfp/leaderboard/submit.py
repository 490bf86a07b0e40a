"""The command `submit`: from a finished sweep to a bundle of one of its rows."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_sfp.analysis.account import Account, explain_missing, take_account
from domainbed_sfp.analysis.methods import Method, label_methods
from domainbed_sfp.analysis.tables import environment_names
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.core.overrides import recorded_overrides
from domainbed_sfp.leaderboard import summary, validation
from domainbed_sfp.leaderboard.bundle import layout, signing, weights
from domainbed_sfp.leaderboard.bundle.places import without_places
from domainbed_sfp.leaderboard.bundle.tree import sums_text
from domainbed_sfp.leaderboard.documents.bundle_schema import RECORD_SCHEMA, SUBMISSION_SCHEMA
from domainbed_sfp.leaderboard.documents.problems import problems_of
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.runs import mask_files, records
from domainbed_sfp.runs.layout import RESULTS
from domainbed_sfp.training.hparams import checked_overrides

# Problems told at once.
SHOWN = 20


def run(args: argparse.Namespace) -> int:
    """Makes the bundle, validates it as a judge would, and says what it holds."""
    outcome = submit(
        args.input_dir, args.algorithm, args.output, args.name, args.with_models, args.author_key, args.without_masks
    )
    sys.stdout.write(validation.text_of(outcome))
    return 0


def submit(
    input_dir: str,
    row: str,
    output: str,
    name: str | None = None,
    with_models: bool = False,
    author_key: str | None = None,
    without_masks: bool = False,
) -> validation.Validation:
    """Gathers a row's records and masks, and the selected models where they are asked for, into the folder `output`,
    which appears whole or not at all, signed with the key of a file where there is one. A row whose masks are gone can
    be submitted without them: it is self-reported.

    Raises UserError where the sweep is not complete, has no such row, did not keep a selected model, or would not pass
    validation; and where `output` exists.
    """
    target = Path(output)
    if target.exists() or target.is_symlink():
        raise UserError(f"--output {output!r} exists; choose another, or remove it")
    account = take_account(records.load_records(input_dir, warn=warn), input_dir, include_incomplete=False)
    label, directories = _row(account, row, input_dir)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / layout.RECORDS).mkdir(parents=True)
        runs = [_take_records(Path(input_dir) / directory, part) for directory in directories]
        for run, step in _selected(runs):
            if not without_masks:
                _take_masks(Path(input_dir), run, step, part)
            if with_models:
                is_last = step == run.records[-1]["step"]
                weights.take(Path(input_dir) / run.name, run.name, step, is_last, part)
        document = summary.document_of(name or label, runs)
        if without_masks:
            document["without_masks"] = True
        if author_key is not None:
            document["author"] = signing.public_key(author_key)
        _check_name(document, runs)
        write_atomically(part / layout.SUBMISSION, json.dumps(document, indent=1, sort_keys=True) + "\n")
        _seal(part, author_key)
        outcome = validation.validate(part)
        if outcome.problems:
            lines = [problem.line() for problem in outcome.problems[:SHOWN]]
            more = f" | and {len(outcome.problems) - SHOWN} more" if len(outcome.problems) > SHOWN else ""
            raise UserError(f"--input_dir {input_dir}: {label} would be rejected: {' | '.join(lines)}{more}")
        os.replace(part, target)
        outcome.root = target
        return outcome
    except OSError as error:
        raise UserError(f"--output {output!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _seal(part: Path, author_key: str | None) -> None:
    """Writes the sums of all files, and their signature where there is a key."""
    files = [file for file in sorted(part.rglob("*")) if file.is_file()]
    sums = {file.relative_to(part).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    write_atomically(part / layout.SUMS, text := sums_text(sums))
    if author_key is not None:
        write_atomically(part / layout.SIGNATURE, signing.sign(author_key, text.encode()) + "\n")
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def _row(account: Account, wanted: str, input_dir: str) -> tuple[str, list[str]]:
    """The row's name and the folders of its runs. `wanted` is a label of the tables, or an algorithm with one row."""
    rows = label_methods((job.dataset, job.method) for job in [*account.runs, *account.missing])
    chosen: dict[str, tuple[Method, str]] = {}
    known: dict[str, None] = {}
    for dataset, labels in sorted(rows.items()):
        known.update(dict.fromkeys(labels.values()))
        found = [(method, label) for method, label in labels.items() if label == wanted]
        found = found or [(method, label) for method, label in labels.items() if method.algorithm == wanted]
        if len(found) > 1:
            raise UserError(
                f"--algorithm {wanted!r} has several rows in {input_dir}: choose one of "
                + ", ".join(repr(label) for _, label in found)
            )
        if found:
            chosen[dataset] = found[0]
    if not chosen:
        raise unknown_name("--algorithm (a row of the sweep)", wanted, known)
    label = next(iter(chosen.values()))[1]
    missing = {
        job: reason
        for job, reason in account.missing.items()
        if job.dataset in chosen and job.method == chosen[job.dataset][0]
    }
    runs = {job: run for job, run in account.runs.items() if chosen.get(job.dataset, (None,))[0] == job.method}
    told = []
    for dataset in chosen:
        names = environment_names(dataset, list(runs.values())) if runs else ()
        told += explain_missing(
            {job: reason for job, reason in missing.items() if job.dataset == dataset},
            dict([chosen[dataset]]),
            names,
            limit=SHOWN,
        )
    if told:
        raise UserError(
            f"--input_dir {input_dir} is not complete: {' '.join(told)} `sweep launch` computes what is left; a job "
            "that failed for a reason of its own fails again, and its row cannot be submitted"
        )
    return label, sorted(run.directory for run in runs.values())


def _take_records(folder: Path, part: Path) -> BundleRun:
    """A run's records into the bundle, without the paths of this machine."""
    parsed = []
    for number, record in enumerate(records.read_records(folder, warn), start=1):
        plain = _finite(record)
        _forget_places(plain)
        where = str(folder / RESULTS)
        for problem in problems_of(where, plain, RECORD_SCHEMA, f"line {number}"):
            raise UserError(
                f"{problem.line()}; a bundle needs runs of `domainbed-sfp train` or `sweep`, of this version"
            )
        parsed.append(plain)
    lines = [json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in parsed]
    write_atomically(part / layout.RECORDS / f"{folder.name}.jsonl", "".join(lines))
    return BundleRun(folder.name, parsed, records.run_of(folder.name, parsed))


def _forget_places(record: dict[str, Any]) -> None:
    """Takes out of a record where on this machine things lie; every argument and hparam keeps its name."""
    args = record["args"]
    for name in ("data_dir", "output_dir"):
        args[name] = None
    if "hparams" in record:
        record["hparams"] = without_places(record["hparams"])
    overrides = recorded_overrides(args.get("hparams"))
    # Runs of earlier versions may say 8.0 where others say 8; in a bundle all runs of a row say the same.
    plain = without_places(checked_overrides(args["algorithm"], args["dataset"], overrides))
    if json.dumps(plain) != json.dumps(overrides):
        args["hparams"] = json.dumps(plain, sort_keys=True)


def _selected(runs: list[BundleRun]) -> list[tuple[BundleRun, int]]:
    """Every checkpoint that a selection rule chooses, as run and step."""
    by_name, found = {run.name: run for run in runs}, {}
    for dataset in sorted({run.run.dataset for run in runs}):
        results = summary.results_of([run.run for run in runs if run.run.dataset == dataset])
        for choice in (choice for _, choices in results.values() for choice in choices):
            step = choice.run.steps[choice.checkpoint]
            found[choice.run.directory, step] = (by_name[choice.run.directory], step)
    return list(found.values())


def _take_masks(input_dir: Path, run: BundleRun, step: int, part: Path) -> None:
    """The masks of a selected checkpoint."""
    record = next(one for one in run.records if one["step"] == step)
    if "masks" not in record:
        if record["sparsity"] > 0:
            raise UserError(
                f"{input_dir / run.name / RESULTS}: the record of step {step} has sparsity "
                f"{record['sparsity']:g} but no masks; runs of earlier versions did not keep them: train "
                "anew"
            )
        return
    source = input_dir / run.name / mask_files.FOLDER / (record["masks"] + mask_files.SUFFIX)
    target = part / layout.MASKS / source.name
    target.parent.mkdir(exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise UserError(
            f"{source} is missing: the masks of step {step}, which its record names (sweep pack keeps none); "
            "without them (--without_masks) the row is self-reported"
        ) from None


def _check_name(document: Mapping[str, Any], runs: Sequence[BundleRun]) -> None:
    for problem in problems_of("submission", document, SUBMISSION_SCHEMA):
        raise UserError(
            f"{problem.line()}; --name gives the leaderboard's name" if problem.field == "name" else problem.line()
        )
    if wrong := summary.wrong_name(document["name"], [one.run for one in runs]):
        raise UserError(f"--name: expected {wrong[0]}, got {wrong[1]}; this is a row of {document['algorithm']}")


def _finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
