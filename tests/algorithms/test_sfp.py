"""SFP's flags, weights and penalties by hand, and the whole on a set whose attribute it must find."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from sfp_runs import batch, flag, make, train

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.sfp.algorithm import SFP
from domainbed_sfp.algorithms.sfp.hparams import choices
from domainbed_sfp.algorithms.sfp.removal import Removal, cleared_layers
from domainbed_sfp.algorithms.sfp.statistics import by_image, channel_means
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.plugins import contract
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.training import hparams
from domainbed_sfp.training import train as training


def test_samples_below_the_domains_mean_are_flagged():
    losses = [0.1, 0.2, 3.0, 0.1, 0.3, 2.0, 0.1, 0.2]  # mean 0.75
    for kappa, expected in ((1.0, {0, 1, 3, 4, 6, 7}), (0.35, {0, 1, 3, 6, 7})):
        algorithm = make(flag_kappa=kappa)
        flags, metrics = flag(algorithm, losses, [batch(), batch()])
        assert [set(torch.nonzero(f).flatten().tolist()) for f in flags] == [expected, expected]
        for domain in (0, 1):
            assert algorithm.flagging.thresholds(domain).tolist() == pytest.approx([0.75 * kappa] * 4, abs=1e-4)
        assert metrics["flag_threshold_domain0"] == pytest.approx(0.75 * kappa, abs=1e-4)
        assert metrics["flagged_domain0"] == len(expected) / 8
    truth = {i for i in range(8) if i % 3}
    assert metrics["flag_precision_domain0"] == pytest.approx(len(expected & truth) / len(expected))
    assert metrics["flag_recall_domain0"] == pytest.approx(len(expected & truth) / len(truth))


def test_each_class_may_have_a_threshold_of_its_own():
    losses = [0.1, 0.2, 3.0, 0.1, 0.3, 2.0, 0.1, 0.2]  # of classes 0, 1, 2, 3, 0, 1, 2, 3
    algorithm = make(flag_threshold="class")
    flags, _ = flag(algorithm, losses, [batch(), batch()])
    assert algorithm.flagging.thresholds(0).tolist() == pytest.approx([0.2, 1.1, 1.55, 0.15], abs=1e-4)
    assert [torch.nonzero(f).flatten().tolist() for f in flags] == [[0, 1, 3, 6]] * 2
    # A class that a batch lacks keeps its threshold; in the others each sample counts, earlier ones 3 percent less.
    flag(algorithm, [1.2, 0.2], [batch(2)])
    expected = [(0.97 * 0.4 + 1.2) / (0.97 * 2 + 1), (0.97 * 2.2 + 0.2) / (0.97 * 2 + 1), 1.55, 0.15]
    assert algorithm.flagging.thresholds(0).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_first_batch_does_not_rule_the_threshold():
    algorithm = make()
    for losses in ([3.0], *[[1.0]] * 40):
        flag(algorithm, losses, [batch(), batch()])
    left = 0.97**40 / sum(0.97**k for k in range(41))
    assert algorithm.flagging.thresholds(1)[0].item() == pytest.approx(1 + 2 * left, abs=1e-3)


def test_a_class_not_seen_yet_has_the_domains_threshold():
    algorithm = make(flag_threshold="class")
    flag(algorithm, [0.2, 0.4], [batch(2), batch(2)])
    assert algorithm.flagging.thresholds(0).tolist() == pytest.approx([0.2, 0.4, 0.3, 0.3], abs=1e-4)


def test_random_flags_are_as_many_and_oracle_flags_are_the_truth():
    losses = [0.1, 0.2, 3.0, 0.1, 0.3, 2.0, 0.1, 0.2]
    seen = set()
    for seed in range(20):
        algorithm = make(flag_policy="random")
        torch.manual_seed(seed)
        flags = flag(algorithm, losses, [batch(), batch()])[0][0]
        assert flags.sum() == 6
        seen.add(tuple(flags.tolist()))
    assert len(seen) > 5
    algorithm = make(flag_policy="oracle")
    assert flag(algorithm, losses, [batch(), batch()])[0][1].tolist() == [i % 3 > 0 for i in range(8)]
    with pytest.raises(UserError, match="knows its aligned samples"):
        flag(algorithm, losses, [batch(aligned=False)])


def test_risk_weights_by_hand():
    algorithm = make("SFPWeighted", risk_weight=20.0)
    algorithm.flagging.loss_counts.fill_(10)
    algorithm.flagging.flag_counts.fill_(7)
    first, second = batch(4), batch(4)
    flags = [torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True])]
    loss, metrics = algorithm.weighted_loss([first, second], flags)
    losses = F.cross_entropy(
        algorithm.predict(torch.cat([first[0], second[0]])), torch.cat([first[1], second[1]]), reduction="none"
    )
    expected = (losses[[0, 1, 3, 4, 6, 7]].sum() + 20 * losses[[2, 5]].sum()) / 46
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and metrics["loss"] == pytest.approx(loss.item())
    algorithm.flagging.flag_counts[1] = 10  # all flagged of late: no contrast, and nobody there weighs more
    expected = (losses[[0, 1, 3, 4, 5, 6, 7]].sum() + 20 * losses[2]) / 27
    assert algorithm.weighted_loss([first, second], flags)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("backbone", ["mnist_cnn", "efficientnet_lite0"])  # the latter pads before it convolves
def test_soft_penalty_is_the_share_that_the_layer_passes_on(backbone):
    algorithm = make(removal="soft", backbone=backbone, weights="none")
    (name,) = algorithm.removal.channels
    algorithm.removal.stored[name][0] = torch.tensor([1.0, 0.0, 0.0])
    x = torch.randn(5, 3, 8, 8)
    only_red = x.clone()
    only_red[:, 1:] = 0
    layer = algorithm.get_submodule(name.removesuffix(".weight"))
    passed_on = layer(only_red)
    if layer.bias is not None:
        passed_on = passed_on - layer.bias.view(1, -1, 1, 1)
    # Over channels, mean over samples and positions, of which a strided layer has fewer.
    expected = passed_on.square().sum(1).mean() / x.square().sum(1).mean()
    assert algorithm.removal.passed_on(name, layer, x).item() == pytest.approx(expected.item(), rel=1e-4)


def test_regularised_layers():
    assert list(make().removal.channels) == ["featurizer.conv1.weight"]
    assert not make(removal="none").removal.channels
    assert len(make(removal_layers="all").removal.channels) == 4
    values = hparams.resolve_hparams(
        "SFP", "PACS", overrides={"backbone": "efficientnet_lite0", "image_size": 64, "weights": "none"}
    )
    lite = registry.get("SFP").make((3, 64, 64), 7, 3, values)
    assert list(lite.removal.channels) == ["featurizer.network.conv_stem.weight"]
    last = list(cleared_layers(lite.featurizer, lite.groups, "last"))
    assert last[-1] == "featurizer.network.conv_head.weight" and len(last) == 8


@pytest.mark.parametrize(
    "overrides, part",
    [
        ({"flag_policy": "lose"}, "did you mean 'loss'"),
        ({"removal": "strict"}, "removal of SFP"),
        ({"granularity": "weight"}, "hparam 'granularity' of SFP is 'weight': it is built in as 'channel' now"),
        ({"objective": "VREx"}, "built in as 'ERM' now"),
        ({"prune_residual_streams": 0}, "built in as False now"),
        ({"risk_weight": 0}, "a number above 0"),
        ({"flag_kappa": -1.0}, "a number above 0"),
        ({"removal_rank": -3}, "share in"),
        ({"removal_energy": 0.3}, "`commit`"),
        ({"removal_strength": -5.0}, "at least 0"),
    ],
)
def test_bad_hparams(overrides, part):
    with pytest.raises(UserError, match=part):
        make(**overrides)


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_no_contrast_anywhere_is_an_error(sparsity):
    algorithm = make(flag_kappa=1e-9, sparsity=sparsity)
    with pytest.raises(UserError, match="no contrast in any domain"), pytest.warns(UserWarning):
        train(algorithm, 20)


@pytest.mark.parametrize(
    "name, overrides",
    [("SFP", {}), ("SFPWeighted", {"removal": "none"}), ("SFP", {"removal": "none", "channel_score": "class_conditional"})],
)  # fmt: skip
def test_no_contrast_is_an_error_whatever_the_score(name, overrides):
    algorithm = make(name, flag_kappa=1e-9, **{"channel_score": "taylor", **overrides})
    with pytest.raises(UserError, match="no contrast in any domain"), pytest.warns(UserWarning):
        train(algorithm, 20)


def test_a_domain_without_contrast_is_told_once_and_left_out():
    algorithm = make()
    algorithm.step = algorithm.schedule.first_step(algorithm.total_steps)
    batches = [batch(), batch()]
    # Of the first domain all are flagged; of the second five of eight, the first of each class and one more.
    flags = [torch.ones(8, dtype=torch.bool), torch.arange(8) < 5]
    algorithm.flagging.flag = lambda logits, minibatches: (flags, {})
    algorithm.flagging.loss_counts.fill_(2)
    algorithm.flagging.flag_counts.copy_(torch.tensor([[2.0] * 4, [2.0, 1.0, 1.0, 1.0]]))
    with pytest.warns(UserWarning, match="100% of the samples of training domain 0") as told:
        for _ in range(3):
            algorithm.compute_loss(batches)
    moments = algorithm.removal.moments_of("featurizer.conv1.weight")
    assert len(told) == 1 and algorithm.flagging.has_contrast().tolist() == [False, True]
    seen = sum(0.97**k for k in range(3))
    assert moments.counts[1].tolist() == pytest.approx([2 * seen, seen, seen, seen])
    assert moments.counts[0].tolist() == pytest.approx([0, seen, seen, seen])


def test_directions_are_renewed_unless_the_network_is_pretrained(monkeypatch, any_direction):
    """40 steps: the reference is kept at step 6, directions come every second step from 8 on, or once."""
    renewed: list[int] = []
    real = Removal.renew
    monkeypatch.setattr(Removal, "renew", lambda self: (renewed.append(algorithm.step), real(self))[1])
    for layers in ("first", "all"):
        renewed.clear()
        algorithm = make(total=40, removal_layers=layers)
        train(algorithm, 6)
        weights = {name: value.clone() for name, value in algorithm.network.state_dict().items()}
        train(algorithm, 14, begin=6)
        assert renewed == [8, 10, 12]
        assert all(torch.equal(value, weights[name]) for name, value in algorithm.reference.state_dict().items())
    renewed.clear()
    algorithm = make(total=40)
    algorithm.is_pretrained = True
    train(algorithm, 20)
    assert renewed == [8] and len(algorithm.removal.directions("featurizer.conv1.weight")) == 2


@pytest.mark.parametrize(
    "shape, overrides, expected",
    [
        ((3, 32, 32), {"backbone": "mnist_cnn_bn"}, False),
        ((3, 28, 28), {"backbone": "resnet18"}, True),
        ((3, 64, 64), {"backbone": "resnet18", "weights": "none"}, False),
        ((2, 28, 28), {"backbone": "mnist_cnn", "weights": "net.safetensors"}, True),
        ((2, 14, 14), {}, False),
    ],
)
def test_what_counts_as_pretrained(shape, overrides, expected):
    assert networks.is_pretrained(shape, overrides) is expected


def test_the_soft_penalty_runs_in_bf16_on_inner_layers(any_direction):
    overrides = {
        "backbone": "resnet18",
        "weights": "none",
        "image_size": 32,
        "removal": "soft",
        "removal_layers": "last",
    }
    values = hparams.resolve_hparams("SFP", "PACS", overrides=overrides)
    algorithm = SFP((3, 32, 32), 4, 2, values)
    algorithm.total_steps = 40
    networks.set_precision(algorithm, "bf16", channels_last=True)
    for step in range(11):
        torch.manual_seed(step)
        metrics = algorithm.update([batch(side=32), batch(side=32)])
    directions = {name: value for name, value in metrics.items() if name.startswith("directions_")}
    assert len(directions) == len(algorithm.removal.channels) == 5 and max(directions.values()) > 0


def test_features_that_end_with_channels_have_the_mean_of_their_positions():
    x = torch.arange(24.0).view(2, 3, 4)
    linear = torch.nn.Linear(4, 1)
    assert channel_means(x, linear, 4).tolist() == x.mean(1).tolist()
    assert channel_means(x.view(2, 1, 3, 4), linear, 4).tolist() == x.mean(1).tolist()
    # A flattened map: two positions of each of two channels.
    assert channel_means(x[:, 0], linear, 2).tolist() == [[0.5, 2.5], [12.5, 14.5]]
    assert channel_means(x.view(2, 3, 2, 2), torch.nn.Conv2d(3, 1, 1), 3).tolist() == x.mean(2).tolist()


def test_what_windows_read_is_told_apartby_image():
    """Two images of three windows each, one after the other: the means are those of an image."""
    x = torch.arange(2 * 3 * 4 * 5.0).view(6, 4, 5)
    linear = by_image(x, torch.nn.Linear(5, 1), 2)
    assert torch.equal(channel_means(linear, torch.nn.Linear(5, 1), 5), x.view(2, 12, 5).mean(1))
    maps = torch.arange(2 * 3 * 4 * 5 * 6.0).view(6, 4, 5, 6)
    conv = torch.nn.Conv2d(4, 1, 1)
    assert torch.equal(channel_means(by_image(maps, conv, 2), conv, 4), maps.view(2, 3, 4, 30).mean((1, 3)))
    assert by_image(x, conv, 6) is x


@pytest.mark.parametrize(
    "overrides", [{"channel_score": "taylor"}, {"channel_score": "unflagged"}, {"removal": "soft"}]
)
def test_sfp_prunes_a_network_that_cuts_images_into_windows(overrides):
    pytest.importorskip("timm", reason="timm is not installed")
    given = {"backbone": "test_maxvit", "weights": "none", "image_size": 64, "removal_layers": "all", **overrides}
    algorithm = SFP((3, 64, 64), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=given))
    algorithm.total_steps = 6
    train(algorithm, 6, side=64)
    assert algorithm.sparsity() == pytest.approx(0.5, abs=0.05)


def test_sfp_refuses_layers_whose_weights_are_transformed():
    """Taking a direction out of a weight that is standardised before use leaves part of it."""
    pytest.importorskip("timm", reason="timm is not installed")
    given = {"backbone": "test_nfnet", "weights": "none", "image_size": 64}
    with pytest.raises(UserError, match=r"ScaledStdConv2d\w* transforms its weight"):
        SFP((3, 64, 64), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=given))


def test_a_record_after_few_steps_has_diagnostics(tmp_path):
    """The last statistics before it were taken before the record before."""
    folder = tmp_path / "run"
    training.train(RunSettings(
        dataset="FullColoredDigits", algorithm="SFP", test_envs=[2], steps=42, checkpoint_freq=20, skip_model_save=True,
        output_dir=str(folder), hparams=json.dumps({"batch_size": 16})))  # fmt: skip
    last = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 41
    assert {"flagged_domain0", "flag_precision_domain1", "directions_conv1"} <= last.keys()


@pytest.mark.parametrize("side, expected", [(8, "relative"), (28, "relative"), (64, "absolute")])
def test_directions_of_normalised_photographs_are_not_those_of_vectors_of_length_1(side, expected):
    """There the origin is grey: light and dark would be opposite vectors."""
    given = {"backbone": "resnet18", "weights": "none", "image_size": side}
    algorithm = SFP((3, side, side), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=given))
    assert algorithm.decisions()["removal_vectors"] == expected


@pytest.mark.parametrize(
    "pretrained, side, expected",
    [
        (False, 28, ("first", "relative", "class_conditional")),
        (False, 29, ("first", "absolute", "class_conditional")),
        (True, 28, ("last", "absolute", "taylor")),
        (True, 224, ("last", "absolute", "taylor")),
    ],
)
def test_what_is_left_open_follows_from_pretraining_and_image_size(pretrained, side, expected):
    names = ("removal_layers", "removal_vectors", "channel_score")
    assert tuple(choices(dict.fromkeys(names, "auto"), pretrained, side)[name] for name in names) == expected
    said = {"removal_layers": "all", "removal_vectors": "absolute", "channel_score": "unflagged"}
    assert choices(said, pretrained, side) == said


def test_sfp_prunes_a_network_with_channels_last():
    pytest.importorskip("timm", reason="timm is not installed")
    overrides = {"backbone": "test_convnext", "weights": "none", "image_size": 32, "channel_score": "class_conditional"}
    algorithm = SFP((3, 32, 32), 4, 2, hparams.resolve_hparams("SFP", "PACS", overrides=overrides))
    algorithm.total_steps = 12
    train(algorithm, 12, side=32)
    assert algorithm.sparsity() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "overrides",
    [
        {"backbone": "mnist_cnn_bn"},
        {"backbone": "mnist_cnn"},
        # Here several layers read a channel: squeeze-and-excitation's too.
        {"backbone": "timm:mobilenetv3_small_050", "weights": "none", "lr": 1e-5},
    ],
    ids=lambda overrides: overrides["backbone"],
)
def test_score_of_unflagged_samples_is_the_square_of_gates_derivatives(overrides, monkeypatch):
    """Gates [N, channels] in front of what reads the channels, differentiated by autograd, against what SFP collects."""
    if overrides["backbone"].startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    algorithm = make(**overrides, removal="none", channel_score="unflagged")
    for step in range(20):
        torch.manual_seed(step)
        algorithm.update([batch(), batch()])
    minibatches = [batch(), batch()]
    flags = [torch.rand(len(y)) < 0.5 for _, y in minibatches]
    monkeypatch.setattr(algorithm, "_flag", lambda minibatches: flags)
    unflagged = ~torch.cat(flags)

    gates = {group.name: torch.ones(len(unflagged), group.channels, requires_grad=True) for group in algorithm.groups}
    handles = []
    for group in algorithm.groups:
        for name in group.readers:
            done = [0]

            def gate(layer, inputs, gates=gates[group.name], done=done):
                x = inputs[0]
                rows = gates[done[0] : done[0] + len(x)]
                done[0] += len(x)
                rows = rows.repeat_interleave(x.shape[1] // rows.shape[1], 1)
                return x * rows.view(*rows.shape, *[1] * (x.dim() - 2))

            handles.append(algorithm.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(gate))
    loss, _ = super(SFP, algorithm).compute_loss(minibatches)
    loss.backward()
    for handle in handles:
        handle.remove()
    algorithm.zero_grad()

    before = {group.name: algorithm.score([])[group.name] for group in algorithm.groups}
    algorithm.step = algorithm.schedule.first_step(algorithm.total_steps) + 4 * 4  # one on which statistics are due
    loss, _ = algorithm.compute_loss(minibatches)
    loss.backward()
    algorithm.after_backward()
    scores = algorithm.score(minibatches)
    for group in algorithm.groups:
        latest = gates[group.name].grad[unflagged].square().mean(0)
        assert latest.max() > 0
        assert torch.allclose(
            scores[group.name], 0.9 * before[group.name] + 0.1 * latest, rtol=1e-3, atol=1e-6 * float(latest.max())
        )


def test_taylor_score_is_that_of_taylor():
    """With nothing removed and every sample weighing the same, SFP with Taylor's score is Taylor, to the bit. The
    network has BatchNorm, behind which a filter's own g w sums to zero."""
    overrides = {"backbone": "mnist_cnn_bn"}
    sfp = make(**overrides, removal="none", channel_score="taylor")
    taylor = make("Taylor", **overrides)
    for step in range(30):
        for algorithm in (sfp, taylor):
            torch.manual_seed(step)
            algorithm.update([batch(), batch()])
    masks, expected = sfp.masks(), taylor.masks()
    assert masks.keys() == expected.keys() and 0.4 < sfp.sparsity() < 0.6
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "overrides",
    [{"removal": "soft"}, {"removal": "none"}, {"removal_layers": "all"}, {"channel_score": "taylor"},
     {"channel_score": "unflagged", "flag_threshold": "class", "removal": "none"}, {"flag_policy": "random"}, {"flag_policy": "oracle"}, {"sparsity": 0.0}],
)  # fmt: skip
def test_contract_of_ablations(overrides, monkeypatch):
    plain = contract.make
    monkeypatch.setattr(contract, "make", lambda name, **options: plain(name, overrides=overrides, **options))
    with pytest.warns(UserWarning, match="which gives no contrast"):  # of so few samples
        for title, check in contract.CHECKS.items():
            if title != "never_touches_the_test_environment":  # a whole run, which knows no overrides
                check("SFP")


