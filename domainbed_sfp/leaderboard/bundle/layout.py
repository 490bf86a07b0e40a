"""What a submission consists of, and how one from a stranger is read.

    submission.json             what is submitted: method, protocol per data set, and the numbers that it claims
    records/<run>.jsonl         every record of every run of the grid, without the paths of its author's machine
    masks/<digest>.safetensors  the masks of the checkpoints that the selection rules choose, one bit a weight
    models/<run>.<step>.safetensors
                                where the author wants them to be evaluated: the models of the same checkpoints
    SHA256SUMS                  of all other files but the next, as `sha256sum` writes it
    SIGNATURE                   of SHA256SUMS, where the submission names its author's key

Nothing in a bundle is run, imported or unpickled: texts are parsed as JSON, masks as safetensors, both in bounds, and
no name inside a file decides what is opened.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from domainbed_sfp.data.images.contents import REASONS
from domainbed_sfp.leaderboard.bundle.plain_files import open_plain
from domainbed_sfp.leaderboard.documents import entry_schema
from domainbed_sfp.leaderboard.documents.entry_schema import list_of, object_of, or_null
from domainbed_sfp.leaderboard.documents.problems import Problem
from domainbed_sfp.runs.settings import EVALUATIONS, settings_fields

FORMAT = 1
SUBMISSION = "submission.json"
SUMS = "SHA256SUMS"
SIGNATURE = "SIGNATURE"
RECORDS = "records"
MASKS = "masks"
MODELS = "models"

# What a name may be, and how many bytes such a file may have.
FILES: Mapping[str, int] = {
    r"submission\.json": 2**24,
    r"SHA256SUMS": 2**24,
    r"SIGNATURE": 200,
    r"records/[A-Za-z0-9][A-Za-z0-9_.-]*\.jsonl": 2**26,
    r"masks/[0-9a-f]{64}\.safetensors": 2**26,
    r"models/[A-Za-z0-9][A-Za-z0-9_.-]*\.\d{1,10}\.safetensors": 2**30,
}
# Of a network that is built anew to count its costs: more would take gigabytes.
MOST_PARAMETERS = 2**29
# Read at once where a file is only looked through.
CHUNK = 2**20
LAYOUT = (
    f"{SUBMISSION}, {SUMS}, {RECORDS}/<run>.jsonl, {MASKS}/<digest>.safetensors or {MODELS}/<run>.<step>.safetensors"
)
# Of all files together, and of all records.
LARGEST_BUNDLE = 2**33
LARGEST_RECORDS = 2**30
MOST_FILES = 100_000
# Of a run: a checkpoint each.
MOST_RECORDS = 100_000
# Bytes of a record, whose longest part is the evaluation on degraded copies: some kilobytes.
LONGEST_LINE = 2**18
# Of fields in all records of a run: all but the last have the same ones.
MOST_NAMES = 2000
# Numbers and texts in all records, not counting what a run's records share. Seven data sets with pairs of test
# environments, 20 draws and 3 trials have five million; more of them would take gigabytes of memory.
MOST_VALUES = 2**23

_FINGERPRINT = {
    "type": "object",
    "required": ["domainbed_sfp"],
    "properties": {"domainbed_sfp": {"type": "string", "maxLength": 60}},
    "maxProperties": 40,
    "additionalProperties": {"type": ["string", "integer"], "maxLength": 200},
}
_DECISIONS = {"type": "object", "maxProperties": 40, "additionalProperties": entry_schema.TEXT}
_FLAG = {"type": "boolean"}
# Of a submission: what its records do not say.
OPTIONAL = ("author", "without_masks")

SUBMISSION_SCHEMA = object_of(
    {
        "format": {"const": FORMAT},
        "name": entry_schema.NAME,
        "algorithm": entry_schema.NAME,
        "settings": entry_schema.SETTINGS,
        "transductive": _FLAG,
        "standing": {"enum": list(entry_schema.STANDINGS)},
        "reference": entry_schema.TEXT,
        "datasets": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 100,
            "propertyNames": entry_schema.RUN_NAME,
            "additionalProperties": object_of(
                {"protocol": entry_schema.PROTOCOL_SCHEMA, "results": entry_schema.RESULTS_SCHEMA}
            ),
        },
        "environments": list_of(_FINGERPRINT, maxItems=1000),
        "package": entry_schema.PACKAGE,
        "commit": entry_schema.COMMIT,
        "author": entry_schema.KEY,
        "without_masks": {"const": True},
    },
    optional=OPTIONAL,
)

_HPARAMS = {"type": "object", "maxProperties": 500, "additionalProperties": {"type": ["number", "string", "boolean"]}}
_NUMBER_OR_NULL = {"type": ["number", "null"]}
_NOT_NEGATIVE = {"type": "number", "minimum": 0, "maximum": entry_schema.LARGEST}

# Arguments of runs are known by name; one that is newer than this table may be any plain value.
_KNOWN_ARGS: dict[str, Any] = {
    "algorithm": entry_schema.NAME,
    "checkpoint_freq": or_null({"type": "integer", "minimum": 1, "maximum": 2**31}),
    "data_dir": {"type": "null"},
    "dataset": entry_schema.RUN_NAME,
    "device": {"type": "string", "pattern": r"^(auto|cpu|cuda(:\d+)?)$"},
    "holdout_fraction": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "hparams": or_null({"type": "string", "maxLength": 20_000}),
    "hparams_seed": entry_schema.SEED,
    "output_dir": {"type": "null"},
    "precision": {"enum": ["fp32", "bf16", "auto"]},
    "save_model_every_checkpoint": _FLAG,
    "seed": entry_schema.SEED,
    "skip_model_save": _FLAG,
    "steps": or_null({"type": "integer", "minimum": 1, "maximum": 2**31}),
    "task": {"enum": ["domain_generalization", "domain_adaptation"]},
    "test_envs": list_of(entry_schema.SEED, minItems=1, maxItems=2, uniqueItems=True),
    "trial_seed": entry_schema.SEED,
    "uda_holdout_fraction": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
}
_NEWER_ARGS: dict[str, Any] = {
    name: {"type": ["number", "string", "boolean", "null"], "maxLength": 500}
    for name in settings_fields()
    if name not in _KNOWN_ARGS and name != "cache_dir"
}
_NEWER_ARGS["evaluate"] = {"enum": list(EVALUATIONS)}
ARGS_SCHEMA = object_of({**_KNOWN_ARGS, **_NEWER_ARGS}, optional=tuple(_NEWER_ARGS))

# The finished model on degraded copies of a test environment; what else is there, the method has measured.
_DEGRADED = list_of(
    {
        **object_of(
            {
                "accuracy": entry_schema.FRACTION,
                "degradation": entry_schema.TEXT,
                "samples": entry_schema.COUNT,
                "severity": entry_schema.COUNT,
            }
        ),
        "additionalProperties": _NUMBER_OR_NULL,
        "maxProperties": 100,
    },
    maxItems=1000,
)

# Whatever else a method logs is a number.
RECORD_SCHEMA: dict[str, Any] = {
    **object_of(
        {
            "args": ARGS_SCHEMA,
            "code": {"type": "string", "pattern": "^[0-9a-f]{12}$"},
            "commit": entry_schema.COMMIT,
            "data_digest": or_null(entry_schema.TEXT),
            "decisions": _DECISIONS,
            "dense_macs": entry_schema.COUNT,
            "environment": _FINGERPRINT,
            "environments": list_of(entry_schema.ENVIRONMENT_NAME, minItems=2, maxItems=1000, uniqueItems=True),
            "epoch": {"type": "float", "minimum": 0, "maximum": 2**53},
            "exported_bytes": or_null(entry_schema.COUNT),
            "final_compression": _FLAG,
            "granularity": entry_schema.TEXT,
            "hparams": _HPARAMS,
            "images_per_second": _NOT_NEGATIVE,
            "input_shape": list_of({"type": "integer", "minimum": 1, "maximum": 1024}, minItems=3, maxItems=3),
            "left_out": object_of(dict.fromkeys(REASONS, entry_schema.COUNT), optional=tuple(REASONS)),
            "macs": entry_schema.COUNT,
            "masks": entry_schema.SHA256,
            "mem_gb": _NOT_NEGATIVE,
            "parameters": entry_schema.COUNT,
            "precision": {"enum": ["fp32", "bf16"]},
            "sparsity": entry_schema.FRACTION,
            "standing": {"enum": list(entry_schema.STANDINGS)},
            "step": entry_schema.COUNT,
            "step_time": _NOT_NEGATIVE,
            "surviving_parameters": entry_schema.COUNT,
            "wall_time": _NOT_NEGATIVE,
            "weights_digest": {"type": "string", "pattern": "^[0-9a-f]{12}$"},
            **dict.fromkeys(("bitops", "bitops_8bit", "mean_bits"), or_null(_NOT_NEGATIVE)),
        },
        optional=(
            "bitops",
            "bitops_8bit",
            "code",
            "decisions",
            "exported_bytes",
            "granularity",
            "images_per_second",
            "left_out",
            "masks",
            "mean_bits",
            "mem_gb",
            "step_time",
            "wall_time",
            "weights_digest",
        ),
    ),
    "maxProperties": 1000,
    "propertyNames": {"maxLength": 120},
    "patternProperties": {
        r"^env\d+_(in|out|uda)_acc$": entry_schema.FRACTION,
        r"^env\d+_(bitops|mean_bits)$": or_null(_NOT_NEGATIVE),
        r"^env\d+_degraded$": _DEGRADED,
    },
    "additionalProperties": _NUMBER_OR_NULL,
}


def model_file(run: str, step: int) -> str:
    """The file of a checkpoint's model, by its name in the bundle."""
    return f"{MODELS}/{run}.{step}.safetensors"


