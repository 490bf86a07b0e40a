"""Published rows beside measured ones, only where the protocol is the same."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_sfp.analysis.protocol import Protocol, shown_value
from domainbed_sfp.analysis.selection import Rule
from domainbed_sfp.core.domainbed_facts import DEFAULT_STEPS
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.records import PUBLISHED

# The environments of a data set under the names publications use, in DomainBed's order.
_DOMAINS = {
    "VLCS": ("Caltech101", "LabelMe", "SUN09", "VOC2007"),
    "PACS": ("art_painting", "cartoon", "photo", "sketch"),
    "OfficeHome": ("Art", "Clipart", "Product", "Real World"),
}

_AVERAGE = "average"
_COLUMNS = ("algorithm", "dataset", "test_domain", "selection", "accuracy", "std_err", "backbone", "source")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """Accuracies and standard errors in percent as printed by `source`: per environment in DomainBed's order
    (None where not published) and for the average."""

    algorithm: str
    dataset: str
    selection: str
    backbone: str
    source: str
    environments: tuple[tuple[float, float | None] | None, ...]
    average: tuple[float, float | None] | None


def find_published(given: str) -> Path:
    """The file named, or with "" the default: the rows that come with the package.

    Raises UserError when there is no such file.
    """
    # An installed package carries them inside; in a checkout they are in the top-level folder results/.
    package = Path(__file__).resolve().parents[1]
    shipped = [package / "published_rows" / "published.csv", package.parent / "results" / "published.csv"]
    candidates = [Path(given)] if given else shipped
    for path in candidates:
        if path.is_file():
            return path
    looked = " or ".join(str(path) for path in candidates)
    raise UserError(f"--published: no file {looked}; name the CSV file of published rows")


def load_published(path: Path) -> list[PublishedRow]:
    """Reads the rows of a CSV file with the columns algorithm, dataset, test_domain, selection, accuracy,
    std_err, backbone, source. Raises UserError, naming file and line, for a file that is not one."""
    grouped: dict[tuple[str, ...], dict[str, tuple[float, float | None]]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                raise UserError(f"--published {path}: no column {lacking[0]!r}; expected {', '.join(_COLUMNS)}")
            for line in reader:
                key = tuple(line[name] for name in ("algorithm", "dataset", "selection", "backbone", "source"))
                try:
                    error = float(line["std_err"]) if line["std_err"] else None
                    number = float(line["accuracy"]), error
                except (TypeError, ValueError) as problem:
                    raise UserError(f"--published {path}, line {reader.line_num}: {problem}") from problem
                row = grouped.setdefault(key, {})
                if line["test_domain"] in row:
                    said = f"{line['algorithm']} on {line['dataset']}, {line['test_domain']}"
                    raise UserError(f"--published {path}, line {reader.line_num}: {said} is given twice")
                row[line["test_domain"]] = number
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--published {path}: {problem}") from problem
    rows = []
    for (algorithm, dataset, selection, backbone, source), by_domain in grouped.items():
        environments = tuple(by_domain.get(domain) for domain in _DOMAINS.get(dataset, ()))
        rows.append(
            PublishedRow(algorithm, dataset, selection, backbone, source, environments, by_domain.get(_AVERAGE))
        )
    return rows


def matching_rows(
    published: Sequence[PublishedRow],
    dataset: str,
    rule: Rule,
    protocol: Protocol,
    environments: Sequence[str],
) -> tuple[list[PublishedRow], list[str]]:
    """The rows that may stand in this table, and a sentence about those that may not."""
    candidates = [row for row in published if row.dataset == dataset]
    if not candidates:
        return [], [f"No published rows: the file has none for {dataset}."]
    of_rule = [row for row in candidates if row.selection == rule.key]
    if not of_rule:
        return [], [f"No published rows: the file has none for {dataset} with {rule.title} selection."]
    obstacle = _obstacle(protocol)
    if obstacle:
        return [], [f"No published rows: {len(of_rule)} for {dataset} were not added, {obstacle}."]
    backbone = protocol.conditions[0].backbone
    matching = [row for row in of_rule if row.backbone == backbone]
    said = []
    others = sorted({row.backbone for row in of_rule} - {backbone})
    if others:
        count = len(of_rule) - len(matching)
        said.append(
            f"{count} published row{'' if count == 1 else 's'} for {dataset} not added: made with "
            f"{'; '.join(others)}, these runs with {backbone}."
        )
    if matching:
        # Told, not required: publications differ in them, and few sweeps can afford theirs.
        said.append(f"Our rows beside the published ones are from {protocol.effort()}.")
    blank = (None,) * len(environments)
    return [_with_environments(row, blank) for row in matching], said


def _obstacle(protocol: Protocol) -> str | None:
    """Why no published row can match, whatever its backbone; None when the conditions are the published
    ones."""
    if len(protocol.conditions) > 1:
        return "these runs mix protocols"
    ours = protocol.conditions[0]
    small = ours.backbone == "MNIST_CNN"
    side = 28 if small else 224
    expected = {
        "steps": (f"{DEFAULT_STEPS:,} steps", DEFAULT_STEPS),
        "image_size": (f"images of {side} px", side),
        "weights": ("no weights to begin from", "none") if small else ("the weights imagenet", "imagenet"),
        "holdout_fraction": ("a held-out fraction of 0.2", 0.2),
        "precision": ("the precision fp32", "fp32"),
        "task": ("the task domain_generalization", "domain_generalization"),
        "data_augmentation": ("data augmentation", True),
        "class_balanced": ("no class balance (class_balanced false)", False),
        "data": ("the published images", PUBLISHED),
        "nonlinear_classifier": ("a linear classifier (nonlinear_classifier false)", False),
    }
    for name, (told, value) in expected.items():
        found = getattr(ours, name)
        if found != value:
            return f"their protocol has {told}, these runs {shown_value(found)}"
    return None


def _with_environments(row: PublishedRow, blank: tuple[None, ...]) -> PublishedRow:
    environments = row.environments if len(row.environments) == len(blank) else blank
    return PublishedRow(row.algorithm, row.dataset, row.selection, row.backbone, row.source, environments, row.average)
