"Every loss against float64 by hand, its gradients, and its behaviour at extremes."
import itertools
import math

import numpy as np
import pytest
import torch

from rlhf_reward import PairwiseLoss
from rlhf_reward.losses import LOSSES, BradleyTerry, MarginScaled, PlackettLuce, Regression, make_loss

RANKS = [[1, 2, 3, 4], [2, 1, 1, 3], [1, 2, 0, 0], [1, 1, 1, 2], [3, 1, 2, 0], [2, 2, 1, 2]]
TIED = [[1, 1, 0, 0], [1, 1, 1, 1]]


def made(seed=0, ranks=RANKS):
    "Rewards, ranks, margins and ratings, in float64; rewards where there is no response are noise."
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.tensor(ranks)
    rewards = 2 * torch.randn(ranks.shape, generator=draw, dtype=torch.float64)
    margins = torch.rand(*ranks.shape, ranks.shape[1], generator=draw, dtype=torch.float64) + 0.1
    ratings = torch.randn(ranks.shape, generator=draw, dtype=torch.float64).masked_fill(torch.rand(ranks.shape, generator=draw) < 0.2, math.nan)
    return rewards, ranks, margins, ratings


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def outcomes(ranks):
    "(first, second, whether they tie) of each two responses."
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if 0 < ranks[i] < ranks[j]:
            yield i, j, False
        elif 0 < ranks[i] == ranks[j] and i < j:
            yield i, j, True


def by_hand(name, r, ranks, margins, ratings):
    "One comparison in plain Python."
    pairs = [(i, j) for i, j, tie in outcomes(ranks) if not tie]
    if name == "bradley_terry":
        return np.mean([-math.log(sigmoid(r[i] - r[j] - margins[i][j])) for i, j in pairs])
    if name == "smoothed":
        return np.mean([-0.9 * math.log(sigmoid(r[i] - r[j] - margins[i][j])) - 0.1 * math.log(sigmoid(r[j] - r[i] + margins[i][j])) for i, j in pairs])
    if name == "centered":
        return np.mean([-math.log(sigmoid(r[i] - r[j] - margins[i][j])) + 0.03 * (r[i] + r[j]) ** 2 for i, j in pairs])
    if name == "margin_scaled":
        return np.mean([-margins[i][j] * math.log(sigmoid(r[i] - r[j])) for i, j in pairs])
    if name == "plackett_luce": # all orders that agree with the ranks
        real, total = [i for i in range(len(ranks)) if ranks[i] > 0], 0
        for order in itertools.permutations(real):
            if [ranks[i] for i in order] == sorted(ranks[i] for i in real):
                total += math.prod(math.exp(r[i]) / sum(math.exp(r[j]) for j in order[place:]) for place, i in enumerate(order))
        return -math.log(total)
    if name == "rao_kupper":
        theta = 2.0
        win = lambda i, j: math.exp(r[i]) / (math.exp(r[i]) + theta * math.exp(r[j]))
        return np.mean([-math.log(1 - win(i, j) - win(j, i) if tie else win(i, j)) for i, j, tie in outcomes(ranks)])
    if name == "davidson":
        strength = lambda i, j: math.sqrt(math.exp(r[i]) * math.exp(r[j]))
        total = lambda i, j: math.exp(r[i]) + math.exp(r[j]) + strength(i, j)
        return np.mean([-math.log((strength(i, j) if tie else math.exp(r[i])) / total(i, j)) for i, j, tie in outcomes(ranks)])
    rated = [(r[i] - ratings[i]) ** 2 for i in range(len(r)) if ranks[i] > 0 and not math.isnan(ratings[i])]
    return np.mean(rated) if rated else 0.0


ALL = {**{name: make_loss(name) for name in LOSSES}, "smoothed": BradleyTerry(0.1), "centered": BradleyTerry(0, 0.03)}


@pytest.mark.parametrize("name", ALL)
def test_losses_are_their_formulas(name):
    loss = ALL[name].double()
    for parameter in loss.parameters(): # a float64 that was float32 is only nearly log 3
        parameter.data.fill_(math.log(3) if name == "rao_kupper" else 0)
    rewards, ranks, margins, ratings = made(ranks=RANKS + TIED * loss.uses_ties)
    expected = [by_hand(name, *(table.tolist() for table in row)) for row in zip(rewards, ranks, margins, ratings)]
    torch.testing.assert_close(loss(rewards, ranks, margins, ratings).detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    single = ALL[name].float()(rewards.float(), ranks, margins.float(), ratings.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_the_slopes(name):
    loss = ALL[name].double()
    rewards, ranks, margins, ratings = made(ranks=RANKS + TIED * loss.uses_ties)
    assert torch.autograd.gradcheck(lambda r: loss(r, ranks, margins, ratings), rewards.requires_grad_())
    for parameter in loss.parameters():
        def of_threshold(value):
            return torch.func.functional_call(loss, {"log_tie": value}, (rewards.detach(), ranks, margins, ratings))
        assert torch.autograd.gradcheck(of_threshold, parameter.detach().clone().requires_grad_())


@pytest.mark.parametrize("scale", [1e-30, 100, 1e4, 1e15])
@pytest.mark.parametrize("name", ALL)
def test_finite_at_extremes(name, scale):
    loss = ALL[name].float()
    rewards, ranks, margins, ratings = (table.float() if table.is_floating_point() else table for table in made(ranks=RANKS + TIED * loss.uses_ties))
    rewards = (scale * rewards).requires_grad_()
    losses = loss(rewards, ranks, margins, ratings)
    losses.sum().backward()
    assert losses.isfinite().all() and rewards.grad.isfinite().all() and (losses >= 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())
    loss.zero_grad()


@pytest.mark.parametrize("log_tie", [-80.0, 80.0])
@pytest.mark.parametrize("name", ["rao_kupper", "davidson"])
def test_thresholds_stay_finite(name, log_tie):
    loss = make_loss(name)
    loss.log_tie.data.fill_(log_tie)
    assert loss(torch.tensor([[0.5, 0.0], [0.5, 0.0]]), torch.tensor([[1, 2], [1, 1]])).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_neither_padding_nor_the_order_of_responses_matters(name):
    loss = ALL[name].double()
    rewards, ranks, margins, ratings = made()
    plain = loss(rewards, ranks, margins, ratings)
    wider = [torch.nn.functional.pad(rewards, (0, 2), value=math.inf), torch.nn.functional.pad(ranks, (0, 2)),
             torch.nn.functional.pad(margins, (0, 2, 0, 2), value=7.0), torch.nn.functional.pad(ratings, (0, 2), value=5.0)]
    for padding in (0, -100): # -100 as transformers.Trainer pads
        wider[0] = wider[0].detach().requires_grad_()
        wider[1] = wider[1].masked_fill(wider[1] < 1, padding)
        losses = loss(*wider)
        torch.testing.assert_close(losses, plain)
        losses.sum().backward()
        assert wider[0].grad.isfinite().all()
    order = [2, 0, 3, 1]
    torch.testing.assert_close(loss(rewards[:, order], ranks[:, order], margins[:, order][:, :, order], ratings[:, order]), plain)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("centered", "regression")])