@dataclass
class Tree:
    """The files of a bundle by their names in it, with their SHA-256, and what must not be there. `is_refused`: there
    is too much of it, and nothing was read."""

    root: Path
    sums: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    is_refused: bool = False

    def names(self, folder: str) -> list[str]:
        """The files below `folder`, sorted."""
        return sorted(name for name in self.sums if name.startswith(folder + "/"))

    def read(self, name: str) -> bytes:
        """The contents of a file that `sums` names. Raises OSError if it has changed since."""
        data = b"".join(_chunks(self.root / name, limit_of(name) or 0))
        self._expect(name, hashlib.sha256(data))
        return data

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of such a file, one in memory at a time. One that is longer than LONGEST_LINE is cut behind it and
        is the last. Raises OSError at the end if the file has changed since."""
        digest = hashlib.sha256()
        with open_plain(self.root / name) as file:
            while line := file.readline(LONGEST_LINE + 1):
                digest.update(line)
                yield line
                if not line.endswith(b"\n"):
                    while rest := file.read(CHUNK):
                        digest.update(rest)
        self._expect(name, digest)

    def _expect(self, name: str, digest: Any) -> None:
        if digest.hexdigest() != self.sums[name]:
            raise OSError(f"{name} has changed while the bundle was read")


def read_tree(root: Path) -> Tree:
    """Looks through a bundle's folder without following a link; every file is hashed once, but none before the sizes of
    all are known to be within bounds.

    Raises OSError where the folder itself cannot be read.
    """
    tree = Tree(root)
    sizes: dict[str, int] = {}
    for count, (name, entry) in enumerate(_walk(root, "")):
        if count == MOST_FILES:
            tree.problems.append(Problem(str(root), "", f"at most {MOST_FILES:,} files", "more"))
            tree.is_refused = True
            return tree
        limit, status = limit_of(name), entry.stat(follow_symlinks=False)
        if entry.is_symlink():
            tree.problems.append(Problem(name, "", "a plain file", "a symbolic link"))
        elif stat.S_ISDIR(status.st_mode):
            tree.problems.append(Problem(name, "", LAYOUT, "a folder"))
        elif not stat.S_ISREG(status.st_mode):
            tree.problems.append(Problem(name, "", "a plain file", "a device, pipe or socket"))
        elif limit is None:
            tree.problems.append(Problem(name, "", LAYOUT, "a file that does not belong there"))
        elif status.st_nlink > 1:
            tree.problems.append(Problem(name, "", "a file of its own", "a hard link to a file elsewhere"))
        elif status.st_size > limit:
            tree.problems.append(Problem(name, "", f"at most {limit:,} bytes", f"{status.st_size:,}"))
        else:
            sizes[name] = status.st_size
    for folder, most in ((RECORDS, LARGEST_RECORDS), ("", LARGEST_BUNDLE)):
        size = sum(size for name, size in sizes.items() if name.startswith(folder))
        if size > most:
            words = f"at most {most:,} bytes in all files together"
            tree.problems.append(Problem(folder or str(root), "", words, f"{size:,}"))
            tree.is_refused = True
    for name in () if tree.is_refused else sizes:
        try:
            digest = hashlib.sha256()
            for chunk in _chunks(root / name, limit_of(name) or 0):
                digest.update(chunk)
            tree.sums[name] = digest.hexdigest()
        except OSError as error:
            tree.problems.append(Problem(name, "", "a file that can be read", str(error.strerror or error)))
    return tree


# How a path begins that says where on its author's machine something lies: from the root, a home, a folder above, a
# drive, a server. "hf_hub:timm/resnet50.a1_in1k" is a network's name.
_PLACE = re.compile(r"(/|~|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\|file:)", re.IGNORECASE)
# What hparam weights may be that is no file.
WEIGHTS = ("imagenet", "none")


def without_places(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hparams without paths of a machine: a file goes by its name alone, as "./NAME", which no word stands for."""
    return {
        name: f"./{_file_name(value)}" if isinstance(value, str) and _is_place(name, value) else value
        for name, value in hparams.items()
    }


