"""Figures that are kept: committed in figures.json, and compared with today's, which must not have doubled.

A machine's speed is taken out: seconds of CPU time count in units of a fixed piece of work in Python and numpy, done
beside each measurement.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "figures.json"
LIMIT = 2.0


def unit() -> float:
    """Seconds of CPU time that the fixed piece of work takes here and now, the best of three."""
    text = json.dumps([{f"field {i}": i / 7 for i in range(20)} for _ in range(2000)])
    found = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(10):
            json.loads(text)
            np.sort(np.arange(100_000) * 7919 % 100_003)
        found.append(time.process_time() - start)
    return min(found)


def check(benchmark: str, measured: Mapping[str, tuple[float, float]], settings: str, write: bool) -> list[str]:
    """What has doubled since the committed figures were made, in words.

    Args:
        benchmark: its name in figures.json.
        measured: (seconds of CPU time, megabytes) by what was measured.
        settings: what was measured on; others have no figures and are not compared.
        write: make these the committed figures.
    """
    scale = unit()
    found = {name: {"units": round(s / scale, 2), "megabytes": round(mb, 1)} for name, (s, mb) in measured.items()}
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if write:
        kept.setdefault(benchmark, {})[settings] = found
        FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    committed = kept.get(benchmark, {}).get(settings)
    if committed is None:
        print(f"no committed figures for {settings}: nothing to compare with (--write keeps these)")
        return []
    doubled = []
    for name in committed.keys() & found.keys():
        for what, value in committed[name].items():
            now = found[name][what]
            print(f"{name}: {now} {what}, committed {value} ({now / value:.2f})")
            if now > LIMIT * value:
                doubled.append(f"{name}: {now} {what}, more than {LIMIT:g} times the committed {value}")
    return doubled