def test_only_differences_matter(name):
    loss = ALL[name].double()
    rewards, ranks, margins, ratings = made()
    torch.testing.assert_close(loss(rewards + 3, ranks, margins, ratings), loss(rewards, ranks, margins, ratings))


def test_the_mean_over_pairs_is_the_pairwise_loss_of_instruct_gpt():
    rewards, ranks, margins, _ = made()
    flat, pairs, weights, of_pair = [], [], [], []
    for row, (own, own_ranks) in enumerate(zip(rewards, ranks.tolist())):
        wins = [(i, j) for i, j, tie in outcomes(own_ranks) if not tie]
        flat += [(own[i], own[j]) for i, j in wins]
        weights += [1 / len(wins)] * len(wins)
        of_pair += [margins[row, i, j] for i, j in wins]
    chosen, rejected = (torch.stack(side) for side in zip(*flat))
    pairwise = PairwiseLoss()(chosen, rejected, torch.stack(of_pair), torch.tensor(weights))
    torch.testing.assert_close(BradleyTerry()(rewards.float(), ranks, margins.float()).mean(), pairwise, atol=1e-6, rtol=1e-6)


def test_many_responses():
    "K = 12 has 4096 sets; more are refused with the number expected."
    rewards = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    strict = PlackettLuce()(rewards, torch.arange(1, 13).expand(3, 12))
    expected = sum(rewards[:, i:].logsumexp(dim=1) - rewards[:, i] for i in range(12))
    torch.testing.assert_close(strict, expected)
    strict.sum().backward()
    assert rewards.grad.isfinite().all()
    with pytest.raises(ValueError, match="has 13 responses; expected at most 12"):
        PlackettLuce()(torch.zeros(1, 13), torch.ones(1, 13).long())
    assert BradleyTerry()(torch.zeros(1, 40), torch.arange(1, 41)[None]).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("wrong, told", [
    (lambda: BradleyTerry()(torch.zeros(2), torch.ones(2).long()), r"rewards has shape \(2,\)"),
    (lambda: BradleyTerry()(torch.zeros(2, 2), torch.ones(2, 3).long()), r"ranks \(2, 3\)"),
    (lambda: BradleyTerry()(torch.zeros(2, 2), torch.ones(2, 2).long(), torch.zeros(2, 2)), r"margins \(2, 2\); expected .*\(num_comparisons, K, K\)"),
    (lambda: MarginScaled()(torch.zeros(2, 2), torch.ones(2, 2).long()), "margins is None; expected the margin of each pair"),
    (lambda: Regression()(torch.zeros(2, 2), torch.ones(2, 2).long()), "ratings is None; expected the rating"),
    (lambda: BradleyTerry(0.5), "label_smoothing is 0.5; expected"),
    (lambda: BradleyTerry(center_rewards_coefficient=-1), "center_rewards_coefficient is -1; expected"),
    (lambda: make_loss("hinge"), "loss is 'hinge'; expected one of bradley_terry, "),
    (lambda: make_loss("davidson", 0.1), "label smoothing or centering is on with the loss davidson"),
])
def test_errors_say_what_is_wanted(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()


def test_ties_teach_the_threshold():
    "Fitted to outcomes with a third of ties between equals, the threshold grows; with none it falls."
    rewards = torch.zeros(90, 2)
    for name in ("rao_kupper", "davidson"):
        thresholds = []
        for ties in (10, 60):
            loss, ranks = make_loss(name), torch.tensor([[1, 1]] * ties + [[1, 2]] * (90 - ties))
            optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=50)
            optimizer.step(lambda: (optimizer.zero_grad(), value := loss(rewards, ranks).mean(), value.backward())[1])
            share = torch.exp(-loss(rewards[:1], torch.tensor([[1, 1]]))).item()
            assert share == pytest.approx(ties / 90, abs=1e-3) # of ties, once wins and losses of equals are alike
            thresholds.append(loss.log_tie.item())
        assert thresholds[0] < thresholds[1]
