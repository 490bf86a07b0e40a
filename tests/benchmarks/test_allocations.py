"""`benchmarks/allocations.py`: whether the best static allocation of bit-widths depends on quality."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from domainbed_sfp.core.errors import UserError

PATH = Path(__file__).parents[2] / "benchmarks" / "allocations.py"


@pytest.fixture(scope="module")
def bench():
    specification = importlib.util.spec_from_file_location("allocations", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_all_allocations_of_a_few_layers_at_equal_bitops(bench):
    """By hand: layers of 1, 2 and 2 MACs at 3 bits have 45 bit operations; 41 to 45 are within a tenth."""
    assert bench.allocations([1, 2, 2], 3) == {
        **{"2-2-4": (2, 2, 4), "2-4-2": (2, 4, 2), "3-3-3": (3, 3, 3)},
        **{"4-2-3": (4, 2, 3), "4-3-2": (4, 3, 2), "5-2-2": (5, 2, 2)},
    }


def test_allocations_of_many_layers_take_the_same_bitops(bench):
    macs = [100 - 4 * index for index in range(20)]
    found = bench.allocations(macs, 4)
    budget = 16 * sum(macs)
    assert found["uniform"] == (4,) * 20
    early, late = found["early layers wide"], found["late layers wide"]
    assert early == tuple(sorted(early, reverse=True)) and late == tuple(sorted(late)) and early[0] > 4 > 3 > early[-1]
    assert found["ends wide"][0] > found["ends wide"][10] and found["middle wide"][0] < found["middle wide"][10]
    for name, widths in found.items():
        cost = sum(count * width**2 for count, width in zip(macs, widths))
        assert 0.95 * budget <= cost <= budget, name
    assert len(set(found.values())) == len(found)


CASES = [("none", 0)] + [(kind, severity) for kind in ("blur", "noise") for severity in (1, 2)]


def lines_of(accuracies: np.ndarray) -> list[dict]:
    """Lines as `run` writes them, of accuracies [seeds, cases, allocations] in percent."""
    values = {"batch_size": 8, "image_size": 8, "backbone": "mnist_cnn_bn"}
    settings = {"dataset": "Made", "test_env": 2, "steps": 1, "finetune": 1, "samples": 10, "hparams": values}
    return [
        {
            **{"settings": settings, "seed": seed, "bits": 3, "allocation": f"a{index}", "bitops": 0.15},
            **{"images": 10, "commit": "c" * 40, "environment": {"cpu": "a CPU", "torch": "2.0"}},
            "cases": [[*case, accuracies[seed, position, index] / 100] for position, case in enumerate(CASES)],
        }
        for seed in range(len(accuracies))
        for index in range(accuracies.shape[2])
    ]


def gains(bench, accuracies: np.ndarray) -> dict[str, list[str]]:
    page = list(bench.page_of(lines_of(accuracies)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if row[0] in ("degradation and severity", "degradation", "severity")}


def test_a_premise_that_holds_is_found(bench):
    """Noise is best served by one allocation, everything else by another, 5 points each; seeds differ by far more."""
    rng = np.random.default_rng(0)
    accuracies = np.full((6, 5, 3), 60.0) + rng.normal(0, 10, (6, 1, 1)) + rng.normal(0, 1, (6, 5, 3))
    accuracies[:, 3:, 1] += 5
    accuracies[:, :3, 0] += 5
    found = gains(bench, accuracies)
    # Two of five cases are 5 points better off, or nearly.
    assert float(found["degradation"][1]) == pytest.approx(2.0, abs=0.7) and float(found["degradation"][3]) < 0.01
    assert float(found["degradation and severity"][1]) == pytest.approx(2.0, abs=0.9)
    # Severity tells nothing of which is better.
    assert float(found["severity"][1]) < 0.5


def test_chance_alone_makes_no_premise(bench):
    """Allocations all alike: the best of each case seems ahead on the same images, and is not on others."""
    rng = np.random.default_rng(1)
    accuracies = 60 + rng.normal(0, 10, (8, 1, 1)) + rng.normal(0, 2, (8, 5, 10))
    found = gains(bench, accuracies)["degradation and severity"]
    assert float(found[0]) > 0.7
    assert abs(float(found[1])) < 0.7 and float(found[3]) > 0.05


def test_seeds_that_lack_an_allocation_wait(bench):
    lines = lines_of(np.arange(2 * 5 * 3, dtype=float).reshape(2, 5, 3))
    assert bench.table_of(lines[:-1])[2].shape == (1, 5, 3)
    with pytest.raises(UserError, match="needs two whole seeds"):
        list(bench.page_of(lines[:-1]))


def test_a_run_goes_on_where_it_was_and_is_told(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "allocations", lambda macs, bits: {"3-3-3": (3, 3, 3), "5-2-2": (5, 2, 2)})
    file = tmp_path / "found.jsonl"
    small = ["run", "--output", str(file), "--steps", "2", "--finetune", "1", "--samples", "4", "--bits", "3",
             "--hparams", '{"backbone": "mnist_cnn_bn", "batch_size": 4}']  # fmt: skip
    assert bench.main([*small, "--seeds", "2"]) == 0
    whole = file.read_text().splitlines()
    assert len(whole) == 4 and {json.loads(line)["seed"] for line in whole} == {90, 91}
    file.write_text("\n".join(whole[:3]) + "\n")
    assert bench.main([*small, "--seeds", "2"]) == 0

    def results(lines):
        return [json.loads(line)["cases"] for line in lines]

    assert results(file.read_text().splitlines()) == results(whole)
    assert json.loads(whole[0])["bitops"] < 0.16 and len(json.loads(whole[0])["cases"]) == 26
    capsys.readouterr()
    assert bench.main(["report", str(file)]) == 0
    page = capsys.readouterr().out
    assert "2 allocations, 2 seeds" in page and "| jpeg | 5 |" in page
    assert bench.main([*small, "--finetune", "2"]) == 2
    assert "other settings" in capsys.readouterr().err