def test_sfp_finds_the_colour(tmp_path):
    """On digits whose colour agrees with the label in 95 and 90 percent of the training samples, and not at all in the
    test environment, SFP at half the channels is far above magnitude pruning; the flags are nearly the truth."""

    def final(name: str, **overrides) -> dict:
        folder = tmp_path / (name + str(len(overrides)))
        training.train(RunSettings(
            dataset="FullColoredDigits", algorithm=name, test_envs=[2], steps=120, checkpoint_freq=119, skip_model_save=True, evaluate="final",
            output_dir=str(folder), hparams=json.dumps({"sparsity": 0.5, "batch_size": 32, **overrides})))  # fmt: skip
        return json.loads((folder / "results.jsonl").read_text().splitlines()[-1])

    sfp, magnitude = final("SFP"), final("Magnitude")
    assert sfp["env2_in_acc"] > magnitude["env2_in_acc"] + 0.15
    assert sfp["sparsity"] == magnitude["sparsity"] == 0.5 and sfp["macs"] == magnitude["macs"]
    assert sfp["parameters"] == magnitude["parameters"]  # the reference is not part of what is deployed
    for domain in (0, 1):
        assert sfp[f"flag_precision_domain{domain}"] > 0.9 and sfp[f"flag_recall_domain{domain}"] > 0.85
