"Every loss against float64 by hand, its gradients, and its behaviour at extremes."

import itertools
import math

import numpy as np
import pytest
import torch

from rlhf_reward import PairwiseLoss
from rlhf_reward.losses import LOSSES, Binary, BradleyTerry, MarginScaled, PlackettLuce, Regression, make_loss

RANKS = [[1, 2, 3, 4], [2, 1, 1, 3], [1, 2, 0, 0], [1, 1, 1, 2], [3, 1, 2, 0], [2, 2, 1, 2]]
TIED = [[1, 1, 0, 0], [1, 1, 1, 1]]


def made(seed=0, ranks=RANKS):
    "Rewards, ranks, margins and ratings, in float64; rewards where there is no response are noise."
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.tensor(ranks)
    rewards = 2 * torch.randn(ranks.shape, generator=draw, dtype=torch.float64)
    margins = torch.rand(*ranks.shape, ranks.shape[1], generator=draw, dtype=torch.float64) + 0.1
    ratings = torch.randn(ranks.shape, generator=draw, dtype=torch.float64)
    is_missing = torch.rand(ranks.shape, generator=draw) < 0.2
    return rewards, ranks, margins, ratings.masked_fill(is_missing, math.nan)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def cost(difference):
    "−log of the probability of a win."
    return -math.log(sigmoid(difference))


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
        return np.mean([cost(r[i] - r[j] - margins[i][j]) for i, j in pairs])
    if name == "smoothed":
        differences = [r[i] - r[j] - margins[i][j] for i, j in pairs]
        return np.mean([0.9 * cost(d) + 0.1 * cost(-d) for d in differences])
    if name == "centered":
        return np.mean([cost(r[i] - r[j] - margins[i][j]) + 0.03 * (r[i] + r[j]) ** 2 for i, j in pairs])
    if name == "margin_scaled":
        return np.mean([margins[i][j] * cost(r[i] - r[j]) for i, j in pairs])
    if name == "plackett_luce":
        return plackett_luce(r, ranks)
    if name == "rao_kupper":
        return np.mean([-math.log(rao_kupper(r[i], r[j], tie)) for i, j, tie in outcomes(ranks)])
    if name == "davidson":
        return np.mean([-math.log(davidson(r[i], r[j], tie)) for i, j, tie in outcomes(ranks)])
    if name == "binary": # with the offset 0; a rating above one half is the label of a good response
        rated = [(r[i], ratings[i]) for i in range(len(r)) if ranks[i] > 0 and not math.isnan(ratings[i])]
        return np.mean([cost(reward if label > 0.5 else -reward) for reward, label in rated]) if rated else 0.0
    squares = []
    for reward, rank, rating in zip(r, ranks, ratings):
        if rank > 0 and not math.isnan(rating):
            squares.append((reward - rating) ** 2)
    return np.mean(squares) if squares else 0.0


def plackett_luce(r, ranks):
    "−log of the sum over all orders that agree with the ranks."
    real = [i for i in range(len(ranks)) if ranks[i] > 0]
    total = 0
    for order in itertools.permutations(real):
        if [ranks[i] for i in order] == sorted(ranks[i] for i in real):
            probability = 1
            for position, i in enumerate(order):
                probability *= math.exp(r[i]) / sum(math.exp(r[j]) for j in order[position:])
            total += probability
    return -math.log(total)


def rao_kupper(first, second, tie):
    "The probability of a win of the first, or of a tie, with a threshold of θ = 2."
    win = math.exp(first) / (math.exp(first) + 2 * math.exp(second))
    lose = math.exp(second) / (math.exp(second) + 2 * math.exp(first))
    return 1 - win - lose if tie else win


def davidson(first, second, tie):
    "The probability of a win of the first, or of a tie, with ν = 1."
    strength_of_tie = math.sqrt(math.exp(first) * math.exp(second))
    total = math.exp(first) + math.exp(second) + strength_of_tie
    return (strength_of_tie if tie else math.exp(first)) / total


ALL = {name: make_loss(name) for name in LOSSES}
ALL["smoothed"] = BradleyTerry(0.1)
ALL["centered"] = BradleyTerry(0, 0.03)


