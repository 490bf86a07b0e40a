"""Hparams that a user gives in place of the drawn ones, as the text of `--hparams` and in records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError


def parse_overrides(text: str | None) -> dict[str, Any]:
    """The `--hparams` JSON object; a UserError says where it is malformed, or what it says twice."""
    if not text:
        return {}
    try:
        value = strict_json.parse(text, object_pairs_hook=strict_json.unique_names)
    except json.JSONDecodeError as error:
        raise UserError(
            f"--hparams is not valid JSON: {error.msg} at character {error.pos} of {text!r:.200}; "
            "expected an object such as '{\"lr\": 0.001}'"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--hparams: {error}; expected an object that names each hparam once") from None
    if not isinstance(value, dict):
        raise UserError(f"--hparams must be a JSON object such as '{{\"lr\": 0.001}}', got {text!r:.200}")
    return value


def overrides_text(overrides: Mapping[str, Any]) -> str | None:
    """What `parse_overrides` reads; None where there are none."""
    return json.dumps(dict(overrides), sort_keys=True) if overrides else None


def recorded_overrides(text: str | None) -> dict[str, Any]:
    """The `hparams` of a record's `args`. Whatever wrote them has taken the last of a name that is there twice."""
    try:
        value = strict_json.parse(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"a record has args.hparams {text!r:.200}; expected a JSON object")
    return value
