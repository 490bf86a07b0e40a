"""What was launched into a directory of runs: its sweep.json, and one such file a launch.

A manifest is an object with `format` 1, `protocol` (what all its runs share, by name) and `jobs`. sweep.json holds all
jobs launched from where the directory lies. A copy of it is kept as sweep-HASH.json: folders of several machines can be
copied together in any order, and all their jobs stay known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.runs.layout import SWEEP, SWEEPS

FORMAT = 1

_FIELDS = {"name": str, "dataset": str, "algorithm": str, "test_envs": list, "hparams_seed": int, "trial_seed": int}
# A folder right in the directory, and nowhere else.
_FOLDER = re.compile(r"[^/\\\0]*[^/\\\0.][^/\\\0]*")


@dataclass(frozen=True)
class Manifest:
    """One file: its name, what its runs share, and its jobs, each with the fields of a run's `args` and `name`, its
    folder."""

    file: str
    protocol: dict[str, Any]
    jobs: list[dict[str, Any]]

    @property
    def names(self) -> set[str]:
        return {job["name"] for job in self.jobs}

    def describe(self) -> str:
        """Which sweep it is, for people."""
        told = [f"{len(self.jobs):,} job{'' if len(self.jobs) == 1 else 's'}"]
        for field in ("dataset", "algorithm"):
            told.append(_some(dict.fromkeys(str(job[field]) for job in self.jobs)))
        trials = sorted({job["trial_seed"] for job in self.jobs})
        told.append(f"trial{'' if len(trials) == 1 else 's'} {_some(map(str, trials))}")
        return f"{self.file} ({'; '.join(told)})"


def read_manifests(root: Path) -> list[Manifest]:
    """The manifests of a directory that say something of their own: sweep.json first, less those that another one
    contains. None where nothing was launched (DomainBed writes none).

    Raises UserError for a file that is no manifest.
    """
    found: list[Manifest] = []
    own_copy = None
    for path in (root / SWEEP, *sorted(root.glob(SWEEPS))):
        if path.name == own_copy:
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
        own_copy = own_copy or _name_of(data)
        manifest = _parse(path, data)
        if not any(_contains(other, manifest) for other in found):
            found = [*(other for other in found if not _contains(manifest, other)), manifest]
    return found


def write_manifest(root: Path, protocol: dict[str, Any], jobs: Iterable[dict[str, Any]]) -> None:
    """Replaces sweep.json, and keeps a copy under a name of its own. Raises OSError."""
    manifest = {"format": FORMAT, "protocol": protocol, "jobs": list(jobs)}
    data = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode("utf-8")
    write_atomically(root / SWEEP, data)
    write_atomically(root / _name_of(data), data)


def jobs_of(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """The jobs of all manifests, each once, in their order."""
    return list({job["name"]: job for manifest in manifests for job in manifest.jobs}.values())


def several_sweeps(manifests: Sequence[Manifest]) -> str | None:
    """A sentence where a directory holds the runs of several sweeps: which, and in what they differ."""
    if len(manifests) < 2:
        return None
    names = sorted({name for manifest in manifests for name in manifest.protocol})
    unlike = []
    for name in names:
        values = [manifest.protocol[name] for manifest in manifests if name in manifest.protocol]
        if any(value != values[0] for value in values):
            unlike.append(f"{name} {' and '.join(dict.fromkeys(map(str, values)))}")
    differ = f" They differ in {', '.join(unlike)}." if unlike else ""
    return (
        f"This folder holds {len(manifests)} sweeps, copied together: "
        f"{', '.join(manifest.describe() for manifest in manifests)}.{differ}"
    )


def _name_of(data: bytes) -> str:
    """What the copy of a manifest is called."""
    return f"sweep-{hashlib.sha256(data).hexdigest()[:12]}.json"


def _parse(path: Path, data: bytes) -> Manifest:
    try:
        value = strict_json.parse(data)
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r:.80}, expected {FORMAT}")
        protocol, jobs = value.get("protocol", {}), list(value["jobs"])
        if not isinstance(protocol, dict):
            raise TypeError("protocol is not an object")
        for number, job in enumerate(jobs):
            for field, kind in _FIELDS.items():
                if field not in job:
                    raise ValueError(f"job {number} has no {field!r}")
                if not isinstance(job[field], kind) or isinstance(job[field], bool):
                    raise ValueError(f"{field} of job {number} is {job[field]!r:.80}")
            if not _FOLDER.fullmatch(job["name"]):
                raise ValueError(f"job {number} has the name {job['name']!r:.80}, no folder's")
            job["test_envs"] = [int(env) for env in job["test_envs"]]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{str(path)!r} is not a list of jobs ({what}); remove it, the next launch writes it anew"
        ) from None
    return Manifest(path.name, protocol, jobs)


def _contains(one: Manifest, other: Manifest) -> bool:
    """Whether all that `other` says is in `one`, too."""
    return other.names <= one.names and other.protocol.items() <= one.protocol.items()


def _some(values: Iterable[str], limit: int = 4) -> str:
    values = list(values)
    return ", ".join(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")
