"""Checks of JSON documents: every deviation from a JSON schema, with the field, what was expected and what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jsonschema
import jsonschema.validators

# Longer values are cut where a problem tells them.
SHOWN = 160
# And what is said of them.
LONGEST_WORDS = 400
# So many problems of one document are told: a document of nothing else must not fill the memory.
MOST_PROBLEMS = 200


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """The whole text: `$` alone lets a line break follow."""
    if isinstance(instance, str) and re.fullmatch(pattern, instance) is None:
        yield jsonschema.ValidationError("another pattern")


def _unique_items(_: Any, is_wanted: bool, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """jsonschema's own compares every item with every other where they cannot be sorted."""
    different = {json.dumps(item, sort_keys=True) for item in instance} if isinstance(instance, list) else ()
    if is_wanted and isinstance(instance, list) and len(different) < len(instance):
        yield jsonschema.ValidationError("an item twice")


# JSON Schema takes 5.0 for an integer; range() does not. A fraction that is the integer 1 is not what a run writes.
_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"pattern": _pattern, "uniqueItems": _unique_items},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": lambda _, value: type(value) is int, "float": lambda _, value: type(value) is float}
    ),
)


_TYPES = {
    "array": "a list", "boolean": "true or false", "float": "a number with a decimal point",
    "integer": "a whole number", "null": "null", "number": "a number", "object": "an object", "string": "text",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something that a document, or a bundle, must not have: where, and what should stand there."""

    file: str
    field: str
    expected: str
    found: str

    def __post_init__(self) -> None:
        for name in ("field", "expected", "found"):  # an error may repeat a stranger's value whole
            object.__setattr__(self, name, _cut(getattr(self, name), LONGEST_WORDS))

    def line(self) -> str:
        """The problem for people, on one line and without what would steer a terminal: names come from strangers."""
        where = f"{self.file}: {self.field}" if self.field else self.file
        text = f"{where}: expected {self.expected}, found {self.found}"
        return printable(text)


def printable(text: str) -> str:
    """A stranger's text on one line: control characters and those that turn the direction of writing are spelled."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(value: Any) -> str:
    """A value as a problem tells it: JSON, cut where it is long, on one line."""
    return _cut(json.dumps(value, default=str))


def counted(value: Any) -> str:
    """A number as a problem tells it, its thousands apart; other values as `shown` tells them."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:,}" if is_number else shown(value)


def problems_of(file: str, document: Any, schema: Mapping[str, Any], prefix: str = "") -> Iterator[Problem]:
    """The deviations of `document` from `schema`, at most MOST_PROBLEMS; fields are told as `prefix.name[index]`."""
    some = islice(_Validator(schema).iter_errors(document), MOST_PROBLEMS)
    errors = sorted(some, key=lambda error: list(map(str, error.absolute_path)))
    # A field that lacks is an error of its own each, and all of them name all that are required.
    found = (problem for error in errors for problem in islice(_problems(file, error, prefix), MOST_PROBLEMS))
    yield from islice(dict.fromkeys(found), MOST_PROBLEMS)


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
        text += f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" if text else _cut(str(part))
    return text


def _cut(text: str, longest: int = SHOWN) -> str:
    return text if len(text) <= longest else text[:longest] + "..."


def _expected(error: Any) -> str:
    value: Any = error.validator_value
    words = {
        "type": lambda: " or ".join(_TYPES[one] for one in ([value] if isinstance(value, str) else value)),
        "enum": lambda: "one of " + ", ".join(map(str, value)),
        "const": lambda: shown(value),
        "pattern": lambda: error.schema.get("description") or f"text like {value}",
        "minimum": lambda: f"at least {value:,}",
        "maximum": lambda: f"at most {value:,}",
        "exclusiveMinimum": lambda: f"more than {value:,}",
        "exclusiveMaximum": lambda: f"less than {value:,}",
        "minItems": lambda: f"at least {value:,} of them",
        "maxItems": lambda: f"at most {value:,} of them",
        "minProperties": lambda: f"at least {value:,} fields",
        "maxProperties": lambda: f"at most {value:,} fields",
        "minLength": lambda: f"at least {value:,} characters",
        "maxLength": lambda: f"at most {value:,} characters",
        "uniqueItems": lambda: "each only once",
    }
    return words[error.validator]() if error.validator in words else _cut(str(error.message))
