"Weights under which the longer response wins half of the time."
import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from rlhf_reward.length_balance import balance_lengths


def table(lengths, ranks, weights):
    rests = []
    for own in lengths:
        rests.append([[1] * length for length in own])
    rows = {"rests": rests, "ranks": ranks, "weight": weights, "row": list(range(len(ranks)))}
    return Dataset.from_dict(rows)


def test_both_kinds_have_the_same_weight_and_the_sum_stays():
    pairs = [[5, 2], [7, 1], [9, 3], [2, 4], [3, 3]]
    data = table(pairs, [[1, 2], [1, 2], [2, 1], [1, 2], [1, 2]], [1.0, 3.0, 2.0, 0.5, 1.0])
    balanced = balance_lengths(data)
    weights = np.array(balanced["weight"])
    assert weights[:2].sum() == pytest.approx(weights[2:4].sum()) == pytest.approx(6.5 / 2)
    assert weights[1] == pytest.approx(3 * weights[0]) # inside a kind the weights keep their shares
    assert weights[4] == 1 # as long
    assert weights.sum() == pytest.approx(7.5)
    assert balanced.column_names == data.column_names and balanced.features == data.features
    assert balanced["row"][:] == data["row"][:]


def test_of_ranked_responses_most_pairs_decide():
    data = table([[9, 5, 1], [1, 5, 9], [9, 1, 5], [5, 9, 1, 5]], [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 1, 2, 2]],
                 [1.0, 1.0, 1.0, 1.0])
    # longer in 3 of 3 pairs; shorter in 3; longer in 2 of 3; longer in 3 of 4 and as long in one
    assert balance_lengths(data)["weight"][:] == pytest.approx([2 / 3, 2, 2 / 3, 2 / 3])


def test_refused():
    with pytest.raises(ValueError, match="always longer or as long; expected both.* Leave it off"):
        balance_lengths(table([[3, 1], [2, 2]], [[1, 2], [1, 2]], [1.0, 1.0]))
    with pytest.raises(ValueError, match="always shorter"): # a weight of 0 is none
        balance_lengths(table([[3, 1], [1, 2]], [[1, 2], [1, 2]], [0.0, 1.0]))
    with pytest.raises(ValueError, match="is a IterableDataset; expected a datasets.Dataset"):
        balance_lengths(IterableDataset.from_generator(lambda: iter(())))
