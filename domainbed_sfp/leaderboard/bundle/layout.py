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

import re
from collections.abc import Mapping

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


def model_file(run: str, step: int) -> str:
    """The file of a checkpoint's model, by its name in the bundle."""
    return f"{MODELS}/{run}.{step}.safetensors"


def limit_of(name: str) -> int | None:
    """How many bytes a file of this name may have; None where no such file belongs into a bundle."""
    return next((limit for pattern, limit in FILES.items() if re.fullmatch(pattern, name)), None)
