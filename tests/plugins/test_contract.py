"""Every registered algorithm, those of other packages included, through the contract suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed_sfp.algorithms import registry
from domainbed_sfp.plugins import contract

VARIANTS = {
    "Magnitude": [{"granularity": "weight"}, {"pruning_scope": "global", "granularity": "weight"}, {"objective": "VREx"},
                  {"objective": "CORAL"}, {"prune_start": 0.5, "prune_end": 0.5}],
    "Random": [{"granularity": "weight"}, {"objective": "Mixup"}],
    "LotteryTicket": [{"granularity": "weight"}, {"objective": "IRM", "irm_penalty_anneal_iters": 6, "rewind": 0.1}],
    "SNIP": [{"granularity": "weight"}, {"pruning_scope": "global", "sparsity": 0.7, "objective": "GroupDRO"}],
    "GraSP": [{"granularity": "weight"}],
    "Taylor": [{"granularity": "weight"}, {"pruning_scope": "global", "objective": "CORAL"},
               {"reconstruction": "least_squares", "objective": "Mixup"}],
    "OBS": [{"pruning_scope": "global", "backbone": "mnist_cnn_bn", "objective": "CORAL"}],
    "NetworkSlimming": [{"pruning_scope": "layer", "objective": "VREx"}],
    "RigL": [{"sparsity_distribution": "uniform", "sparsity": 0.9}, {"objective": "Mixup"}],
    "MRM": [{"granularity": "channel"}, {"pruning_scope": "global", "sparsity": 0.7}],
    "ModIRM": [{"granularity": "channel", "irm_penalty_anneal_iters": 6}],
    "ModREx": [{"granularity": "channel"}],
    "ModGroupDRO": [{"granularity": "channel"}],
    "SparseIRM": [{"granularity": "channel"}, {"objective": "VREx", "pruning_scope": "layer"},
                  {"granularity": "channel", "vrex_penalty_anneal_iters": 4, "objective": "VREx", "mask_rule": "threshold"}],
    "DCWP": [{"granularity": "channel"}, {"pruning_scope": "global"}],
    "SFPAligned": [{"reconstruction": "least_squares"}],
    "GlobalPru": [{"objective": "CORAL", "backbone": "mnist_cnn_bn", "sparsity": 0.6}, {"rank_weight": 0.0, "objective": "Mixup", "pruning_scope": "global", "vote_by": "attention"}],
    "DQMQ": [{"reinforce": 0.5}, {"objective": "CORAL", "backbone": "mnist_cnn_bn"}],
    "UniformQuant": [{"quantize_start": 0.3, "bits": 3}],
    "EVIL": [{"objective": "CORAL", "sparsity": 0.7, "update_interval": 0.2}],
}  # fmt: skip

# What knows no overrides; that a second run is as the first one is what `exact_resume` compares by, too.
DONE_ABOVE = ("never_touches_the_test_environment", "hparams_are_json", "deterministic")


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", registry.names())
def test_contract(name, check):
    if check == "degenerate_batches" and name in ("SFP", "SFPWeighted"):  # SFPAligned takes no statistics so early
        with pytest.warns(UserWarning, match="which gives no contrast"):
            contract.CHECKS[check](name)
    else:
        contract.CHECKS[check](name)


@pytest.mark.parametrize("name, overrides", [(name, case) for name, cases in VARIANTS.items() for case in cases])
def test_contract_of_variants(name, overrides, monkeypatch):
    plain = contract.make
    monkeypatch.setattr(contract, "make", lambda name, **options: plain(name, overrides=overrides, **options))
    for title, check in contract.CHECKS.items():
        if title not in DONE_ABOVE:
            check(name)


def test_an_installed_package_adds_an_algorithm(tmp_path):
    """A distribution with the entry point is found by the command line and by the contract, all of which `new`'s test
    goes through; a second one with a name that is taken, and one that cannot be loaded, are left out with a warning that says why."""
    site = tmp_path / "site"
    _install(site, "mypkg", "MyMethod")
    _install(site, "other", "ERM")
    _install(site, "third", "Third")
    (site / "third" / "method.py").write_text("import a_module_that_is_missing\n")
    listed = _python(site, "from domainbed_sfp.cli.main import main; from domainbed_sfp.plugins import contract;"
                           "contract.CHECKS['predict_gives_logits']('MyMethod'); print('passed'); main(['list', 'algorithms'])")  # fmt: skip
    assert listed.returncode == 0 and listed.stdout.startswith("passed\n") and "MyMethod" in listed.stdout, (
        listed.stderr
    )
    clash, broken = sorted(listed.stderr.splitlines())
    assert "'ERM'" in clash and "other.method" in clash and "algorithms.objectives.erm" in clash
    assert "entry point 'third' of third" in broken and "a_module_that_is_missing" in broken


def test_a_run_knows_the_code_of_a_package(tmp_path):
    """One that has changed since neither goes on with a run nor with a sweep."""
    site = tmp_path / "site"
    _install(site, "mypkg", "MyMethod")
    program = f"""
import contextlib, os, signal
from domainbed_sfp.training.console import Console
from domainbed_sfp.cli import main as cli
from domainbed_sfp.training import train as training
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.training.interruption import Interrupted
from domainbed_sfp.core.errors import UserError

def train():
    training.train(RunSettings(dataset="ColoredDigits", steps=3, checkpoint_freq=1, algorithm="MyMethod",
                                      skip_model_save=True, output_dir={str(tmp_path / "run")!r}))

def sweep():
    with contextlib.suppress(SystemExit):
        cli.main("sweep launch --datasets ColoredDigits --algorithms MyMethod --n_trials 1 --n_hparams 1 "
                 "--command_launcher dummy --output_dir {tmp_path / "out"}".split())
"""
    before = (
        program
        + """
plain = Console.row
Console.row = lambda *a: (plain(*a), os.kill(os.getpid(), signal.SIGTERM))
with contextlib.suppress(Interrupted):
    train()
sweep()
"""
    )
    found = _python(site, before)
    assert found.returncode == 0 and "saving and stopping" in found.stderr and "error" not in found.stderr, found.stderr
    with open(site / "mypkg" / "method.py", "a") as file:
        file.write("    changed = True\n")
    after = (
        program
        + f"""
import shutil, sys
sweep()
try:
    train()
except UserError as error:
    print(error, file=sys.stderr)
shutil.rmtree({str(tmp_path / "run")!r})
train()
"""
    )
    found = _python(site, after)
    assert found.returncode == 0, found.stderr
    assert "holds a run of MyMethod by other code" in found.stderr
    assert "holds another sweep (code of MyMethod" in found.stderr
    last = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert len(last["code"]) == 12


def _install(site: Path, package: str, name: str) -> None:
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").write_text("")
    (site / package / "method.py").write_text(
        "from domainbed_sfp.algorithms.objectives.erm import ERM\n"
        "from domainbed_sfp.algorithms.registry import register\n\n"
        f"@register({name!r}, family='pruning', reference='here', standing='published')\n"
        "class Method(ERM):\n    '''A method.'''\n"
    )
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[domainbed_sfp.algorithms]\n{package} = {package}.method\n")


def _python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
