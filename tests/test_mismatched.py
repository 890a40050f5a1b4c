"A response to another prompt as the worst one of a comparison."
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from rlhf_reward import RewardConfig, RewardTrainer
from rlhf_reward.comparison import ranked_pairs
from rlhf_reward.mismatched import add_mismatched
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.tokenized import FEATURES, tokenized_comparison, whole_sequences
from tiny import open_tiny


def table(changes=()):
    "Four comparisons of two prompts; each response tells its comparison: 10 to 13 are good, 20 to 23 bad."
    examples = []
    for number in range(4):
        fields = {"ranks": [1, 2], "margins": [0.5], "prompt_key": number % 2, "row": number, "response_starts": [2, 2]}
        fields |= dict(changes).get(number, {})
        examples.append(tokenized_comparison([number % 2, 5], [[10 + number], [20 + number, 9]], **fields))
    return Dataset.from_list(examples, features=FEATURES)


def test_each_comparison_gets_the_best_response_to_another_prompt():
    data = table({1: {"ranks": [2, 1]}, 3: {"ranks": [1, 1], "margins": []}})
    best = {0: [10], 1: [21, 9], 2: [12], 3: [13]}
    drawn = set()
    for seed in range(6):
        added = add_mismatched(data, 1.0, seed)
        assert added.features == data.features and added["row"][:] == [0, 1, 2, 3]
        for before, after in zip(data, added):
            *own, last = whole_sequences(after)
            assert own == whole_sequences(before)
            donor, = (number for number, response in best.items() if response == last[2:])
            assert last[:2] == before["shared_prefix"] and donor % 2 != before["prompt_key"]
            drawn.add((before["row"], donor))
            worst = max(before["ranks"]) + 1
            assert after["ranks"] == [*before["ranks"], worst] and after["response_starts"] == [2, 2, 2]
            margins = dict(zip(ranked_pairs(after["ranks"]), after["margins"]))
            expected = dict(zip(ranked_pairs(before["ranks"]), before["margins"]))
            assert margins == {**expected, (0, 2): 0.0, (1, 2): 0.0}
            assert after["weight"] == before["weight"] and after["length"] == max(map(len, [*own, last]))
    assert len(drawn) == 8 # all that there are
    same = add_mismatched(data, 1.0, seed=3)
    assert [dict(row) for row in same] == [dict(row) for row in add_mismatched(data, 1.0, seed=3)]


def test_a_share_in_the_order_of_the_data():
    data = table()
    for share, number in ((0.1, 1), (0.5, 2), (0.75, 3)):
        added = add_mismatched(data, share)
        assert sum(len(ranks) == 3 for ranks in added["ranks"]) == number
        assert added["row"][:] == [0, 1, 2, 3]


def test_a_prefix_that_reaches_into_the_responses():
    "The responses begin alike, so their prefix is longer than the prompt, which is all that the new one shares."
    alike = tokenized_comparison(
        [0, 5, 7], [[1], [2]], [1, 2], [0.0], prompt_key=8, ratings=[3, 1], labels=[True, False], response_starts=[2, 2]
    )
    data = Dataset.from_list([alike, table()[1]], features=FEATURES)
    first, second = add_mismatched(data, 1.0)
    assert whole_sequences(first) == [[0, 5, 7, 1], [0, 5, 7, 2], [0, 5, 11]]
    assert first["shared_prefix"] == [0, 5] and first["ratings"] == [3, 1, None] and first["labels"] == [1, 0, None]
    assert whole_sequences(second)[2] == [1, 5, 7, 1]


def test_what_stays_as_it_is(caplog):
    "A label that is a probability, and a prompt with which every other response would be too long."
    data = table({0: {"preference": 0.7}})
    long = tokenized_comparison(list(range(30, 34)), [[1], [2]], [1, 2], [0.0], prompt_key=9, response_starts=[4, 4])
    data = Dataset.from_list([*data, long], features=FEATURES)
    with caplog.at_level("INFO"):
        added = add_mismatched(data, 1.0)
    assert [len(ranks) for ranks in added["ranks"]] == [2, 3, 3, 3, 3] and max(added["length"]) == 5
    assert "4 of 5 comparisons of the training set have a response to another prompt" in caplog.text
    both = Dataset.from_list([long, table({1: {"ranks": [2, 1]}})[1]], features=FEATURES) # [21, 9] is too long
    assert [len(ranks) for ranks in add_mismatched(both, 1.0)["ranks"]] == [2, 3]


@pytest.mark.parametrize("data, share, expected", [
    (table(), -0.1, "mismatched_share is -0.1; expected a share of the comparisons from 0 to 1"),
    (table(), 1.5, "mismatched_share is 1.5"),
    (IterableDataset.from_generator(lambda: iter(())), 0.5, "is a IterableDataset; expected a datasets.Dataset"),
    (table({2: {"response_starts": None}}), 0.5, "where their responses begin.*response_starts=True"),
    (table({1: {"prompt_key": 0}, 3: {"prompt_key": 0}}), 0.5, "have the same prompt; expected several"),
])
def test_refused(data, share, expected):
    with pytest.raises(ValueError, match=expected):
        add_mismatched(data, share)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts(), **small)


def trainer(base, folder, **options):
    options = {"report_to": "none", "use_cpu": True, "max_length": 64, "disable_tqdm": True, **options}
    return RewardTrainer(
        open_tiny(base),
        RewardConfig(str(folder), **options),
        train_dataset=synthetic_comparisons(12, num_responses=2),
        eval_dataset=synthetic_comparisons(4, num_responses=2, seed=1),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def test_the_trainer_learns_from_them_and_evaluates_without(base, tmp_path):
    "The step has the loss of ranked rows that are written out."
    made = trainer(base, tmp_path, mismatched_share=0.5, balance_lengths=True)
    assert sorted(map(len, made.train_dataset["ranks"])) == [2] * 6 + [3] * 6
    assert set(map(len, made.eval_dataset["ranks"])) == {2}
    batch = made.data_collator([made.train_dataset[index] for index in range(12)])
    with torch.no_grad():
        rewards, losses, _ = made._losses(made.model, batch)
    three = batch["ranks"].max(dim=1).values == 3
    good, bad, other = rewards[three].gather(1, batch["ranks"][three].argsort(dim=1)).unbind(dim=1)
    differences = torch.stack([good - bad, good - other, bad - other])
    torch.testing.assert_close(losses[three], -torch.nn.functional.logsigmoid(differences).mean(dim=0))


@pytest.mark.parametrize("options, expected", [
    ({"mismatched_share": 1.2}, "mismatched_share is 1.2; expected a share from 0 to 1"),
    ({"loss": "margin_scaled"}, "mismatched_share is 0.5 with the loss margin_scaled.*expected 0, or another loss"),
    ({"loss": "regression"}, "mismatched_share is 0.5 with the loss regression, which learns rewards of single"),
])
def test_the_trainer_refuses(options, expected, base, tmp_path):
    with pytest.raises(ValueError, match=expected):
        trainer(base, tmp_path, **{"mismatched_share": 0.5, **options})
