"Wrong labels: Bayes by hand, margins that have not seen the label, flags on a made set, and a file that trains."

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer, load_rows
from rlhf_reward.cli.audit_command import audit
from rlhf_reward.comparison import Comparison
from rlhf_reward.flip_features import find_flips_in_rows, judge, text_features
from rlhf_reward.flips import comparison_row, cross_fitted_margins, find_flips, flip_rates
from rlhf_reward.flips import wrong_probability
from rlhf_reward.rows import to_comparison
from rlhf_reward.synthetic import synthetic_comparisons, synthetic_texts, tiny_decoder
from rlhf_reward.tokens import tokenize_rows


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_flips_have_the_probability_of_bayes():
    for margin in (-4.0, -0.5, 0.0, 2.0):
        for rate in (0.0, 0.1, 0.4):
            better = sigmoid(1.5 * margin)
            expected = rate * (1 - better) / ((1 - rate) * better + rate * (1 - better))
            assert wrong_probability(np.array([margin]), rate, 1.5)[0] == pytest.approx(expected, abs=1e-12)
    # a soft label of one half leaves all to the model; a sure one without flips leaves nothing to it
    assert wrong_probability(np.array([1.0]), 0.2, 1.0, np.array([0.5]))[0] == pytest.approx(1 - sigmoid(1.0))
    assert wrong_probability(np.array([-9.0]), 0.0)[0] == 0
    assert wrong_probability(np.array([0.0]), 0.0, 1.0, 0.8)[0] == pytest.approx(0.2)


def test_flips_rate_is_found_where_margins_show_it():
    draw = np.random.default_rng(0)
    for rate in (0.0, 0.1, 0.3):
        margins = np.abs(5 * draw.normal(size=2000)) * np.where(draw.random(2000) < rate, -1, 1)
        found = flip_rates(margins).summary()
        assert found["low"] - 1e-6 <= found["rate"] <= found["high"] + 1e-6
        assert found["rate"] == pytest.approx(rate, abs=0.04) and found["high"] - found["low"] < 0.08
    for margins in (draw.normal(size=2000), np.zeros(3)): # of a model by chance: what was assumed
        chance = flip_rates(margins)
        assert chance.summary()["rate"] == pytest.approx(0.1, abs=0.03) and chance.summary()["high"] > 0.25
        assert chance.wrong(np.array([-1.0, 0.0, 1.0])) == pytest.approx([0.1, 0.1, 0.1], abs=0.05)


def test_flips_are_the_mean_over_rates():
    margins = 2 * np.random.default_rng(0).normal(size=300) + 1
    rates = flip_rates(margins)
    assert rates.weights.sum() == pytest.approx(1)
    expected = sum(w * wrong_probability(margins, r, a) for r, a, w in zip(*rates))
    np.testing.assert_allclose(rates.wrong(margins), expected)
    costs = []
    for rate, scale in zip(rates.rates, rates.scales): # likelihood times prior, by hand
        better = 1 / (1 + np.exp(-scale * margins))
        costs.append(-np.log((1 - rate) * better + rate * (1 - better)).sum() + rate / 0.1)
    weights = np.exp(min(costs) - np.array(costs))
    np.testing.assert_allclose(rates.weights, weights / weights.sum(), atol=1e-6)


def test_flips_margins_have_not_seen_their_own_prompt(monkeypatch):
    monkeypatch.setattr("rlhf_reward.flips.STRENGTHS", (0.1,)) # which is chosen by all labels
    draw = np.random.default_rng(0)
    features = draw.normal(size=(400, 4)) + [0.5, 0, 0, 0]
    prompts = np.repeat(np.arange(100), 4)
    weights = np.ones(400)
    margins = cross_fitted_margins(features, prompts, weights)
    changed = features.copy()
    changed[prompts == 7] *= -1 # other labels of one prompt
    others = cross_fitted_margins(changed, prompts, weights)
    np.testing.assert_allclose(others[prompts == 7], -margins[prompts == 7], rtol=1e-6)
    assert (others[prompts != 7] != margins[prompts != 7]).sum() >= 300 # but they are in the models of other folds
    assert (margins > 0).mean() > 0.6
    for folds in (1, 101):
        with pytest.raises(ValueError, match="expected 2 folds or more"):
            cross_fitted_margins(features, prompts, weights, folds)