@pytest.mark.parametrize("name", ALL)
def test_losses_are_their_formulas(name):
    loss = ALL[name].double()
    for parameter in loss.parameters():  # a float64 that was float32 is only nearly log 3
        parameter.data.fill_(math.log(3) if name == "rao_kupper" else 0)
    rewards, ranks, margins, ratings = made(ranks=RANKS + TIED * loss.uses_ties)
    tables = [table.tolist() for table in (rewards, ranks, margins, ratings)]
    expected = [by_hand(name, *row) for row in zip(*tables)]
    torch.testing.assert_close(
        loss(rewards, ranks, margins, ratings).detach(),
        torch.tensor(expected, dtype=torch.float64),
        atol=1e-12,
        rtol=1e-12,
    )
    single = ALL[name].float()(rewards.float(), ranks, margins.float(), ratings.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_the_slopes(name):
    loss = ALL[name].double()
    rewards, ranks, margins, ratings = made(ranks=RANKS + TIED * loss.uses_ties)
    assert torch.autograd.gradcheck(lambda r: loss(r, ranks, margins, ratings), rewards.requires_grad_())
    for learned, parameter in loss.named_parameters():

        def of_threshold(value):
            return torch.func.functional_call(loss, {learned: value}, (rewards.detach(), ranks, margins, ratings))

        assert torch.autograd.gradcheck(of_threshold, parameter.detach().clone().requires_grad_())


@pytest.mark.parametrize("scale", [1e-30, 100, 1e4, 1e15])
@pytest.mark.parametrize("name", ALL)
def test_finite_at_extremes(name, scale):
    loss = ALL[name].float()
    rewards, ranks, margins, ratings = made(ranks=RANKS + TIED * loss.uses_ties)
    rewards = (scale * rewards.float()).requires_grad_()
    losses = loss(rewards, ranks, margins.float(), ratings.float())
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
    wider = [
        torch.nn.functional.pad(rewards, (0, 2), value=math.inf),
        torch.nn.functional.pad(ranks, (0, 2)),
        torch.nn.functional.pad(margins, (0, 2, 0, 2), value=7.0),
        torch.nn.functional.pad(ratings, (0, 2), value=5.0),
    ]
    for padding in (0, -100):  # -100 as transformers.Trainer pads
        wider[0] = wider[0].detach().requires_grad_()
        wider[1] = wider[1].masked_fill(wider[1] < 1, padding)
        losses = loss(*wider)
        torch.testing.assert_close(losses, plain)
        losses.sum().backward()
        assert wider[0].grad.isfinite().all()
    order = [2, 0, 3, 1]
    reordered = (rewards[:, order], ranks[:, order], margins[:, order][:, :, order], ratings[:, order])
    torch.testing.assert_close(loss(*reordered), plain)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("centered", "regression", "binary")])
def test_only_differences_matter(name):
    loss = ALL[name].double()
    rewards, ranks, margins, ratings = made()
    torch.testing.assert_close(loss(rewards + 3, ranks, margins, ratings), loss(rewards, ranks, margins, ratings))


def test_the_mean_over_pairs_is_the_pairwise_loss_of_instruct_gpt():
    rewards, ranks, margins, _ = made()
    chosen, rejected, margin, weight = [], [], [], []
    for row, row_ranks in enumerate(ranks.tolist()):
        wins = [(i, j) for i, j, tie in outcomes(row_ranks) if not tie]
        for i, j in wins:
            chosen.append(rewards[row, i])
            rejected.append(rewards[row, j])
            margin.append(margins[row, i, j])
            weight.append(1 / len(wins))
    pairs = (torch.stack(chosen), torch.stack(rejected), torch.stack(margin), torch.tensor(weight))
    of_tables = BradleyTerry()(rewards.float(), ranks, margins.float()).mean()
    torch.testing.assert_close(of_tables, PairwiseLoss()(*pairs), atol=1e-6, rtol=1e-6)


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


REWARDS = torch.zeros(2, 2)
ONES = torch.ones(2, 2).long()
ERRORS = [
    (lambda: BradleyTerry()(torch.zeros(2), torch.ones(2).long()), r"rewards has shape \(2,\)"),
    (lambda: BradleyTerry()(REWARDS, torch.ones(2, 3).long()), r"ranks \(2, 3\)"),
    (lambda: BradleyTerry()(REWARDS, ONES, REWARDS), r"margins \(2, 2\); expected .*\(num_comparisons, K, K\)"),
    (lambda: MarginScaled()(REWARDS, ONES), "margins is None; expected the margin of each pair"),
    (lambda: Regression()(REWARDS, ONES), "ratings is None; expected the rating"),
    (lambda: BradleyTerry(0.5), "label_smoothing is 0.5; expected"),
    (lambda: BradleyTerry(center_rewards_coefficient=-1), "center_rewards_coefficient is -1; expected"),
    (lambda: make_loss("hinge"), "loss is 'hinge'; expected one of bradley_terry, "),
    (lambda: make_loss("davidson", 0.1), "label smoothing or centering is on with the loss davidson"),
]


