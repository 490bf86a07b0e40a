"""Real sweeps of a few steps, computed in this process."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs
from domainbed_sfp.training import train as training


def compute_sweep(root: Path, spec: SweepSpec, *, skip_model_save: bool = True, **changes: Any) -> Path:
    """The runs of all jobs of a spec in `root`, one after another, with some settings changed."""
    jobs = make_jobs(spec, None)
    directory = SweepDirectory(root)
    directory.register(jobs)
    for job in jobs:
        settings = job.settings(None, directory.job_dir(job), skip_model_save=skip_model_save)
        with contextlib.redirect_stdout(io.StringIO()):
            training.train(replace(settings, **changes))
    return root
