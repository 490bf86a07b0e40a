"""GlobalPru: votes, rank losses and tau by hand and by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from globalpru_cases import make

from domainbed_sfp.algorithms.pruning import global_pru
from domainbed_sfp.plugins import contract
from domainbed_sfp.pruning import ranking
from domainbed_sfp.pruning.attention import gate_logits, gate_of

SCORES = torch.tensor([[0.3, -1.2, 0.8, 0.1], [2.0, 0.5, -0.4, 0.9]])


# rank losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_listmle_is_the_plackett_luce_likelihood(channels):
    """Against the product of drawing channels one by one; over all permutations the probabilities sum to 1."""
    scores = SCORES[:1, :channels]
    weights = scores[0].exp()
    total = 0.0
    for order in itertools.permutations(range(channels)):
        probability = math.prod(float(weights[order[i]] / weights[list(order[i:])].sum()) for i in range(channels))
        loss = ranking.list_mle(scores, torch.tensor(order)).item() * math.log(math.factorial(channels))
        assert loss == pytest.approx(-math.log(probability), rel=1e-5)
        total += math.exp(-loss)
    assert total == pytest.approx(1, rel=1e-5)


def test_the_rank_loss_is_a_mean_over_samples_that_begins_at_one():
    loss, order = ranking.list_mle, torch.tensor([2, 0, 3, 1])
    each = [loss(row[None], order).item() for row in SCORES]
    assert loss(SCORES, order).item() == pytest.approx(sum(each) / 2, rel=1e-6)
    wide = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for ranks in (order, wide):
        assert loss(torch.full((3, len(ranks)), 0.7), ranks).item() == pytest.approx(1, rel=1e-5)
    assert loss(torch.ones(2, 1), torch.tensor([0])).item() == 0  # one channel: nothing to rank
    assert loss(10 * SCORES.argsort(1).argsort(1).float(), SCORES[0].argsort(descending=True)).isfinite()


def test_gradients_by_finite_differences():
    loss, order = ranking.list_mle, torch.tensor([2, 0, 3, 1])
    scores = SCORES.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scores, order), scores)
    for row, column in itertools.product(range(2), range(4)):
        step = torch.zeros_like(scores)
        step[row, column] = 1e-6
        with torch.no_grad():
            slope = (loss(scores + step, order) - loss(scores - step, order)) / 2e-6
        assert gradient[row, column].item() == pytest.approx(slope.item(), abs=1e-6)
    # A channel that stands above its place is pushed down, one below it up.
    assert loss(SCORES - gradient.float(), order) < loss(SCORES, order)


# votes ----------------------------------------------------------------------------------------------------------------


def vote_of(environments, kept) -> list[int]:
    vote = ranking.RankingVote(len(environments), len(environments[0][0]))
    for index, scores in enumerate(environments):
        vote.count(index, ranking.ballots(torch.tensor(scores), kept), torch.tensor(scores))
    vote.close()
    return vote.ranking.tolist()


def test_votes_by_hand():
    # Orders of three samples: 0 1 2 3, 0 1 2 3, 3 2 0 1.
    scores = [[[9.0, 3.0, 2.0, 1.0], [9.0, 3.0, 2.0, 1.0], [0.1, 0.0, 0.2, 0.3]]]
    # Best two: 0 has 2 votes, 1 has 2, 2 and 3 have 1 each; 0 has more attention than 1, and 2 than 3.
    assert vote_of(scores, 2) == [0, 1, 2, 3]
    # Best one: 0 has 2 votes, 3 has 1, then attention.
    assert vote_of(scores, 1) == [0, 3, 1, 2]
    # A single sample with a strong opinion has one vote.
    loud = [[[0.2, 0.1, 0.0], [0.2, 0.1, 0.0], [-9.0, 0.1, 0.0]]]
    assert vote_of(loud, 1) == [0, 1, 2]


def test_equal_scores_rank_by_position():
    assert vote_of([[[0.0, 0.0, 0.0]]], 2) == [0, 1, 2]
    assert ranking.ballots(torch.zeros(1, 3), 2).tolist() == [[1, 1, 0]]


def test_equal_shares_of_the_votes_tie_whatever_environments_they_come_from():
    """3 + 2 + 1 of ten voters each are as many as 1 + 2 + 3, but for the last bit; more attention decides then."""
    for counts in itertools.permutations((1, 2, 3)):
        vote = ranking.RankingVote(3, 3)
        vote.voters.fill_(10)
        vote.given[:, 0] = torch.tensor(counts)
        vote.given[:, 1] = torch.tensor((3, 2, 1))
        vote.attention[:, 1] = 1.0
        vote.close()
        assert vote.ranking.tolist() == [1, 0, 2]


def test_nobody_votes_before_the_gates_have_learned_anything(monkeypatch):
    monkeypatch.setattr(global_pru, "VOTE_WINDOW", 0.5)
    algorithm = make(total=10, domains=contract.DOMAINS)
    contract.run(algorithm, 0, 1)
    assert not any(vote.voters.any() for vote in algorithm.votes.values())
    contract.run(algorithm, 1, 2)
    assert all(vote.voters.all() for vote in algorithm.votes.values())


def test_environments_weigh_alike():
    """Five samples of one environment do not outvote three of two others."""
    many, few = [[1.0, 0.0, -1.0]] * 5, [[-1.0, 0.0, 1.0]]
    assert vote_of([many, few, few], 1) == [2, 0, 1]
    assert vote_of([many + few + few], 1) == [0, 2, 1]


def test_a_vote_over_several_steps_is_one_vote():
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 5)
    whole, parts = (ranking.RankingVote(2, 5) for _ in range(2))
    for env in range(2):
        whole.count(env, ranking.ballots(scores[env], 2), scores[env])
        for part in scores[env].split(4):
            parts.count(env, ranking.ballots(part, 2), part)
    for vote in (whole, parts):
        vote.close()
    assert torch.equal(whole.given, parts.given) and torch.equal(whole.ranking, parts.ranking)


def trained(**hparams):
    """GlobalPru whose gates are no longer alike, one step before its vote, and a minibatch of every environment."""
    algorithm = make(total=10, domains=contract.DOMAINS, **hparams)
    contract.run(algorithm, 0, 1)
    with torch.no_grad():
        for group in algorithm.groups:
            torch.nn.init.normal_(algorithm.get_submodule(gate_of(group)).expand.weight, std=0.5)
    return algorithm


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_samples_vote_for_the_channels_without_which_their_loss_would_change_most(scope):
    """To first order: against the loss of each sample alone with each channel's attention a little lower."""
    algorithm, by, shift = trained(pruning_scope=scope), {}, 1e-2
    x, y = contract.minibatches(0)[0]
    algorithm.eval()

    def losses():
        return torch.nn.functional.cross_entropy(algorithm.predict(x).double(), y, reduction="none")

    with torch.no_grad(), gate_logits(algorithm._gates()) as logits:
        losses()
    for group in algorithm.groups:
        bias, columns = algorithm.get_submodule(gate_of(group)).expand.bias, []
        for channel in range(group.channels):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    bias[channel] += sign * shift
                    ends.append(losses())
                    bias[channel] -= sign * shift
            # a dL/da = dL/du / (1 - sigmoid(u)).
            columns.append((ends[0] - ends[1]) / (2 * shift) / torch.sigmoid(-logits[group.name][:, channel]))
        by[group.name] = torch.stack(columns, 1).abs()
    algorithm.train()
    algorithm.step = algorithm.vote_step()
    algorithm._collect_votes([(x, y)])
    given = [algorithm.vote(name).given[0] for name in by]
    expected = list(by.values()) if scope == "layer" else [torch.cat(list(by.values()), 1)]
    found = given if scope == "layer" else [torch.cat(given)]
    for votes, merit in zip(found, expected):
        wanted = ranking.ballots(merit, merit.shape[1] - merit.shape[1] // 2).sum(0)
        assert votes.sum() == wanted.sum()
        # Finite differences in single precision tell some channels apart otherwise.
        assert (votes - wanted).abs().sum() <= 0.05 * wanted.sum()


def test_by_one_ranking_of_all_layers_lose_what_they_have_fewest_votes_for():
    algorithm = make(total=10, domains=contract.DOMAINS, pruning_scope="global", sparsity=0.5)
    contract.run(algorithm, 0, 10)
    shares = {group.name: algorithm.vote(group.name).shares() for group in algorithm.groups}
    alive = {name: algorithm.unit_masks[name] for name in shares}
    assert algorithm.sparsity() == pytest.approx(0.5, abs=0.02)
    least = min(shares[name][keep].sort(descending=True).values[1:].min() for name, keep in alive.items())
    assert least >= max(shares[name][~keep].max() for name, keep in alive.items() if not keep.all())


# agreement ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 3, 5, 8, 13])
def test_tau_by_brute_force(channels):
    generator = torch.Generator().manual_seed(channels)
    scores = torch.randint(-3, 4, (6, channels), generator=generator).float()  # with ties
    order = torch.randperm(channels, generator=generator)
    expected = []
    for row in scores:
        pairs = [
            torch.sign(row[order[i]] - row[order[j]]).item() for i, j in itertools.combinations(range(channels), 2)
        ]
        expected.append(sum(pairs) / len(pairs))
    assert ranking.kendall_tau(scores, order).tolist() == pytest.approx(expected, abs=1e-6)
    assert ranking.kendall_tau(-order.argsort()[None].float(), order).item() == 1
    assert ranking.kendall_tau(scores, order[:1]).isnan().all()  # of one channel there is no order


def test_tau_is_scipys_where_nothing_ties():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    scores, order = torch.randn(3, 200), torch.randperm(200)
    places = -order.argsort().numpy()
    expected = [stats.kendalltau(row, places).statistic for row in scores.numpy()]
    assert ranking.kendall_tau(scores, order).tolist() == pytest.approx(expected, abs=1e-6)


def test_top_k_overlap_by_hand():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    order = torch.tensor([0, 3, 1, 2])
    assert ranking.top_k_overlap(scores, order, 2).tolist() == [0.5, 0.5]
    assert ranking.top_k_overlap(scores, order, 1).tolist() == [1.0, 0.0]
    assert ranking.top_k_overlap(scores, order, 4).tolist() == [1.0, 1.0]
