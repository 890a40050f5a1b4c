"Soft labels: read from columns, kept to the batch, and a target of each loss, exact where people are sure."

import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from rlhf_reward import RewardModel
from rlhf_reward.arguments import RewardConfig
from rlhf_reward.audit import audit, audit_table
from rlhf_reward.columns import check_same_verdicts, column_verdicts
from rlhf_reward.evaluation import evaluate
from rlhf_reward.loading import load_rows
from rlhf_reward.losses import LOSSES, BradleyTerry, RewardLoss, make_loss
from rlhf_reward.packing import pack_comparisons, pad_comparisons
from rlhf_reward.rows import to_comparison
from rlhf_reward.rule import Rule
from rlhf_reward.soft_loss import decided_ranks
from rlhf_reward.statistics import calibration
from rlhf_reward.synthetic import synthetic_texts, tiny_decoder
from rlhf_reward.tokens import tokenize_rows
from rlhf_reward.training import RewardTrainer
from rlhf_reward.verdicts import UnclearVerdict

ARENA = {"prompt": "Ada likes birds.", "response_a": " robin", "response_b": " saw"}
CHOSEN = {"prompt": "Ada likes birds.", "chosen": " robin", "rejected": " saw"}
PROBABILITY = {"probability": "a"}


def test_soft_rows_have_their_probability():
    ranked = {"prompt": "Ada likes birds.", "responses": [" saw", " robin"], "scores": [1, 3]}
    ids = {"chosen_ids": [1, 2], "rejected_ids": [1, 3]}
    for row, ranks, preference in (
        ({**ARENA, "probability_a": 0.7}, (1, 2), 0.7),
        ({**ARENA, "probability_a": "0.2"}, (2, 1), 0.2),
        ({**ARENA, "probability_a": 0.5}, (1, 1), 0.5),
        ({**ARENA, "probability_a": 1}, (1, 2), None),
        ({**ARENA, "probability_a": 0.0}, (2, 1), None),
        ({**ARENA, "preference": 0.7}, (1, 2), 0.7),
        ({**ARENA, "preference": 1}, (1, 2), None),
        ({**ARENA, "preference": "0"}, (2, 1), None),
        ({**ARENA, "votes_a": 1, "votes_b": 3}, (2, 1), 0.25),
        ({**ARENA, "votes_a": 2, "votes_b": 2.0}, (1, 1), 0.5),
        ({**ARENA, "votes_a": 0, "votes_b": 5}, (2, 1), None),
        ({**ARENA, "winner": "a", "votes_a": 3, "votes_b": 1}, (1, 2), 0.75),
        ({**ARENA, "winner": "model_b", "confidence": 0.9}, (2, 1), pytest.approx(0.1)),
        ({**CHOSEN, "confidence": 0.9}, (1, 2), 0.9),
        ({**CHOSEN, "confidence": 0.25}, (2, 1), 0.25),
        ({**CHOSEN, "confidence": 1}, (1, 2), None),
        ({**CHOSEN, "confidence": 0}, (2, 1), None),
        ({**CHOSEN, "confidence": None}, (1, 2), None),
        ({**CHOSEN, "confidence": ""}, (1, 2), None),
        ({**ranked, "confidence": 0.75}, (2, 1), 0.25),
        ({**ids, "confidence": 0.75}, (1, 2), 0.75),
    ):
        comparison = to_comparison(row, PROBABILITY)
        assert (comparison.ranks, comparison.preference) == (ranks, preference), row
    assert to_comparison({**CHOSEN, "margin": 2, "confidence": 0.25}).margin == -2
    assert to_comparison({**CHOSEN, "margin": 2, "confidence": 0.75}).margin == 2


