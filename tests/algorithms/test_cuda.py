"""What a GPU changes: devices of everything an algorithm keeps, filled-up evaluation batches, memory formats."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

ALGORITHMS = {
    "ERM": {"degrade": 0.5, "degraded_evaluation": True},
    "SFP": {},
    "SFPWeighted": {"removal": "soft"},
    "Taylor": {"objective": "Mixup"},
    "LotteryTicket": {},
    "GraSP": {},
    "RigL": {},
    "MRM": {},
    "SparseIRM": {},
    "DCWP": {},
    "EVIL": {},
    "GlobalPru": {},
    "UniformQuant": {"bits": 3},
    "DQMQ": {"target_bitops": 0.3},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_on_the_gpu_agrees_with_one_on_the_cpu(main, tmp_path, algorithm):
    hparams = json.dumps({"backbone": "mnist_cnn_bn", "batch_size": 16, **ALGORITHMS[algorithm]})
    losses = {}
    for device in ("cuda", "cpu"):
        main(
            "train", "--algorithm", algorithm, "--dataset", "FullColoredDigits", "--steps", "12", "--hparams", hparams,
            "--checkpoint_freq", "1", "--skip_model_save", "--device", device, "--output_dir", device,
        )  # fmt: skip
        lines = (tmp_path / device / "results.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line) for line in lines]
    first, last = losses["cuda"][0], losses["cuda"][-1]
    # The weights are the same at first; what they become differs by the order of sums, and by draws on the device.
    assert first["loss"] == pytest.approx(losses["cpu"][0]["loss"], rel=0.02)
    assert last["environment"]["device"] != "cpu" and last["mem_gb"] > 0
    assert last["final_compression"] and last["sparsity"] == pytest.approx(losses["cpu"][-1]["sparsity"], abs=0.02)


def test_evaluation_does_not_depend_on_how_batches_are_filled_up(monkeypatch):
    from domainbed_sfp.algorithms import registry
    from domainbed_sfp.data import get_dataset_class
    from domainbed_sfp.data.splits import split_environment
    from domainbed_sfp.training import hparams
    from domainbed_sfp.training.evaluation import evaluate

    values = hparams.resolve_hparams("ERM", "FullColoredDigits", 0, 0, {"backbone": "mnist_cnn_bn"})
    dataset = get_dataset_class("FullColoredDigits").build(None, values, 0, None)
    algorithm = registry.get("ERM").cls(dataset.input_shape, dataset.num_classes, 2, values).cuda()
    splits = [split_environment(len(environment), i, 0, 0.2, 0.0) for i, environment in enumerate(dataset.environments)]
    filled = evaluate(algorithm, dataset, splits, torch.device("cuda"))
    monkeypatch.setattr("domainbed_sfp.training.evaluation.EVALUATION_BATCH", 0)
    assert evaluate(algorithm, dataset, splits, torch.device("cuda")) == filled
