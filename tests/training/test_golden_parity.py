"""Seeds, hparams, splits, sweep jobs and data-set constants against values that DomainBed computed."""

from __future__ import annotations

import hashlib
import json
import shlex

import numpy as np
import pytest

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.hparam import Hparam
from domainbed_sfp.core.seeds import seed_hash
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.splits import split_environment
from domainbed_sfp.sweep.job import command_line
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs
from domainbed_sfp.training.hparams import resolve_hparams


def test_seed_hash(golden):
    for case in golden("seed_hash.json")["seed_hash"]:
        assert seed_hash(*case["args"]) == case["hash"], case


def test_seed_hash_does_not_depend_on_numpys_repr():
    assert seed_hash(np.int64(3), np.float64(0.5), "a") == seed_hash(3, 0.5, "a")


def test_hparam_draws(golden):
    samplers = {
        "uniform_0_1": lambda r: r.uniform(0, 1),
        "10**uniform(-5,-3.5)": lambda r: 10 ** r.uniform(-5, -3.5),
        "int(2**uniform(3,5.5))": lambda r: int(2 ** r.uniform(3, 5.5)),
        "choice[0,0.1,0.5]": lambda r: r.choice([0.0, 0.1, 0.5]),
        "choice[1,2]": lambda r: r.choice([1, 2]),
        "randint(0,1000)": lambda r: r.randint(0, 1000),
    }
    for case in golden("hparam_draws.json"):
        assert seed_hash(case["random_seed"], case["name"]) == case["rs_seed"]
        for sampler, sample in samplers.items():
            drawn = Hparam(None, sample).draw(case["name"], case["random_seed"])
            assert drawn == case[sampler], (case["name"], sampler)
            assert type(drawn) in (int, float)


def test_hparams_of_every_run(golden):
    """825 runs: for an algorithm we have, every hparam of DomainBed's; for others, all that algorithms share."""
    shared = set(registry.names())
    compared = 0
    for key, expected in golden("hparams.json")["hparams"].items():
        algorithm, dataset, hparams_seed, trial_seed = key.split("/")
        known = algorithm if algorithm in shared else "ERM"
        ours = resolve_hparams(known, dataset, int(hparams_seed.split("=")[1]), int(trial_seed.split("=")[1]))
        for name, value in expected.items():
            if algorithm not in shared and name not in ours:
                continue
            assert ours[name] == value and type(ours[name]) is type(value), (key, name)
            compared += 1
        assert json.loads(json.dumps(ours)) == ours
    assert compared > 12_000


def test_splits(golden):
    for case in golden("splits.json")["splits"]:
        assert seed_hash(case["trial_seed"], case["env_i"]) == case["seed"]
        split = split_environment(
            case["n"], case["env_i"], case["trial_seed"], case["holdout_fraction"], case["uda_holdout_fraction"]
        )
        for name, keys in (("out", split.out), ("in", split.in_), ("uda", split.uda)):
            if f"{name}_md5" not in case:
                continue
            keys = [int(key) for key in keys]
            assert len(keys) == case[f"{name}_len"] and keys[:20] == case[f"{name}_first20"], case
            assert hashlib.md5(json.dumps(keys, separators=(",", ":")).encode()).hexdigest() == case[f"{name}_md5"]


@pytest.mark.parametrize("case", range(55))
def test_sweep_jobs(golden, case):
    """Arguments, seed, folder name and command of each job, as DomainBed's sweep has them."""
    expected = golden("sweep_jobs.json")[case]
    args = expected["train_args"]
    algorithm = args["algorithm"] if args["algorithm"] in registry.names() else "ERM"
    spec = SweepSpec(
        datasets=[args["dataset"]],
        algorithms=[algorithm],
        test_envs=[args["test_envs"]],
        n_hparams_from=args["hparams_seed"],
        n_hparams=args["hparams_seed"] + 1,
        n_trials=args["trial_seed"] + 1,
        steps=args.get("steps"),
        hparams=json.loads(args["hparams"]) if "hparams" in args else {},
        holdout_fraction=args["holdout_fraction"],
    )
    job = make_jobs(spec, args["data_dir"])[-1]
    assert (
        seed_hash(args["dataset"], args["algorithm"], args["test_envs"], args["hparams_seed"], args["trial_seed"])
        == args["seed"]
    )
    if algorithm != args["algorithm"]:
        return
    assert job.domainbed_args(args["data_dir"]) == args
    folder = expected["output_dir"]
    assert job.domainbed_name(args["data_dir"]) == folder.rsplit("/", 1)[1]
    theirs = shlex.split(expected["command"])[3:]
    ours = command_line(job.settings(args["data_dir"], folder))[1:]
    defaults = {"--hparams_seed": "0", "--trial_seed": "0", "--task": "domain_generalization", "--holdout_fraction": "0.2",
                "--algorithm": "ERM", "--dataset": "RotatedMNIST"}  # fmt: skip
    assert _flags(theirs) == {**{k: [v] for k, v in defaults.items()}, **_flags(ours)}


def _flags(words: list[str]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flags[word] = []
            current = word
        else:
            flags[current].append(word)
    return flags


def test_order_of_a_whole_sweep(golden):
    """A grid that the golden jobs contain whole, in DomainBed's order of loops."""
    jobs = [case["train_args"] for case in golden("sweep_jobs.json")]
    first = [args for args in jobs if args["dataset"] == jobs[0]["dataset"] and "steps" not in args]
    test_envs = list(dict.fromkeys(tuple(args["test_envs"]) for args in first))
    algorithms = list(dict.fromkeys(args["algorithm"] for args in first))
    if not all(name in registry.names() for name in algorithms):
        pytest.skip("the first grid of the golden file has algorithms that are not here")
    n_hparams = 1 + max(args["hparams_seed"] for args in first)
    n_trials = 1 + max(args["trial_seed"] for args in first)
    spec = SweepSpec([jobs[0]["dataset"]], algorithms, n_hparams=n_hparams, n_trials=n_trials,
                     test_envs=[list(envs) for envs in test_envs])  # fmt: skip
    ours = [job.domainbed_args(first[0]["data_dir"]) for job in make_jobs(spec, None)]
    assert [args for args in ours if args in first] == [args for args in first if args in ours] and len(ours) >= len(
        first
    )


def test_single_and_pair_test_environments():
    spec = SweepSpec(["PACS"], ["ERM"], n_hparams=1, n_trials=1)
    pairs = [list(job.test_envs) for job in make_jobs(spec, None)]
    assert pairs == [[0], [0, 1], [0, 2], [0, 3], [1], [1, 2], [1, 3], [2], [2, 3], [3]]


@pytest.mark.parametrize(
    "name", ["ColoredMNIST", "RotatedMNIST", "VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet"]
)
def test_data_set_constants(golden, name):
    expected = golden("registry.json")["datasets"][name]
    ours = get_dataset_class(name)
    for constant in ("ENVIRONMENTS", "N_STEPS", "CHECKPOINT_FREQ"):
        assert getattr(ours, constant) == expected[constant]
