"""Time and memory of a sweep of 50,000 jobs: planning its launch, its status, its tables.

    python benchmarks/sweep_scale.py [--jobs 50000] [--records 18] [--plan] [--write]

Ends with status 1 where a promise is missed, or time or memory is more than twice the committed figures (figures.py);
--write commits these. DomainBed's full grid is of that size.

Of the made runs, 18 in 20 are done, one is not finished and one not begun.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import figures
import yaml
from collect import ROOT, measure, write_run

from domainbed_sfp.algorithms import registry
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.sweep.directory import Job, SweepDirectory
from domainbed_sfp.sweep.spec import make_jobs, read_spec

# They need no files, and have 3, 3, 3 and 6 environments: 39 singles and pairs.
DATASETS = ("FullColoredDigits", "ColoredDigits", "TexturedDigits", "RotatedDigits")
# Seconds, and megabytes for all.
LIMITS = {"launch": 20.0, "status": 10.0, "collect": 40.0}
MEMORY_LIMIT = 4096.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--records", type=int, default=18)
    parser.add_argument("--plan", action="store_true", help="measure the launch's plan alone")
    parser.add_argument("--write", action="store_true", help="make these the committed figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        spec, sweep = Path(directory) / "spec.yaml", Path(directory) / "sweep"
        jobs = write_spec(spec, arguments.jobs)
        print(f"{len(jobs)} jobs x {arguments.records} records")
        command = [sys.executable, "-m", "domainbed_sfp"]
        flags = [str(spec), "--output_dir", str(sweep)]
        measured = {"launch": measure("launch plan", [*command, "sweep", "launch", *flags, *DUMMY], ROOT)}
        if not arguments.plan:
            write_runs(sweep, jobs, arguments.records)
            again = [*command, "sweep", "launch", *flags, *DUMMY]
            measured["launch again"] = measure("launch plan again", again, ROOT)
            measured["status"] = measure("status", [*command, "sweep", "status", *flags], ROOT)
            measured["collect"] = measure("collect", [*command, "collect", "--input_dir", str(sweep)], ROOT)
    missed = [name for name, limit in LIMITS.items() if name in measured and measured[name].wall > limit]
    missed += [f"memory of {name}" for name, one in measured.items() if one.megabytes > MEMORY_LIMIT]
    promise = ", ".join(f"{name} {limit:.0f} s" for name, limit in LIMITS.items())
    print(f"promised for 50,000 jobs: {promise}, {MEMORY_LIMIT / 1024:.0f} GiB: {missed or 'kept'}")
    settings = f"{len(jobs)} jobs x {arguments.records} records"
    costs = {name: one.cost for name, one in measured.items()}
    doubled = figures.check("sweep_scale", costs, settings, arguments.write)
    print("\n".join(doubled) or "nothing has doubled")
    return 1 if missed or doubled else 0


DUMMY = ("--command_launcher", "dummy", "--skip_confirmation")


def write_spec(file: Path, count: int) -> list[Job]:
    """A grid of at least `count` jobs: as many algorithms as it takes, then more random hparams."""
    names = list(registry.names())
    per_algorithm = (
        3 * 20 * sum(n * (n + 1) // 2 for n in (len(get_dataset_class(d).environment_names()) for d in DATASETS))
    )
    algorithms = names[: max(1, -(-count // per_algorithm))]
    contents = {
        "datasets": list(DATASETS),
        "algorithms": algorithms,
        "n_hparams": max(1, -(-count * 20 // (per_algorithm * len(algorithms)))),
        "n_trials": 3,
    }
    file.write_text(yaml.safe_dump(contents))
    return make_jobs(read_spec(str(file)), None)


def write_runs(directory: Path, jobs: list[Job], records: int) -> None:
    """Records in the folders that the sweep gives its jobs."""
    started = time.perf_counter()
    for number, (job, folder) in enumerate(SweepDirectory(directory).job_dirs(jobs).items()):
        if number % 20 != 7:
            args = asdict(job.settings(None, folder))
            environments = len(get_dataset_class(job.dataset).environment_names())
            write_run(folder, args, records, environments, done=number % 20 != 13)
    print(f"wrote the runs in {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
