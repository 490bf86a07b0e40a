"""Writes what must not change by accident into frozen/: `python tests/golden/make_frozen.py [FOLDER]` in the checkout's root.

The help of every command, the jobs of every shipped spec, the random draws of every algorithm's hparams, and of every
algorithm a run of a few steps with the file its network is exported to. A change on purpose writes them anew and says
so in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
FROZEN = Path(__file__).parent / "frozen"

STEPS, DATASET = 20, "FullColoredDigits"
SETTINGS = {"batch_size": 16}
# Of a record, what the place and the time decide.
VARYING = (
    "args", "commit", "environment", "hparams", "images_per_second", "mem_gb", "step_time", "wall_time",
)  # fmt: skip


def helps() -> dict[str, str]:
    """The help of every command, by the words that call it."""
    os.environ["COLUMNS"] = "120"
    from domainbed_sfp.cli import main as cli

    found = {}

    def note(words: str, parser: argparse.ArgumentParser) -> None:
        found[words] = parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, below in action.choices.items():
                    note(f"{words} {name}", below)

    note("domainbed-sfp", cli.make_parser())
    return found


def jobs() -> dict[str, dict[str, Any]]:
    """How many jobs every shipped spec has, and a hash of the names of their folders."""
    from domainbed_sfp.sweep.spec import make_jobs, read_spec, shipped_specs

    found = {}
    for spec in shipped_specs():
        names = sorted(job.name for job in make_jobs(read_spec(spec), None))
        found[spec] = {"jobs": len(names), "names": hashlib.sha256("\n".join(names).encode()).hexdigest()}
    return found


def draws(algorithm: str) -> dict[str, list[Any]]:
    """Two random draws of the hparams that a search draws for the algorithm and a data set of ours does not fix."""
    from domainbed_sfp.training import hparams

    found = {}
    for dataset in (DATASET, "PACS"):
        table = hparams.hparam_table(algorithm, dataset)
        drawn = [hparams.resolve_hparams(algorithm, dataset, seed, 0) for seed in (1, 2)]
        found[dataset] = {name: [draw[name] for draw in drawn] for name in sorted(table) if table[name].sample}
    return found


def run(algorithm: str) -> dict[str, Any]:
    """The last record of a run of STEPS steps, and size and tensors of its exported file (a message where it has none)."""
    import domainbed_sfp as dsfp
    from domainbed_sfp.deploy.export import export

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made = dsfp.RunSettings(
            dataset=DATASET, algorithm=algorithm, test_envs=[2], steps=STEPS, checkpoint_freq=STEPS,
            output_dir=f"{folder}/run", hparams=json.dumps(SETTINGS),
        )  # fmt: skip
        dsfp.train(made)
        lines = Path(folder, "run", "results.jsonl").read_text().splitlines()
        record = {name: value for name, value in json.loads(lines[-1]).items() if name not in VARYING}
        try:
            export(f"{folder}/run", f"{folder}/network.safetensors")
            data = Path(folder, "network.safetensors").read_bytes()
            exported: Any = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        except dsfp.UserError as error:
            exported = str(error).replace(folder, "")
    return {"records": len(lines), "record": record, "exported": exported}


def place() -> dict[str, str | int]:
    """Where the same arithmetic gives the same digits."""
    import torch

    from domainbed_sfp.core import provenance

    return provenance.fingerprint(torch.device("cpu"))


def write(folder: Path) -> None:
    from domainbed_sfp.algorithms import registry

    folder.mkdir(exist_ok=True, parents=True)
    names = registry.names()
    parts = {
        "help": helps(),
        "jobs": jobs(),
        "draws": {name: draws(name) for name in names},
        "runs": {name: run(name) for name in names},
        "place": place(),
    }
    for name, part in parts.items():
        text = json.dumps(part, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FROZEN)
