"""Checks of JSON documents: every deviation from a JSON schema, with the field, what was expected and what is there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import jsonschema.validators

# JSON Schema takes 5.0 for an integer; range() does not.
_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int),
)

# Longer values are cut where a problem tells them.
SHOWN = 160


@dataclass(frozen=True)
class Problem:
    """Something that a document, or a bundle, must not have: where, and what should stand there."""

    file: str
    field: str
    expected: str
    found: str

    def line(self) -> str:
        """The problem for people, on one line and without what would steer a terminal: names come from strangers."""
        where = f"{self.file}: {self.field}" if self.field else self.file
        text = f"{where}: expected {self.expected}, found {self.found}"
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(value: Any) -> str:
    """A value as a problem tells it: JSON, cut where it is long, on one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def parse(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError for anything else: NaN, infinity, a name that an object
    has twice, too deep a nesting."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else constant(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("an object has one name twice")
        return found

    try:
        return json.loads(data.decode("utf-8"), parse_constant=constant, parse_float=finite, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def problems_of(file: str, document: Any, schema: Mapping[str, Any], prefix: str = "") -> Iterator[Problem]:
    """The deviations of `document` from `schema`; fields are told as `prefix.name[index]`."""
    errors = sorted(_Validator(schema).iter_errors(document), key=lambda error: list(map(str, error.absolute_path)))
    # A field that lacks is an error of its own each, and all of them name all that are required.
    yield from dict.fromkeys(problem for error in errors for problem in _problems(file, error, prefix))


def _problems(file: str, error: Any, prefix: str) -> Iterator[Problem]:
    path, value = list(error.absolute_path), error.instance
    if error.validator == "required":
        for name in error.validator_value:
            if name not in value:
                yield Problem(file, _field([*path, name], prefix), "a value", "nothing")
    elif error.validator == "additionalProperties":
        for name in sorted(set(value) - set(error.schema["properties"])):
            yield Problem(file, _field([*path, name], prefix), "no such field", shown(value[name]))
    else:
        yield Problem(file, _field(path, prefix), _expected(error), shown(value))


def _field(path: Iterable[str | int], prefix: str) -> str:
    text = prefix
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _expected(error: Any) -> str:
    value: Any = error.validator_value
    words = {
        "type": lambda: " or ".join([value] if isinstance(value, str) else value),
        "enum": lambda: "one of " + ", ".join(map(str, value)),
        "const": lambda: shown(value),
        "pattern": lambda: f"text like {value}",
        "minimum": lambda: f"at least {value}",
        "maximum": lambda: f"at most {value}",
        "minItems": lambda: f"at least {value} of them",
        "maxItems": lambda: f"at most {value} of them",
        "maxLength": lambda: f"at most {value} characters",
        "uniqueItems": lambda: "each only once",
    }
    return words[error.validator]() if error.validator in words else str(error.message)
