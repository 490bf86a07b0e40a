"""Every registered algorithm, those of other packages included, through the contract suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from domainbed_sfp import contract, registry

VARIANTS = {
    "Magnitude": [{"granularity": "weight"}, {"pruning_scope": "global", "granularity": "weight"}, {"objective": "VREx"},
                  {"objective": "CORAL"}, {"prune_start": 0.5, "prune_end": 0.5}],
    "Random": [{"granularity": "weight"}, {"objective": "Mixup"}],
    "LotteryTicket": [{"granularity": "weight"}, {"objective": "IRM", "irm_penalty_anneal_iters": 6, "rewind": 0.1}],
    "SNIP": [{"granularity": "weight"}, {"pruning_scope": "global", "sparsity": 0.7, "objective": "GroupDRO"}],
    "GraSP": [{"granularity": "weight"}],
    "Taylor": [{"granularity": "weight"}, {"pruning_scope": "global", "objective": "CORAL"}],
    "NetworkSlimming": [{"pruning_scope": "layer", "objective": "VREx"}],
    "RigL": [{"sparsity_distribution": "uniform", "sparsity": 0.9}, {"objective": "Mixup"}],
    "MRM": [{"granularity": "channel"}, {"pruning_scope": "global", "sparsity": 0.7}],
    "ModIRM": [{"granularity": "channel", "irm_penalty_anneal_iters": 6}],
    "ModREx": [{"granularity": "channel"}],
    "ModGroupDRO": [{"granularity": "channel"}],
    "SparseIRM": [{"granularity": "channel"}, {"objective": "VREx", "pruning_scope": "layer"},
                  {"granularity": "channel", "vrex_penalty_anneal_iters": 4, "objective": "VREx", "mask_rule": "threshold"}],
    "DCWP": [{"granularity": "channel"}, {"pruning_scope": "global"}],
    "GlobalPru": [{"rank_loss": "ranknet", "voting": "borda", "objective": "CORAL", "backbone": "mnist_cnn_bn"},
                  {"rank_loss": "hinge", "voting": "mean", "vote_window": 0.2, "sparsity": 0.8}, {"rank_weight": 0.0, "objective": "Mixup"}],
    "DQMQ": [{"reinforce": 0.5}, {"objective": "CORAL", "backbone": "mnist_cnn_bn"}],
    "UniformQuant": [{"quantize_start": 0.3, "bits": 3}],
    "EVIL": [{"objective": "CORAL", "pruning_scope": "global", "sparsity": 0.7, "update_interval": 0.2}],
}  # fmt: skip


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", registry.names())
def test_contract(name, check):
    contract.CHECKS[check](name)


@pytest.mark.parametrize("name, overrides", [(name, case) for name, cases in VARIANTS.items() for case in cases])
def test_contract_of_variants(name, overrides, monkeypatch):
    plain = contract.make
    monkeypatch.setattr(contract, "make", lambda name, **options: plain(name, overrides=overrides, **options))
    for title, check in contract.CHECKS.items():
        if title != "never_touches_the_test_environment":  # a whole run, which knows no overrides: done above
            check(name)


def test_an_installed_package_adds_an_algorithm(tmp_path):
    """A distribution with the entry point is found by the command line and passes the contract; a second one with a
    name that is taken is an error that names both."""
    site = tmp_path / "site"
    _install(site, "mypkg", "MyMethod")
    found = _python(site, "from domainbed_sfp import contract, registry; assert 'MyMethod' in registry.names();"
                          "[check('MyMethod') for check in contract.CHECKS.values()]; print('passed')")  # fmt: skip
    assert found.stdout.strip() == "passed", found.stderr
    listed = _python(site, "from domainbed_sfp.cli import main; main(['list', 'algorithms'])")
    assert "MyMethod" in listed.stdout
    _install(site, "other", "ERM")
    clash = _python(site, "from domainbed_sfp.cli import main; main(['list', 'algorithms'])")
    assert clash.returncode == 2 and len(clash.stderr.splitlines()) == 1
    assert "'ERM'" in clash.stderr and "other.method" in clash.stderr and "algorithms.erm" in clash.stderr


def _install(site: Path, package: str, name: str) -> None:
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").write_text("")
    (site / package / "method.py").write_text(
        "from domainbed_sfp.algorithms.erm import ERM\n"
        "from domainbed_sfp.registry import register\n\n"
        f"@register({name!r}, family='pruning', reference='here', standing='published')\n"
        "class Method(ERM):\n    '''A method.'''\n"
    )
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[domainbed_sfp.algorithms]\n{package} = {package}.method\n")


def _python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