def _is_place(name: str, value: str) -> bool:
    return bool(_PLACE.match(value)) or (name == "weights" and value not in WEIGHTS)


def _file_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder"


# What SHA256SUMS cannot name.
_UNLISTED = (SUMS, SIGNATURE)


def sums_text(sums: Mapping[str, str]) -> str:
    """SHA256SUMS of files by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()) if name not in _UNLISTED)


def check_sums(tree: Tree) -> Iterator[Problem]:
    """Where SHA256SUMS and the files disagree."""
    if SUMS not in tree.sums:
        yield Problem(SUMS, "", "the sums of all files", "nothing")
        return
    listed: dict[str, str] = {}
    lines = tree.read(SUMS).decode("utf-8", "replace").split("\n")
    if lines.pop():
        yield Problem(SUMS, f"line {len(lines) + 1}", "a line that ends", "the end of the file")
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None:
            yield Problem(SUMS, f"line {number}", "64 hexadecimal digits, two spaces and a name", repr(line[:120]))
        elif limit_of(match[2]) is None or match[2] in _UNLISTED:
            yield Problem(SUMS, f"line {number}", f"the name of a file of the bundle ({LAYOUT})", repr(match[2][:120]))
        elif match[2] in listed:
            yield Problem(SUMS, f"line {number}", "each file only once", f"{match[2]} again")
        else:
            listed[match[2]] = match[1]
    for name, digest in listed.items():
        if name not in tree.sums:
            yield Problem(name, "", "a file, because SHA256SUMS names it", "none")
        elif tree.sums[name] != digest:
            yield Problem(name, "SHA-256", f"{digest} (SHA256SUMS)", tree.sums[name])
    for name in sorted(set(tree.sums) - set(listed) - {*_UNLISTED}):
        yield Problem(name, "SHA-256", "a line in SHA256SUMS", "none")


def limit_of(name: str) -> int | None:
    """How many bytes a file of this name may have; None where no such file belongs into a bundle."""
    return next((limit for pattern, limit in FILES.items() if re.fullmatch(pattern, name)), None)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything in a folder, by its name in the bundle; only the folders of the layout are entered."""
    with os.scandir(folder) as found:
        for entry in sorted(islice(found, MOST_FILES + 1), key=lambda entry: entry.name):
            name = prefix + entry.name
            if name in (RECORDS, MASKS, MODELS) and entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, name + "/")
            else:
                yield name, entry


def _chunks(path: Path, limit: int) -> Iterator[bytes]:
    """A plain file's contents; OSError behind `limit` bytes, whatever its size was a moment ago."""
    total = 0
    with open_plain(path) as file:
        while chunk := file.read(CHUNK):
            total += len(chunk)
            if total > limit:
                raise OSError(f"{path} has more than {limit:,} bytes")
            yield chunk
