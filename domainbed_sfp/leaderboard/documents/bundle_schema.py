"""The JSON schemas of a bundle's documents: what is submitted, and a record of a run."""

from __future__ import annotations

from typing import Any

from domainbed_sfp.data.images.contents import REASONS
from domainbed_sfp.leaderboard.documents import entry_schema
from domainbed_sfp.leaderboard.documents.entry_schema import list_of, object_of, or_null
from domainbed_sfp.runs.settings import EVALUATIONS, SETTINGS

FORMAT = 1
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
    for name in SETTINGS
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
