"""What all methods with learned masks share: networks, bad input, random hparams, the shortest runs."""

from __future__ import annotations

import pytest
import torch
from modular_runs import MODULAR, batch, make, train, weights_of
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.training import hparams

# all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, overrides",
    [("MRM", {"granularity": "channel"}), ("SparseIRM", {"granularity": "channel"}),
     ("DCWP", {"granularity": "channel"}), ("EVIL", {"update_interval": 0.2})],
)  # fmt: skip
def test_a_network_with_batchnorm_and_depthwise_convolutions(name, overrides):
    overrides = {"backbone": "efficientnet_lite0", "weights": "none", **overrides}
    torch.manual_seed(0)
    algorithm = registry.get(name).make((3, 32, 32), 2, 2, hparams.resolve_hparams(name, "PACS", overrides=overrides))
    algorithm.total_steps = 6
    x = torch.randn(4, 3, 32, 32)
    for step in range(6):
        algorithm.update(batch(step, 4, (3, 32, 32)))
        algorithm.prepare_evaluation([torch.cat([x for x, _ in batch(90, 8, (3, 32, 32))])])
        algorithm.eval()
        with torch.no_grad():
            logits = algorithm.predict(x)
            assert torch.isfinite(logits).all() and torch.allclose(algorithm.export()(x), logits, atol=1e-4)
        algorithm.train()
    assert algorithm.at_final_compression() and algorithm.sparsity() == pytest.approx(0.5, abs=0.01)
    parameters = dict(algorithm.named_parameters())
    assert all(not parameters[key][~mask].any() for key, mask in algorithm.masks().items())


@pytest.mark.parametrize(
    "name, overrides, part",
    [
        ("MRM", {"mask_end": 0.7}, "'mask_end' of MRM is 0.7: it is built in as 0.6 now"),
        ("MRM", {"mask_alpha": -5.0}, "mask_alpha"),
        ("MRM", {"mask_rule": "topk"}, "did you mean 'top_k'"),
        ("MRM", {"mask_rule": "threshold", "sparsity": 0.0}, "finds its own sparsity"),
        ("MRM", {"sparsity": 1.0}, "sparsity"),
        ("SparseIRM", {"objective": "ERM"}, "known: IRM, VREx"),
        ("SparseIRM", {"objective": 3}, "expected the name of an objective, got 3"),
        ("DCWP", {"retrain_upweight": 0.0}, "retrain_upweight"),
        ("EVIL", {"granularity": "channel"}, "'weight'"),
        ("EVIL", {"objective": "Mixup"}, "Mixup"),
        ("EVIL", {"update_end": 0.1}, "ends before it begins"),
        ("EVIL", {"update_fraction": 1.5}, "update_fraction"),
        ("EVIL", {"growth_gradient": "accumulated"}, "built in as 'domain' now"),
    ],
)
def test_bad_input_is_refused_in_one_line(name, overrides, part):
    with pytest.raises(UserError, match=part) as error:
        make(name, **overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*MODULAR, "SparseIRM", "DCWP", "EVIL"])
def test_random_hparams_train(name):
    for seed in range(1, 4):
        values = {**hparams.resolve_hparams(name, "ColoredDigits", seed), "sparsity": 0.5, "batch_size": 8}
        torch.manual_seed(seed)
        algorithm = registry.get(name).make((2, 8, 8), 2, 2, values)
        algorithm.total_steps = 4
        train(algorithm, 4)
        assert all(torch.isfinite(value).all() for value in weights_of(algorithm).values())


def test_evil_needs_domains():
    values = hparams.resolve_hparams("EVIL", "ColoredDigits")
    with pytest.raises(UserError, match="at least 2, got 1"):
        registry.get("EVIL").cls((2, 8, 8), 2, 1, values)


@pytest.mark.parametrize("name", [*MODULAR, "SparseIRM", "DCWP", "EVIL"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_reach_their_final_compression(name, steps):
    overrides = {"granularity": "channel"} if name != "EVIL" else {}
    algorithm = train(make(name, steps, **overrides), steps)
    assert algorithm.at_final_compression() and algorithm.sparsity() == pytest.approx(0.5, abs=0.01)
    assert isinstance(algorithm.export(), nn.Module)