ROWS = (
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "b", "margin": 2.0, "weight": 0.5, "source": "s"},
    {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 3.0]},
    {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
    {"prompt": "p", "responses": ["a", "b", "c"], "scores": [2.0, 2.0, 5.0]},
    {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"},
    {"prompt": "p", "response_a": "a", "response_b": "b", "votes_a": 1, "votes_b": 3},
    {"prompt": "p", "response_a": "a", "response_b": "b", "probability_a": 0.5},
    {"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 0.25, "margin": 1.0},
    {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
    {"chosen": "the sum is 4", "rejected": "the sum is 5"},
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8]},
    {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": [{"role": "assistant", "content": "5"}],
        "tools": [{"name": "add"}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
)


def flipped(comparison):
    "The same comparison with the chosen of two responses first."
    order = sorted(range(2), key=lambda index: comparison.ranks[index])
    share = comparison.preference
    return Comparison(
        comparison.prompt,
        tuple(comparison.responses[index] for index in order),
        tuple(comparison.ranks[index] for index in order),
        comparison.ratings and tuple(comparison.ratings[index] for index in order),
        comparison.margin,
        comparison.weight,
        comparison.source,
        comparison.template,
        preference=None if share is None else max(share, 1 - share),
    )


def test_flips_rows_are_read_again_as_the_same_comparison():
    for row in ROWS:
        comparison = to_comparison(row)
        again = to_comparison(json.loads(json.dumps(comparison_row(comparison))))
        expected = flipped(comparison) if len(comparison.responses) == 2 else comparison
        assert again == expected, row
        assert again.whole == comparison.whole


@pytest.fixture(scope="module")
def made():
    "Rows with a fifth of the labels flipped, and which ones are."
    rows = []
    is_flipped = np.random.default_rng(0).random(1500) < 0.2
    for row, flip in zip(synthetic_comparisons(1500, num_responses=2, likes="birds"), is_flipped):
        (_, worse), (_, better) = sorted(zip(row["scores"], row["responses"]))
        chosen, rejected = (worse, better) if flip else (better, worse)
        rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return rows, is_flipped


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_decoder(tmp_path_factory.mktemp("base"), synthetic_texts(), **options)


def test_flips_of_a_made_set_are_found_and_their_file_trains(made, base, tmp_path):
    from transformers import AutoTokenizer

    rows, is_flipped = made
    tie = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}
    four = {"prompt": "q", "responses": [" robin wren", " saw", " axe saw"], "ranks": [1, 2, 3], "weight": 2.0}
    columns = ("prompt", "chosen", "rejected", "responses", "ranks", "weight")
    table = []
    for row in [*rows, tie, four, {"prompt": "bad", "chosen": "a"}]:
        table.append(dict.fromkeys(columns) | row)
    flips = find_flips_in_rows(Dataset.from_list(table))
    assert flips.report["left_out"] == 1 and "Row 1503" in flips.report["first_left_out"]
    pairs = flips.pairs[flips.pairs["row"] <= 1500].sort_values("row")
    wrong = pairs["wrong"].to_numpy()
    named = wrong > 0.5
    assert is_flipped[named].mean() > 0.7 and is_flipped[named].sum() > 0.3 * is_flipped.sum()
    assert is_flipped[np.argsort(pairs["margin"].to_numpy())[:100]].mean() > 0.8
    assert flips.report["expected"] == pytest.approx(flips.pairs["wrong"].sum())
    assert flips.report["pairs"] == 1503 and not flips.report["notes"]

    file = tmp_path / "cleaned.jsonl"
    flips.write(file)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(written) == 1502 and written[-1]["row"] == 1501 and "flip_probability" not in written[-1] # the tie
    probabilities = [row["flip_probability"] for row in written[:-1]]
    assert probabilities == sorted(probabilities, reverse=True)
    of_four, = (row for row in written if row["row"] == 1502)
    mean = flips.pairs[flips.pairs["row"] == 1502]["wrong"].mean()
    assert of_four["weight"] == pytest.approx(2 * (1 - mean), abs=1e-6) and of_four["ranks"] == [1, 2, 3]
    again = load_rows(str(file))
    first = to_comparison(again[0])
    assert first.ranks == (2, 1) and first.preference == pytest.approx(1 - probabilities[0]) # read as reversed
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenized = tokenize_rows(again.select(range(16)), tokenizer, 64)
    assert tokenized["preference"][0] == first.preference
    args = RewardConfig(str(tmp_path / "run"), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
    RewardTrainer(RewardModel(base, 0.0, "cpu"), args, train_dataset=tokenized, processing_class=tokenizer).train()


def test_flips_are_not_named_where_nothing_is_known():
    draw = np.random.default_rng(0)
    comparisons = [Comparison(f"p{index}", ("a", "b"), (1, 2)) for index in range(300)]
    flips = find_flips(comparisons, draw.normal(size=(600, 3)))
    assert "not predicted better than by chance" in flips.report["notes"][0]
    assert flips.report["likely"] == 0
    assert min(row["confidence"] for row in flips.training_rows()) > 0.7
    with pytest.raises(ValueError, match="no pair of which one response is better"):
        find_flips([Comparison("p", ("a", "b"), (1, 1))], np.zeros((2, 1)))
    # a soft label is the prior of what rewards say
    soft = [*comparisons, Comparison("p", ("a", "b"), (2, 1), preference=0.4)]
    rewards = np.abs(draw.normal(size=602)) * np.tile([1, -1], 301)
    found = find_flips(soft, rewards=rewards)
    line = found.pairs[found.pairs["comparison"] == 300].iloc[0]
    assert (line["winner"], line["loser"], line["sureness"]) == (1, 0, 0.6)
    assert line["wrong"] > 0.9 and line["margin"] < 0


def test_flips_are_judged_by_states_or_rewards(base, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    comparisons = [
        Comparison("Ada likes birds.", (" robin", " saw axe"), (1, 2)),
        Comparison("", (" robin" * 60, " saw"), (1, 2)),
        Comparison("Ben likes tools.", (" wren", " robin", " saw"), (2, 3, 1)),
    ]
    judged = judge(base, comparisons, max_length=32, device="cpu")
    assert judged.kept == [0, 2] and len(judged.problems) == 1 and judged.rewards is None
    model = RewardModel(base, 0.0, "cpu")
    states = []
    texts = ("Ada likes birds. robin", "Ada likes birds. saw axe", "Ben likes tools. wren", "Ben likes tools. robin")
    for text in (*texts, "Ben likes tools. saw"):
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            states.append(model.backbone(ids).last_hidden_state[0, -1].numpy())
    states = np.stack(states)
    np.testing.assert_allclose(judged.features, states / states.std(axis=0), atol=0.02) # kept in half precision

    model.save_pretrained(tmp_path / "model", tokenizer)
    judged = judge(str(tmp_path / "model"), [comparisons[0]], device="cpu")
    expected = Scorer(model, tokenizer).score_comparisons([comparisons[0]])[0]
    assert judged.features is None and judged.rewards.tolist() == pytest.approx(expected)
    assert text_features(comparisons).shape[0] == 7


def test_flips_on_the_command_line(made, tmp_path, monkeypatch, capsys):
    rows, is_flipped = made
    monkeypatch.chdir(tmp_path)
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:400])
    for argv, message in (
        (["rows.jsonl", "--output", "new.jsonl"], "--output is given without --find_flips"),
        (["rows.jsonl", "--model", "m"], "--model is given without --find_flips"),
        (["rows.jsonl", "--find_flips", "--output", "rows.jsonl"], "rows.jsonl exists"),
    ):
        with pytest.raises(SystemExit, match=message):
            audit(argv)
    with pytest.raises(SystemExit) as end:
        audit(["rows.jsonl", "--find_flips", "--output", "new.jsonl"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "Labels judged by 5 folds of prompts, by words and lengths" in text and "new.jsonl" in text
    shown = text.partition("winner by the label | loser\n")[2].splitlines()[:10]
    assert is_flipped[[int(line.split()[0]) - 1 for line in shown]].mean() > 0.5
    assert len(open("new.jsonl").readlines()) == 400
