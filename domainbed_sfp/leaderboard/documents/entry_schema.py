"""The JSON schema of an entry, and its parts, which bundles share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from domainbed_sfp.algorithms.registry import STANDINGS
from domainbed_sfp.leaderboard.tiers import TIERS
from domainbed_sfp.runs.records import COST_FIELDS

FORMAT = 1

TRACKS = ("closed", "open")
SELECTIONS = ("training-domain", "leave-one-out", "oracle")


def object_of(properties: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def list_of(items: Any, **options: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **options}


def or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


TEXT = {"type": "string", "minLength": 1, "maxLength": 500}
NAME = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9][A-Za-z0-9 _.,=+()'-]*$",
    "maxLength": 120,
    "description": "letters a to z, digits, spaces and _.,=+()'-, a letter or digit first",
}
SEED = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**53}
PERCENT = {"type": "number", "minimum": 0, "maximum": 100}
FRACTION = {"type": "float", "minimum": 0, "maximum": 1}
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
RUN_NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]*$", "maxLength": 120}
ENVIRONMENT_NAME = {"type": "string", "minLength": 1, "maxLength": 120}
SEEDS = list_of(SEED, minItems=1, maxItems=1000, uniqueItems=True)
TEST_ENVS = list_of(
    list_of(SEED, minItems=1, maxItems=2, uniqueItems=True), minItems=1, maxItems=1000, uniqueItems=True
)
# Larger numbers than any hparam or cost are, and such as every format can show.
LARGEST = 1e18
SETTINGS = {
    "type": "object",
    "maxProperties": 200,
    "propertyNames": {"maxLength": 120},
    "additionalProperties": {
        "type": ["number", "string", "boolean"],
        "minimum": -LARGEST,
        "maximum": LARGEST,
        "maxLength": 500,
    },
}

TRIAL_SCHEMA = object_of(
    {
        "trial_seed": SEED,
        "accuracy": PERCENT,
        "validation": PERCENT,
        "hparams_seed": SEED,
        "step": COUNT,
        "run": RUN_NAME,
    }
)
CELL_SCHEMA = object_of(
    {
        "environment": ENVIRONMENT_NAME,
        "accuracy": PERCENT,
        "std_err": or_null(PERCENT),
        "trials": list_of(TRIAL_SCHEMA, minItems=1),
    }
)
RESULT_SCHEMA = object_of(
    {
        "cells": list_of(or_null(CELL_SCHEMA), minItems=1),
        "average": or_null(object_of({"accuracy": PERCENT, "std_err": or_null(PERCENT)})),
        "worst": or_null(object_of({"environment": ENVIRONMENT_NAME, "accuracy": PERCENT})),
        "costs": {
            "type": "object",
            "properties": {key: {"type": "number", "minimum": 0, "maximum": LARGEST} for key in COST_FIELDS},
            "additionalProperties": False,
        },
    }
)
RESULTS_SCHEMA = {
    "type": "object",
    "properties": dict.fromkeys(SELECTIONS, RESULT_SCHEMA),
    "additionalProperties": False,
    "minProperties": 1,
}
PROTOCOL_SCHEMA = object_of(
    {
        "environments": list_of(ENVIRONMENT_NAME, minItems=2, maxItems=1000),
        "test_envs": TEST_ENVS,
        "steps": {"type": "integer", "minimum": 1, "maximum": 2**31},
        "checkpoint_freq": {"type": "integer", "minimum": 1, "maximum": 2**31},
        "backbone": TEXT,
        "weights": TEXT,
        "image_size": or_null(COUNT),
        "holdout_fraction": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "precision": {"enum": ["fp32", "bf16"]},
        "task": {"enum": ["domain_generalization", "domain_adaptation"]},
        "hparams_seeds": SEEDS,
        "trial_seeds": SEEDS,
        "data_digest": or_null(TEXT),
    }
)
STEP_0_SCHEMA = object_of({"runs": COUNT, "difference": PERCENT})
MODELS_SCHEMA = object_of({"checkpoints": COUNT, "difference": PERCENT})
AGREEMENTS = ("identical", "within tolerance")
RERUN_SCHEMA = object_of(
    {
        "seed": SEED,
        "per_environment": {"type": "integer", "minimum": 1, "maximum": 1000},
        "tolerance": PERCENT,
        "mean_difference": {"type": "number", "minimum": -100, "maximum": 100},
        "cells": list_of(
            object_of(
                {
                    "run": RUN_NAME,
                    "agreement": {"enum": list(AGREEMENTS)},
                    "difference": PERCENT,
                    "selected_difference": PERCENT,
                }
            ),
            minItems=1,
        ),
    }
)
KEY = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
# An https address, or a path that leaves the folder of entries by a few steps at most and then only goes down.
_STEP = r"[A-Za-z0-9_+=-]+(\.[A-Za-z0-9_+=-]+)*"
ARCHIVE = {
    "type": "string",
    "pattern": rf"^(https://[A-Za-z0-9._~:/%@+=-]+|(\.\./){{0,4}}{_STEP}(/{_STEP})*)$",
    "maxLength": 500,
}
PACKAGE = {"type": "string", "pattern": r"^domainbed_sfp [0-9A-Za-z.+-]+$", "maxLength": 60}
COMMIT = or_null({"type": "string", "pattern": r"^[0-9a-f]{7,40}(\+changes)?$"})

SCHEMA = object_of(
    {
        "format": {"const": FORMAT},
        "name": NAME,
        "dataset": RUN_NAME,
        "algorithm": NAME,
        "settings": SETTINGS,
        "tier": {"enum": list(TIERS)},
        "track": {"enum": list(TRACKS)},
        "transductive": {"type": "boolean"},
        "standing": {"enum": list(STANDINGS)},
        "reference": TEXT,
        "protocol": PROTOCOL_SCHEMA,
        "results": RESULTS_SCHEMA,
        "unverified": list_of({"enum": list(COST_FIELDS)}, uniqueItems=True),
        "step_0": or_null(STEP_0_SCHEMA),
        "models": or_null(MODELS_SCHEMA),
        "rerun": or_null(RERUN_SCHEMA),
        "runs": list_of(SHA256, maxItems=100_000, uniqueItems=True),
        "bundle": SHA256,
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "package": PACKAGE,
        "commit": COMMIT,
        "author": or_null(KEY),
        "archive": or_null(ARCHIVE),
        "notes": list_of(TEXT, maxItems=50),
        "superseded_by": or_null(SHA256),
    }
)