@pytest.mark.parametrize("call, message", ERRORS)
def test_errors_report_what_is_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_earlier_name_of_is_informative():
    "A loss may define or call `says_something`, with `super` too."
    ranks = torch.tensor([[1, 2], [1, 1]])

    class OldName(BradleyTerry):
        def says_something(self, ranks, margins, ratings):
            return ~super().says_something(ranks, margins, ratings)

    for loss, expected in ((BradleyTerry(), [True, False]), (OldName(), [False, True])):
        assert loss.is_informative(ranks, None, None).tolist() == expected
        assert loss.says_something(ranks, None, None).tolist() == expected
    for loss in (make_loss("margin_scaled"), make_loss("regression")):
        tables = (ranks, torch.zeros(2, 2, 2), torch.tensor([[1.0, math.nan], [math.nan, math.nan]]))
        assert loss.says_something(*tables).tolist() == loss.is_informative(*tables).tolist()


def test_ties_teach_the_threshold():
    "Fitted to outcomes with a third of ties between equals, the threshold grows; with none it falls."
    rewards = torch.zeros(90, 2)
    for name in ("rao_kupper", "davidson"):
        thresholds = []
        for ties in (10, 60):
            loss = make_loss(name)
            ranks = torch.tensor([[1, 1]] * ties + [[1, 2]] * (90 - ties))
            optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=50)

            def closure():
                optimizer.zero_grad()
                value = loss(rewards, ranks).mean()
                value.backward()
                return value

            optimizer.step(closure)
            share = torch.exp(-loss(rewards[:1], torch.tensor([[1, 1]]))).item()
            assert share == pytest.approx(ties / 90, abs=1e-3)  # of ties, once wins and losses of equals are alike
            thresholds.append(loss.log_tie.item())
        assert thresholds[0] < thresholds[1]


def test_binary_offset_and_class_weights_have_their_closed_form():
    "For constant rewards r and a share p of good responses the best offset is r − log(w p / (1 − p))."
    for reward, num_good, num_bad, weight in ((0.7, 3, 1, 1.0), (-2.0, 1, 4, 1.0), (0.0, 2, 3, 2.5), (1.0, 5, 1, 0.2)):
        loss = Binary(weight).double()
        labels = torch.tensor([1.0] * num_good + [0.0] * num_bad, dtype=torch.float64)[:, None]
        rewards = torch.full_like(labels, reward)
        ranks = torch.ones(labels.shape, dtype=torch.long)
        best = reward - math.log(weight * num_good / num_bad)
        slopes = []
        for offset in (best - 0.1, best, best + 0.1):
            loss.offset.data.fill_(offset)
            (slope,) = torch.autograd.grad(loss(rewards, ranks, None, labels).mean(), loss.offset)
            slopes.append(slope.item())
        assert slopes[0] < 0 < slopes[2] and slopes[1] == pytest.approx(0, abs=1e-12)
        one = loss(rewards[:1], ranks[:1], None, labels[:1]).item()
        assert one == pytest.approx(weight * math.log1p(math.exp(loss.offset.item() - reward)))
        loss.start(10_000 * num_good, 10_000 * num_bad)
        assert loss.offset.item() == pytest.approx(best - reward, abs=1e-3)
    for weight in (0, -1, math.inf):
        with pytest.raises(ValueError, match="expected a number above 0"):
            make_loss("binary", good_weight=weight)
    with pytest.raises(ValueError, match="good_weight is 2.0 with the loss regression; expected 1"):
        make_loss("regression", good_weight=2.0)
    with pytest.raises(ValueError, match="label smoothing or centering is on with the loss binary"):
        make_loss("binary", label_smoothing=0.1)


def test_pointwise_losses_of_a_group_are_the_mean_of_its_responses():
    "So that a group with the sum of the weights has the loss and the gradient of single rows."
    for name in ("regression", "binary"):
        loss = make_loss(name, good_weight=3.0 if name == "binary" else 1.0).double()
        rewards = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
        ranks = torch.tensor([[1, 2, 2, 1]])
        together = 4 * loss(rewards, ranks, None, targets).sum()
        alone = loss(rewards.T, torch.ones_like(ranks.T), None, targets.T).sum()
        torch.testing.assert_close(together, alone)
        variables = [rewards, *loss.parameters()]
        gradients = zip(torch.autograd.grad(together, variables), torch.autograd.grad(alone, variables))
        for of_group, of_rows in gradients:
            torch.testing.assert_close(of_group, of_rows)
