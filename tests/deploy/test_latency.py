"""The latency of a network with and without its dead channels."""

from __future__ import annotations

import json

import pytest
import torch

from domainbed_sfp.deploy import latency

pytest.importorskip("torch_pruning", reason="the extra `export` is not installed")


# Latency ------------------------------------------------------------------------------------------------------------


def test_latency_prints_a_table_and_writes_the_numbers(run, main, tmp_path):
    done = main(
        "latency",
        run,
        "--batch_sizes",
        1,
        3,
        "--repeats",
        4,
        "--threads",
        1,
        "--output",
        "times.json",
        "--device",
        "cpu",
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[0][0] == "batch" and [row[0] for row in rows[1:3]] == ["1", "3"] and "1 threads" in rows[3][0]
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["environment"]["threads"] == 1 and report["environment"]["torch"] == torch.__version__
    assert report["macs"] < report["dense_macs"] and report["stored_zeros"] == 0
    for entry, row in zip(report["latency"], rows[1:]):
        for name in ("dense", "exported"):
            assert 0 < entry[name]["lower_quartile"] <= entry[name]["median"] <= entry[name]["upper_quartile"]
        assert entry["speedup"] == entry["dense"]["median"] / entry["exported"]["median"]
        assert row[3] == f"{entry['speedup']:.2f}"


def test_batches_of_the_two_networks_alternate():
    calls = []

    def step(name: str):
        return lambda: calls.append(name) or len(calls)

    assert latency.alternate([step("a"), step("b")], warmup=1, repeats=2) == [[4, 5], [3, 6]]
    assert "".join(calls) == "abbaab"
    timing = latency.Timing.of([0.001, 0.002, 0.003, 0.004, 0.010])
    assert (timing.lower_quartile, timing.median, timing.upper_quartile) == pytest.approx((2, 3, 4))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("--repeats", 0), "--repeats: expected whole numbers of at least 1, got 0"),
        (("--batch_sizes", 4, -1), "--batch_sizes"),
        (("--batch_sizes", 10**13), "--batch_sizes: expected whole numbers of at most 1000000, got 10000000000000"),
        (("--threads", 0), "--threads"),
        (("--device", "tpu"), "--device"),
        (("--output", "nowhere/times.json"), "--output"),
    ],
)
def test_latency_of_settings_that_cannot_be(run, main, arguments, part):
    done = main("latency", run, *arguments, check=False)
    assert done.returncode == 2 and part in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_batch_that_does_not_fit_is_named(run, main, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("cannot alloc")

    monkeypatch.setattr(latency, "alternate", full)
    done = main("latency", run, "--batch_sizes", 1000, check=False)
    assert done.returncode == 2 and "a batch of 1000 images does not fit into the memory of cpu" in done.stderr
