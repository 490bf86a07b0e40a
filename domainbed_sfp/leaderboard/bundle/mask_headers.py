"""What a file of masks says it holds: read before its bits are, which take eight times as much memory unpacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from domainbed_sfp.leaderboard.documents.entry_schema import COUNT, list_of, object_of
from domainbed_sfp.leaderboard.documents.parsing import parse
from domainbed_sfp.leaderboard.documents.problems import Problem, problems_of

# Bytes of names and shapes: a thousand layers have a tenth of it.
LONGEST_HEADER = 2**20

_SHAPE = list_of({"type": "integer", "minimum": 1, "maximum": 2**31}, maxItems=8)
_HEADER = {
    "type": "object",
    "required": ["__metadata__"],
    "properties": {"__metadata__": object_of({"shapes": {"type": "string"}})},
    "additionalProperties": object_of(
        {
            "dtype": {"const": "U8"},
            "shape": list_of(COUNT, minItems=1, maxItems=1),
            "data_offsets": list_of(COUNT, minItems=2, maxItems=2),
        }
    ),
}
_SHAPES = {"type": "object", "additionalProperties": _SHAPE}


def shapes_of(data: bytes) -> dict[str, tuple[int, ...]]:
    """The shapes of the masks that a safetensors file of `mask_files.pack` declares, by name.

    Nothing behind the header is looked at but its length. Raises ValueError, saying what is wrong, where the header is
    none, a mask has not one bit for each weight, or the masks do not fill the file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(LONGEST_HEADER, len(data) - 8):
        raise ValueError(f"a header of {length:,} bytes in a file of {len(data):,}, at most {LONGEST_HEADER:,}")
    header = parse(data[8 : 8 + length])
    _expect(header, _HEADER, "header")
    shapes = parse(header.pop("__metadata__")["shapes"].encode())
    _expect(shapes, _SHAPES, "shapes")
    if differing := sorted(set(shapes) ^ set(header)):
        raise ValueError(f"header and shapes do not name the same masks: {differing[0]!r} is in one of them")
    end = 0
    for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        size = (math.prod(shapes[name]) + 7) // 8
        if one["shape"] != [size] or one["data_offsets"] != [end, end + size]:
            raise ValueError(f"{name!r} is not one bit for each of {shapes[name]}, from byte {end:,} on")
        end += size
    if end != len(data) - 8 - length:
        raise ValueError(f"{len(data) - 8 - length:,} bytes of masks, the header declares {end:,}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def misfits(
    file: str, declared: Mapping[str, Sequence[int]], parameters: Mapping[str, Sequence[int]], expected: str
) -> Problem | None:
    """The first mask that is of no parameter, or of another shape; `parameters` are shapes by name, `expected` says
    whose."""
    for name, shape in declared.items():
        if name not in parameters:
            return Problem(file, f"mask {name}", expected, f"shape {list(shape)}")
        if list(parameters[name]) != list(shape):
            return Problem(file, f"mask {name}", f"a mask of shape {list(parameters[name])}", f"shape {list(shape)}")
    return None


def _expect(document: object, schema: Mapping[str, object], where: str) -> None:
    for problem in problems_of("", document, schema, where):
        raise ValueError(f"{problem.field}: expected {problem.expected}, found {problem.found}")