def test_soft_rows_that_contradict_themselves_are_refused():
    four = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}
    for row, message in (
        ({**ARENA, "probability_a": 1.2}, "found 1.2 as probability_a; expected a probability"),
        ({**ARENA, "votes_a": 0, "votes_b": 0}, "at least one above 0"),
        ({**ARENA, "votes_a": -1, "votes_b": 2}, "not negative"),
        ({**ARENA, "winner": "a", "votes_a": 2}, "votes_b None"),
        ({**ARENA, "winner": "a", "votes_a": 1, "votes_b": 3}, "the winner is another"),
        ({**ARENA, "winner": "tie", "votes_a": 1, "votes_b": 3}, "the winner is another"),
        ({**ARENA, "winner": "a", "confidence": 0.7, "votes_a": 3, "votes_b": 1}, "expected one of them"),
        ({**ARENA, "winner": "tie", "confidence": 0.7}, "of which one is better"),
        ({**CHOSEN, "confidence": 4}, "--columns other=confidence"),
        ({**CHOSEN, "confidence": "high"}, "found 'high' as confidence"),
        ({**four, "confidence": 0.7}, "a confidence for 3 responses"),
        ({**ARENA, "preference": "tie"}, "found 'tie' as preference"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            to_comparison(row, PROBABILITY)
    with pytest.raises(UnclearVerdict, match="a column of probabilities by its other values"):
        to_comparison({**ARENA, "preference": 3}, PROBABILITY)
    with pytest.raises(UnclearVerdict): # a row alone does not show what its numbers mean
        to_comparison({**ARENA, "preference": 0.7})


def rows_of(values, column="preference"):
    return Dataset.from_list([{**ARENA, column: value} for value in values])


def test_soft_columns_are_told_from_verdicts_by_all_their_values():
    for values, expected in (
        ([0.0, 1.0], {"0": "a", "1": "b"}),
        ([1, 2], {"1": "a", "2": "b"}),
        ([0.7, 1.0, 0.0], PROBABILITY),
        ([0.5, 0.25], PROBABILITY),
        (["0.9", "0"], PROBABILITY),
    ):
        assert column_verdicts(rows_of(values)) == expected, values
    for values in ([0.0, 0.5, 1.0], [0.5], [0.7, 1.5], [-0.2, 0.7], ["0.7", "tie"]):
        with pytest.raises(UnclearVerdict):
            column_verdicts(rows_of(values))
    with pytest.raises(UnclearVerdict, match="--columns probability_a=preference"):
        column_verdicts(rows_of([0.0, 0.5, 1.0]))
    with pytest.raises(UnclearVerdict):
        column_verdicts(rows_of([0.7, 0.2], "winner"))
    many = rows_of([*np.linspace(0.001, 0.999, 3000).tolist(), 1.5])
    with pytest.raises(UnclearVerdict): # the last value counts, however many fractions come before
        column_verdicts(many)
    with pytest.raises(UnclearVerdict, match="a probability in one"):
        check_same_verdicts(rows_of([0.7, 1.0, 0.0]), rows_of([0.0, 1.0]))
    check_same_verdicts(rows_of([0.7, 1.0, 0.0]), rows_of([0.2]))


def test_soft_columns_can_be_renamed_and_exchanged(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of([0.0, 0.5, 1.0])))
    named = load_rows(str(file), columns={"probability_a": "preference"})
    assert [to_comparison(row).ranks for row in named] == [(2, 1), (1, 1), (1, 2)]
    exchanged = {"probability_a": "preference", "response_a": "response_b", "response_b": "response_a"}
    assert to_comparison(load_rows(str(file), columns=exchanged)[0]).responses == (" saw", " robin")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_soft_bradley_terry_is_the_cross_entropy_with_its_gradient():
    rewards = torch.tensor([[1.5, 0.25], [-0.5, 2.0], [0.75, 0.75]], dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[1, 2], [2, 1], [1, 1]])
    margins = torch.zeros(3, 2, 2, dtype=torch.float64)
    margins[0, 0, 1] = 0.5
    margins[1, 1, 0] = 0.25
    preferences = torch.tensor([0.7, 0.3, 0.5], dtype=torch.float64)
    losses = BradleyTerry().double()(rewards, ranks, margins, None, preferences)
    losses.sum().backward()
    for row, (difference, p) in enumerate(((1.25 - 0.5, 0.7), (-2.5 + 0.25, 0.3), (0.0, 0.5))):
        expected = -p * math.log(sigmoid(difference)) - (1 - p) * math.log(sigmoid(-difference))
        assert losses[row].item() == pytest.approx(expected, abs=1e-12)
        assert rewards.grad[row, 0].item() == pytest.approx(sigmoid(difference) - p, abs=1e-12)
        assert rewards.grad[row, 1].item() == pytest.approx(p - sigmoid(difference), abs=1e-12)
    smoothed = BradleyTerry(label_smoothing=0.1).double()(rewards, ranks, None, None, preferences)[0].item()
    target = 0.7 * 0.9 + 0.3 * 0.1
    assert smoothed == pytest.approx(-target * math.log(sigmoid(1.25)) - (1 - target) * math.log(sigmoid(-1.25)))


