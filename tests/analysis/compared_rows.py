"""Rows with given accuracies, and what is said of them."""

from __future__ import annotations

import json

from runs_on_disk import record, write_run

# --- the command


def write_row(
    directory,
    algorithm: str,
    accuracies: dict[int, list[float]],
    dataset: str = "Tiny",
    sparsity: float | None = None,
    hparams: dict | None = None,
    skip: tuple[tuple[int, int], ...] = (),
    **fields,
) -> None:
    """Runs of two environments: `accuracies` by test environment, in the order of trials; without those of `skip`."""
    for env, values in accuracies.items():
        for trial, value in enumerate(values):
            if (env, trial) in skip:
                continue
            splits = [0.5, 0.5, 0.5, 0.5]
            splits[2 * env] = value
            if sparsity is not None:
                parts = {"parameters": 1000, "dense_macs": 4000}
                left = {"surviving_parameters": round(1000 * (1 - sparsity)), "macs": round(4000 * (1 - sparsity))}
                fields = {**parts, **left, **fields, "sparsity": sparsity}
            one = record(
                tuple(splits),
                algorithm=algorithm,
                dataset=dataset,
                trial_seed=trial,
                test_envs=(env,),
                args={"hparams": json.dumps(hparams)} if hparams else {},
                hparams=hparams,
                **fields,
            )
            write_run(directory, f"{dataset}-{algorithm}-{json.dumps(hparams)}-{env}-{trial}".replace('"', ""), [one])
