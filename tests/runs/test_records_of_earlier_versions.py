"""Runs whose hparams are those of an earlier version: tabulated, read back, built again, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import domainbed_sfp as dsfp
from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.tensor_files import load_tensors
from domainbed_sfp.training.hparams import checked_overrides, resolve_hparams

RESULTS = Path(__file__).parents[2] / "results"


def recorded_hparams() -> dict[str, dict[str, dict]]:
    """By algorithm, every set of hparams that a record of results/ has."""
    found: dict[str, dict[str, dict]] = {}
    for file in sorted(RESULTS.rglob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "args" in record and "hparams" in record:
                values = record["hparams"]
                found.setdefault(record["args"]["algorithm"], {})[json.dumps(values, sort_keys=True)] = values
    return found


def test_every_shipped_record_is_of_a_run_that_can_be_built():
    found = recorded_hparams()
    assert {"SFP", "GlobalPru", "DQMQ", "MRM", "EVIL", "RigL"} <= found.keys()
    for algorithm, each in found.items():
        info = registry.get(algorithm)
        needed = info.hparams.keys()
        for values in each.values():
            built = info.checked(values)
            assert needed <= built.keys() and not info.retired.keys() & built.keys()


@pytest.mark.parametrize("name", registry.names())
def test_retired_hparams_are_no_hparams(name):
    info = registry.get(name)
    assert not info.retired.keys() & info.hparams.keys()
    values = resolve_hparams(name, "FullColoredDigits")
    assert checked_overrides(name, "FullColoredDigits", info.retired) == {}
    assert resolve_hparams(name, "FullColoredDigits", overrides=info.retired) == values
    for retired, value in info.retired.items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "else"
        with pytest.raises(UserError, match=f"{retired!r} of {name} is .* built in as .* `commit`"):
            resolve_hparams(name, "FullColoredDigits", overrides={retired: other})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of SFP with its model."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    dsfp.train(
        dsfp.RunSettings(
            dataset="FullColoredDigits", algorithm="SFP", test_envs=[2], steps=20, checkpoint_freq=20, output_dir=str(folder),
            hparams=json.dumps({"batch_size": 16}),
        )
    )  # fmt: skip
    return folder


def as_if_saved_by_an_earlier_version(folder: Path, **hparams) -> None:
    saved = load_tensors(folder / "model.pkl")
    saved["model_hparams"] = {**saved["model_hparams"], **registry.get("SFP").retired, **hparams}
    torch.save(saved, folder / "model.pkl")


def test_a_model_of_an_earlier_version_is_loaded(trained):
    expected = dsfp.load_run(trained)
    as_if_saved_by_an_earlier_version(trained)
    found = dsfp.load_run(trained)
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(found.predict(x), expected.predict(x))
    as_if_saved_by_an_earlier_version(trained, refresh=0.2)
    with pytest.raises(UserError, match=r"'refresh' of SFP is 0\.2: it is built in as 0\.05 now; only the version"):
        dsfp.load_run(trained)


def test_a_record_with_another_value_is_tabulated(trained):
    record = json.loads((trained / "results.jsonl").read_text().splitlines()[-1])
    record["hparams"]["refresh"] = 0.2
    (trained / "results.jsonl").write_text(json.dumps(record) + "\n")
    frame = dsfp.read_records(trained.parent)
    assert frame["hparams"].iloc[-1]["refresh"] == 0.2
    assert "SFP" in str(dsfp.table(frame))