@pytest.mark.parametrize("name", LOSSES)
def test_soft_losses_are_the_mean_over_both_orders_and_exact_where_sure(name):
    draw = torch.Generator().manual_seed(0)
    loss = make_loss(name)
    rewards = torch.randn(6, 3, generator=draw)
    ranks = torch.tensor([[1, 2, 0], [2, 1, 0], [1, 1, 0], [3, 1, 2], [1, 2, 0], [2, 1, 0]])
    margins = torch.zeros(6, 3, 3)
    margins[0, 0, 1] = margins[4, 0, 1] = 0.5
    margins[1, 1, 0] = margins[5, 1, 0] = 2.0
    ratings = torch.randn(6, 3, generator=draw)
    arguments = (ranks, margins, ratings)
    nan = math.nan
    plain = loss(rewards, *arguments)
    assert torch.equal(loss(rewards, *arguments, torch.full((6,), nan)), plain)
    sure = loss(rewards, *arguments, torch.tensor([1.0, 0.0, nan, nan, nan, nan]))
    assert torch.equal(sure, plain) # to the bit
    soft = loss(rewards, *arguments, torch.tensor([nan, nan, nan, nan, 0.75, 0.25]))
    assert torch.equal(soft[:4], plain[:4])
    for row, winner in ((4, 0), (5, 1)):
        reversed_ranks = torch.tensor([[2, 1, 0]] if winner == 0 else [[1, 2, 0]])
        sign = 1 if name == "margin_scaled" else -1
        other = loss(rewards[[row]], reversed_ranks, sign * margins[[row]].mT, ratings[[row]])
        assert soft[row].item() == pytest.approx((0.75 * plain[row] + 0.25 * other[0]).item(), rel=1e-6)


def test_soft_label_of_one_half_is_learned_from_and_a_tie_is_not():
    nan = math.nan
    ranks = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 2, 0], [0, 0, 0], [1, 1, 1]])
    preferences = torch.tensor([0.5, nan, 0.7, 0.5, nan])
    decided = decided_ranks(ranks, preferences)
    assert decided.tolist() == [[1, 2, 0], [1, 1, 0], [1, 2, 0], [0, 0, 0], [1, 1, 1]]
    assert BradleyTerry().is_informative(decided, None, None).tolist() == [True, False, True, False, False]
    one = torch.tensor([[1], [0]])
    assert torch.equal(decided_ranks(one, torch.tensor([nan, nan])), one)

    class Hinge(RewardLoss):
        def per_comparison(self, rewards, ranks, margins, ratings):
            winner = (rewards * (ranks == 1)).sum(1)
            return (1 - winner + (rewards * (ranks == 2)).sum(1)).clamp(min=0)

    rewards = torch.tensor([[0.5, 0.0]])
    assert Hinge()(rewards, torch.tensor([[1, 2]]), preferences=torch.tensor([0.8])).item() == pytest.approx(0.7)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts(), **options)


def soft_rows(count=8):
    rows = []
    for index in range(count):
        rows.append({**CHOSEN, "prompt": f"Ada likes birds {index}.", "confidence": [1.0, 0.5, 0.25, 0.9][index % 4]})
    return rows


