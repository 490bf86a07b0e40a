"""`benchmarks/one_shot.py`: what pruning at once costs, by scope and reconstruction."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "one_shot.py"


@pytest.fixture
def bench(monkeypatch):
    specification = importlib.util.spec_from_file_location("one_shot", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    following = ("Taylor", "global", 0.5, "reference")
    monkeypatch.setattr(module, "CASES", [module.DENSE, ("Taylor", "global", 0.5, "none"), following])
    monkeypatch.setattr(module, "FINETUNED", [module.DENSE, following])
    return module


def test_cases_are_pruned_told_and_not_computed_again(bench, tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    command = ["run", "--output", str(file), "--dataset", "FullColoredDigits", "--test_env", "2", "--steps", "60"]
    command += ["--finetune", "2", "--samples", "100", "--hparams", '{"backbone": "mnist_cnn_bn", "batch_size": 16}']
    assert bench.main(command) == 0
    dense, plain, following = bench.read(file)
    assert dense["macs"] == 1 and plain["macs"] == following["macs"] < 1
    assert plain["finetuned"] is None and following["finetuned"] is not None
    # Half of the channels gone leaves little of what the network could; what follows the dense one has most of it back.
    known, left, back = (line["at_once"]["in_domain"] for line in (dense, plain, following))
    assert left < known - 10 and back > left + 10
    capsys.readouterr()
    assert bench.main(command) == 0 and not capsys.readouterr().out
    assert bench.main(["report", str(file)]) == 0
    page = capsys.readouterr().out
    assert page.count("\n| ") == 1 + 3 and "| Taylor | global | 50% | reference |" in page
    assert bench.main([*command, "--seed", "3"]) == 1