def test_soft_labels_reach_the_batch_of_tables_and_streams(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [*soft_rows(), {**CHOSEN, "rejected": CHOSEN["chosen"], "confidence": 0.5}]
    table = tokenize_rows(Dataset.from_list(rows), tokenizer, 64)
    stream = tokenize_rows(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, 64)
    assert table["preference"][:] == [None, 0.5, 0.25, 0.9] * 2 # the row of equal texts is dropped
    assert [row["preference"] for row in stream] == table["preference"][:]
    for collate in (pad_comparisons, pack_comparisons):
        batch = collate(list(table))
        assert batch["ranks"].tolist() == [[1, 2], [1, 1], [2, 1], [1, 2]] * 2
        np.testing.assert_allclose(batch["preferences"].numpy(), [math.nan, 0.5, 0.25, 0.9] * 2)


def test_soft_labels_train_evaluate_and_resume(base, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list(soft_rows())

    def trainer(folder, rows=rows, **options):
        torch.manual_seed(0)
        model = RewardModel(base, dropout=0.0, device="cpu")
        config = RewardConfig(
            output_dir=str(tmp_path / folder),
            max_length=64,
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        return RewardTrainer(model, config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)

    whole = trainer("whole")
    rewards = whole.predict(rows).predictions
    p = np.array([1.0, 0.5, 0.25, 0.9] * 2)
    difference = (rewards[:, 0] - rewards[:, 1]).astype(float)
    expected = (p * np.logaddexp(0, -difference) + (1 - p) * np.logaddexp(0, difference)).mean()
    metrics = whole.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_pairs"] == 6 and "eval_without_loss" not in metrics
    whole.train()
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    others = rows.map(lambda row: {"confidence": 0.8})
    with pytest.raises(ValueError): # the labels are part of the data that a run is resumed with
        trainer("whole", others).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    with pytest.raises(ValueError, match="without a margin above 0"):
        trainer("scaled", rows.map(lambda row: {"margin": 1.0}), loss="margin_scaled")


def test_soft_labels_in_evaluation_are_the_targets_of_calibration():
    sureness = np.array([0.75, 1.0, 0.6])
    margins = np.array([1.0, -0.5, 2.0])
    report = calibration(margins, sureness)
    losses = [-q * math.log(sigmoid(m)) - (1 - q) * math.log(sigmoid(-m)) for q, m in zip(sureness, margins)]
    assert report["log_loss"] == pytest.approx(np.mean(losses))
    logit = calibration(np.full(4, 1.0), np.full(4, 0.9))
    assert logit["temperature"] == pytest.approx(1 / math.log(9), rel=1e-3)
    assert logit["bins"][0]["accuracy"] == pytest.approx(0.9)
    rule = Rule(lambda prompt, response: float(len(response)))
    result = evaluate(rule, [{**ARENA, "probability_a": p} for p in (0.8, 0.3, 0.5)], on_bad_row="skip")
    assert result.report["pairs"] == 2 and result.report["left_out"]["rows"] == 1
    assert result.pairs["sureness"].tolist() == [0.8, 0.7]
    assert result.report["accuracy"] == 0.5 # p above one half is the winner


def test_soft_labels_are_counted_by_the_audit_and_reported(tmp_path, caplog):
    rows = soft_rows(4)
    rows += [{**CHOSEN, "prompt": "Ada likes birds 3.", "confidence": 0.6}, {**CHOSEN, "prompt": "another"}]
    report = audit(Dataset.from_list(rows))
    assert (report["soft_labels"], report["all_tied"], report["pairs"]) == (4, 0, 5)
    assert report["duplicates"] == 0 # the same responses with another probability
    assert "4 of 6 comparisons: a soft label" in audit_table(report)
    assert not audit(Dataset.from_list([{**ARENA, "votes_a": 1, "votes_b": 1}]))["problems"]
    text = audit_table(audit(rows_of([0.7, 0.0, 1.0])))
    assert "preference are read as the probability that response_a is better" in text
    from rlhf_reward.columns import read_columns

    with caplog.at_level(logging.WARNING):
        read_columns(Dataset.from_list(rows), "rows")
        read_columns(rows_of([0.7, 0.0, 1.0]), "others")
    assert "confidence is read as the probability that the winner is the better response" in caplog.text
    assert "--columns response_a=response_b,response_b=response_a" in caplog.text
