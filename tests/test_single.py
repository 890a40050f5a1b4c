"Rows with one response: their forms, labels, groups, losses and figures."
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from scipy.stats import kendalltau, pearsonr, rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from architectures import save_language_model, word_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer
from rlhf_reward.agreement import (
    estimate,
    weighted_auroc,
    weighted_mean,
    weighted_pearson,
    weighted_ranks,
    weighted_spearman,
)
from rlhf_reward.audit import audit, audit_table
from rlhf_reward.cli.train_data import shuffled_stream
from rlhf_reward.columns import column_verdicts, with_verdicts
from rlhf_reward.comparison import Comparison
from rlhf_reward.evaluation import compare, evaluate
from rlhf_reward.grouping import MOST_GROUPED, group_indices, group_key
from rlhf_reward.labels import read_labels
from rlhf_reward.loading import load_rows
from rlhf_reward.mixtures import mix_rows
from rlhf_reward.report import report_markdown, write_report
from rlhf_reward.rows import to_comparison, to_responses
from rlhf_reward.rule import Rule
from rlhf_reward.tokenized import FEATURES, whole_sequences
from rlhf_reward.tokens import tokenize_rows
from rlhf_reward.unread import unread_columns
from rlhf_reward.verdicts import UnclearVerdict

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "steps"}
Q = [{"role": "user", "content": "q"}]
A = [{"role": "assistant", "content": "a"}]
HH = "\n\nHuman: q\n\nAssistant:"
FORMS = [ # (columns of the response, prompt and response that they mean)
    ({"prompt": "q", "response": "a"}, "q", "a"),
    ({"prompt": "q", "completion": "a"}, "q", "a"),
    ({"prompt": Q, "completion": A}, Q, A),
    ({"prompt": Q, "response": "a"}, Q, A),
    ({"prompt": "q", "completion": [*Q, *A]}, Q, A),
    ({"messages": [*Q, *A]}, Q, A),
    ({"prompt": Q, "messages": [*Q, *A]}, Q, A),
    ({"text": [*Q, *A]}, Q, A),
    ({"response": f"{HH} a"}, HH, " a"),
]


def test_pointwise_rows_of_every_form_are_the_canonical_row(tmp_path):
    for columns, prompt, response in FORMS:
        for value in ("score", "rating"):
            row = {**columns, value: 4}
            assert to_comparison(row) == Comparison(prompt, (response,), (1,), (4.0,))
            assert not unread_columns(row)
            (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
            Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
            cells = {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
            Dataset.from_list([cells]).to_csv(tmp_path / "rows.csv")
            for name in ("rows.jsonl", "rows.parquet", "rows.csv"):
                (read,) = load_rows(str(tmp_path / name))
                assert to_comparison(read) == to_comparison(row), name
        scored = to_responses(columns)
        assert (scored.prompt, scored.responses) == (prompt, (response,))
    with_list = to_comparison({"prompt": "q", "responses": ["a"], "scores": [4]})
    assert with_list == to_comparison({"prompt": "q", "response": "a", "score": 4})


def test_binary_labels_mean_what_their_column_shows(tmp_path):
    readable = [
        [True, False],
        [0, 1],
        [0.0, 1.0],
        ["1", "0"],
        [-1, 1],
        ["Good", "bad"],
        ["desirable", "undesirable"],
        ["thumbs_up", " No "],
        [True],
    ]
    for values in readable:
        rows = [{"prompt": "q", "completion": "a", "label": value} for value in values]
        meanings = column_verdicts(rows)
        good_words = ("true", "1", "1.0", "good", "desirable", "thumbs_up")
        expected = [str(value).strip().lower() in good_words for value in values]
        assert [to_comparison(row, meanings).labels for row in rows] == [(good,) for good in expected]
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("rows.parquet", "rows.jsonl"):
            for streaming in (False, True):
                assert column_verdicts(load_rows(str(tmp_path / name), streaming=streaming)) == meanings
        together = {"prompt": "q", "responses": ["a"] * len(values), "labels": values}
        assert to_comparison(together, column_verdicts([together])).labels == tuple(expected)
    for values in ([1], [0, 0], [1, 2], [0, 1, 2], [0.2, 1]):
        rows = [{"prompt": "q", "completion": "a", "label": value} for value in values]
        with pytest.raises(UnclearVerdict, match="expected true and false, or 0 and 1. Give what each value means"):
            column_verdicts(rows)
        with pytest.raises(UnclearVerdict):
            to_comparison(rows[0])
        meanings = {value: "good" if value == max(values) else "bad" for value in values}
        given = Dataset.from_list(rows)
        read = [to_comparison(row).labels[0] for row in with_verdicts(given, meanings)]
        assert read == [value == max(values) for value in values]
        assert to_comparison(rows[0], meanings).labels == (values[0] == max(values),)


def test_binary_labels_of_a_class_label_and_of_later_rows():
    rows = [{"prompt": "q", "completion": "a", "label": 0}, {"prompt": "q", "completion": "a", "label": 1}]
    for names, good in ((["neg", "pos"], 1), (["true", "false"], 0)):
        features = Features({name: Value("string") for name in ("prompt", "completion")})
        features["label"] = ClassLabel(names=names)
        table = Dataset.from_list(rows, features=features)
        meanings = column_verdicts(table)
        assert [to_comparison(row, meanings).labels for row in table] == [(good == 0,), (good == 1,)]
    features = Features({"responses": List(Value("string")), "labels": List(ClassLabel(names=["bad", "good"]))})
    table = Dataset.from_list([{"responses": ["x", "y"], "labels": [1, 0]}], features=features)
    assert to_comparison(table[0], column_verdicts(table)).ranks == (1, 2)
    known = read_labels([0, 1])
    assert to_comparison({"prompt": "q", "response": "a", "label": 1}, known).labels == (True,)
    with pytest.raises(UnclearVerdict, match="found 0, 1, 2 as label"):
        to_comparison({"prompt": "q", "response": "a", "label": 2}, known)


def test_labels_next_to_scores_are_read_only_if_they_are_labels():
    row = {"prompt": "q", "response": "a", "score": 2}
    for values, meaning in (([0, 1], (False,)), ([0.3, 1], (None,)), (["helpful", "true"], (None,))):
        rows = [{**row, "label": value} for value in values]
        assert to_comparison(rows[0], column_verdicts(rows)).labels == meaning
        assert to_comparison(rows[0], column_verdicts(Dataset.from_list(rows))).ratings == (2.0,)


BAD = [
    ({"prompt": "q", "response": "a", "score": 1, "rating": 2}, "it has a score and a rating; expected one of them"),
    ({"prompt": "q", "response": "a", "score": None}, "found None as score; expected a score, a rating or a label"),
    ({"prompt": "q", "response": "a", "score": "high"}, "found 'high' as scores; expected a finite number"),
    ({"prompt": "q", "response": "a", "label": "maybe"}, "the label is 'maybe'; expected one of true, good, "),
    ({"prompt": "q", "response": None, "score": 1}, "expected a text"),
    ({"prompt": "q", "text": "qa", "score": 1}, "it has a prompt and a whole text"),
    ({"prompt": "q", "response": "a", "score": 1, "margin": 1}, "there is one margin for 1 responses"),
    ({"prompt": "q", "responses": ["a", "b"], "labels": [True]}, "1 for|for 2 responses; expected one label for each"),
    ({"prompt": "q", "responses": ["a", "b"], "labels": [True, None]}, "or a label for each"),
    ({"prompt": "q", "response": "a"}, "one of response, completion, text, messages with one of score, rating, label"),
]


def test_rows_of_one_response_that_cannot_be_used_are_explained():
    for row, problem in BAD:
        with pytest.raises(ValueError, match=problem):
            to_comparison(row)


# ----- groups


def test_rows_of_different_sets_are_no_group():
    one = Comparison("q", ("a",), (1,), (1.0,))
    assert group_key(one, "s") == group_key(one, "s") != group_key(one, "t")
    assert group_key(one) != group_key(Comparison("q", ("a",), (1,), labels=(True,)))
    assert group_key(Comparison("q", ("a", "b"), (1, 2))) == group_key(Comparison("", ("a",), (1,), (1.0,))) == 0


def brute_force_groups(keys):
    "Prompts in the order of their first rows, each in parts of about equal size."
    by_key = {}
    for row, key in enumerate(keys):
        by_key.setdefault(key or f"alone {row}", []).append(row)
    result = []
    for rows in by_key.values():
        parts = math.ceil(len(rows) / MOST_GROUPED)
        bounds = [math.ceil(part * len(rows) / parts) for part in range(parts + 1)]
        result += [rows[start:end] for start, end in zip(bounds, bounds[1:])]
    return result


def test_pointwise_groups_have_each_row_once_and_a_limited_size():
    draw = np.random.default_rng(0)
    for num_rows, num_prompts in ((1, 1), (7, 1), (8, 1), (9, 1), (40, 1), (300, 9), (300, 400)):
        keys = draw.integers(0, num_prompts + 1, num_rows)
        order, starts = group_indices(keys)
        groups = [group.tolist() for group in np.split(order, starts[1:])]
        assert groups == brute_force_groups(keys.tolist())
        assert max(map(len, groups)) <= MOST_GROUPED and sorted(order) == list(range(num_rows))


POINTWISE = [
    {"prompt": "w4 w5", "response": " w8", "score": 3.0, "weight": None, "source": None}, # a table has these columns
    {"prompt": "w6 w7", "response": " w9", "score": 1.0},
    {"prompt": "w4 w5", "response": " w9 w10", "score": 1.0},
    {"prompt": "", "response": "w4 w5", "score": 1.0},
    {"prompt": "w4 w5", "response": " w8", "score": 2.0}, # again, with another rating
    {"prompt": "w6 w7", "response": " w8", "score": 1.0},
    {"prompt": "w4 w5", "response": " w10", "score": 2.0, "weight": 3.0},
    {"prompt": "", "response": "w6 w7", "score": 2.0},
    {"prompt": "w4 w5", "response": " w10", "score": 0.0, "source": "s"},
    {"prompt": "w4 w7", "response": " w10", "score": 0.0},
]


SORTED = [POINTWISE[number - 1] for number in (1, 3, 5, 2, 6, 4, 7, 8, 9, 10)] # as they are grouped


def test_pointwise_rows_of_a_prompt_become_one_comparison_and_no_other_do():
    tokenizer = word_tokenizer()
    table = Dataset.from_list(POINTWISE)
    tokenized = tokenize_rows(table, tokenizer, 64)
    result = [(row["row"], row["ranks"], row["ratings"], row["weight"]) for row in tokenized]
    assert result == [
        (1, [1, 2], [3.0, 1.0], 2.0),
        (5, [1], [2.0], 1.0),
        (2, [1, 1], [1.0, 1.0], 2.0),
        (4, [1], [1.0], 1.0),
        (7, [1], [2.0], 3.0),
        (8, [1], [2.0], 1.0),
        (9, [1], [0.0], 1.0),
        (10, [1], [0.0], 1.0),
    ]
    alone = {}
    for number, row in enumerate(POINTWISE, start=1):
        (single,) = tokenize_rows(Dataset.from_list([row]), tokenizer, 64)
        alone[number] = whole_sequences(single)[0]
    assert whole_sequences(tokenized[0]) == [alone[1], alone[3]] and tokenized[0]["shared_prefix"]
    streamed = list(tokenize_rows(table.to_iterable_dataset(), tokenizer, 64))
    assert streamed == list(tokenized)
    with_margins = tokenize_rows(table, tokenizer, 64, margin_from_scores=True)
    assert with_margins[0]["margins"] == [2.0] and tokenized[0]["margins"] == [0.0]
    tokenized = tokenize_rows(Dataset.from_list(labeled(POINTWISE)), tokenizer, 64)
    assert (tokenized[0]["ranks"], tokenized[0]["labels"], tokenized[0]["ratings"]) == ([1, 2], [True, False], None)


def test_overlong_pointwise_rows_are_dropped_by_themselves(caplog):
    rows = [*POINTWISE, {"prompt": "w4 w5", "response": " w8" * 80, "score": 5.0}]
    tokenized = tokenize_rows(Dataset.from_list(rows), word_tokenizer(), 64)
    assert len(tokenized[0]["rests"]) == 2
    assert "Dropped 1 of 11 comparisons of the data: longer than 64 tokens (1)." in caplog.text


def test_single_responses_of_a_shuffled_stream_meet_those_of_their_prompt():
    rows = []
    for n in range(600): # 1,200 rows, in two batches
        prompt = "".join(f"w{8 + int(digit)} " for digit in f"{n:03}")
        rows += [{"prompt": prompt, "response": f"w{4 + score}", "score": score} for score in (1, 0)]
    stream = mix_rows({"a": Dataset.from_list(rows).to_iterable_dataset()})
    tokenize = partial(tokenize_rows, tokenizer=word_tokenizer(), max_length=9)
    shuffled = list(shuffled_stream(stream, tokenize, seed=1))
    assert [example["ranks"] for example in shuffled] == 600 * [[1, 2]]
    numbers = [example["row"] for example in shuffled]
    assert sorted(numbers) == list(range(1, 1200, 2)) != numbers


# ----- training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_language_model("qwen3", tmp_path_factory.mktemp("base"))
    word_tokenizer().save_pretrained(folder)
    return folder


def trainer_of(base, folder, rows, eval_rows=None, **options):
    torch.manual_seed(0)
    model = RewardModel(base, 0.0, "cpu")
    options = {**QUIET, "learning_rate": 1e-2, **options}
    return RewardTrainer(
        model,
        RewardConfig(str(folder), **options),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=word_tokenizer(),
    )


def loss_and_gradients(trainer, dataset):
    "Return the loss over all comparisons of a tokenized data set in one batch, and its gradients."
    trainer._use_layout(dataset)
    variables = [*trainer.model.parameters(), *trainer.reward_loss.parameters()]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(dataset)))
    return loss, torch.autograd.grad(loss, variables, allow_unused=True)


def labeled(rows):
    "Rows with a label in place of the score."
    result = []
    for row in rows:
        row = {**row, "label": row["score"] > 1}
        del row["score"]
        result.append(row)
    return result


def test_pointwise_and_binary_groups_have_the_loss_and_gradients_of_their_rows(base, tmp_path):
    for loss, rows in (("regression", POINTWISE), ("binary", labeled(POINTWISE))):
        options = {"good_weight": 2.0} if loss == "binary" else {}
        trainer = trainer_of(base, tmp_path / loss, Dataset.from_list(rows), loss=loss, **options)
        assert len(trainer.train_dataset) == 8
        alone = [next(iter(tokenize_rows(Dataset.from_list([row]), word_tokenizer(), 64))) for row in rows]
        assert len(alone) == len(POINTWISE) and {len(example["rests"]) for example in alone} == {1}
        value, gradients = loss_and_gradients(trainer, trainer.train_dataset)
        expected, of_rows = loss_and_gradients(trainer, Dataset.from_list(alone, features=FEATURES))
        torch.testing.assert_close(value, expected)
        assert gradients[-1] is not None and any(gradient.abs().max() > 1e-3 for gradient in gradients)
        for gradient, of_row in zip(gradients, of_rows):
            torch.testing.assert_close(gradient, of_row, atol=1e-5, rtol=1e-4)


def test_pairwise_losses_learn_from_pointwise_rows_of_the_same_prompt(base, tmp_path, caplog):
    trainer = trainer_of(base, tmp_path / "pairs", Dataset.from_list(POINTWISE), Dataset.from_list(POINTWISE))
    assert trainer.train_dataset["row"][:] == [1]
    assert "Dropped 7 of 8 comparisons of the training set: no response that ranks above another." in caplog.text
    metrics = trainer.evaluate()
    assert (metrics["eval_pairs"], metrics["eval_without_loss"], metrics["eval_responses"]) == (1, 7, 10)
    ties = trainer_of(base, tmp_path / "ties", Dataset.from_list(POINTWISE), loss="davidson")
    assert ties.train_dataset["row"][:] == [1, 2]
    with pytest.raises(ValueError, match="None of 2 comparisons of the training set is left for the loss"):
        trainer_of(base, tmp_path / "none", Dataset.from_list(POINTWISE[-2:]))
    stream = trainer_of(base, tmp_path / "stream", Dataset.from_list(POINTWISE).to_iterable_dataset(), max_steps=1)
    assert [example["row"] for example in stream.train_dataset] == [1]
    for loss, rows in (("binary", POINTWISE), ("regression", labeled(POINTWISE))):
        with pytest.raises(ValueError, match="Row 1 of the training set has no (label|scores)"):
            trainer_of(base, tmp_path / loss, Dataset.from_list(rows), loss=loss)


def test_binary_offset_is_saved_with_the_loss_and_resumed(base, tmp_path):
    rows = Dataset.from_list(labeled(POINTWISE))
    options = {"loss": "binary", "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    whole = trainer_of(base, tmp_path / "whole", rows, rows, **options)
    whole.train()
    saved = json.loads((tmp_path / "whole/checkpoint-2/loss.json").read_text())
    assert saved == {"loss": "binary", "offset": whole.reward_loss.offset.item()} and saved["offset"] != 0
    resumed = trainer_of(base, tmp_path / "resumed", rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert resumed.reward_loss.offset.item() == saved["offset"]
    reopened = RewardModel.from_pretrained(str(tmp_path / "whole/checkpoint-2"), device="cpu")
    ids = torch.tensor([[4, 5, 8, 2]])
    torch.testing.assert_close(reopened(ids), whole.model.eval()(ids)) # without the offset
    metrics = whole.evaluate()
    assert metrics["eval_offset"] == saved["offset"] and 0 <= metrics["eval_labels_right"] <= 1
    other = trainer_of(base, tmp_path / "other", rows, **options, good_weight=2.0)
    with pytest.raises(ValueError, match="good_weight 1.0 .now 2.0."):
        other.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))


def test_pointwise_metrics_of_the_trainer_are_those_of_scipy(base, tmp_path):
    both = [{**row, "label": row["score"] > 1} for row in POINTWISE]
    trainer = trainer_of(base, tmp_path, Dataset.from_list(both), Dataset.from_list(both), loss="regression")
    metrics = trainer.evaluate()
    output = trainer.predict(trainer.eval_dataset)
    rewards, ratings = [], []
    taus = []
    for own, example in zip(output.predictions, trainer.eval_dataset):
        own = own[: len(example["ratings"])]
        rewards += own.tolist()
        ratings += example["ratings"]
        tau = kendalltau(own, example["ratings"]).statistic if len(own) > 1 else math.nan
        taus.append(tau)
    assert len(rewards) == len(POINTWISE)
    expected = {
        "pearson": pearsonr(rewards, ratings).statistic,
        "spearman": spearmanr(rewards, ratings).statistic,
        "kendall": np.nanmean(taus),
        "mse": np.mean((np.array(rewards) - ratings) ** 2),
        "auroc": roc_auc_score(np.array(ratings) > 1, rewards),
        "loss": np.mean((np.array(rewards) - ratings) ** 2 * [row.get("weight") or 1 for row in SORTED])
        / np.mean([row.get("weight") or 1 for row in SORTED]),
    }
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name
    assert "eval_offset" not in metrics


# ----- figures


def test_pointwise_figures_of_a_draw_are_those_of_the_repeated_responses():
    draw = np.random.default_rng(0)
    for num_responses, num_values in ((5, 2), (40, 6), (60, 1000)):
        rewards = draw.integers(0, num_values, num_responses).astype(float)
        ratings = draw.integers(0, num_values, num_responses).astype(float)
        weights = draw.integers(0, 4, (6, num_responses)).astype(float)
        result = {
            "pearson": weighted_pearson(rewards, ratings, weights),
            "spearman": weighted_spearman(rewards, ratings, weights),
            "auroc": weighted_auroc(rewards, ratings > num_values / 3, weights),
        }
        for index, counts in enumerate(weights.astype(int)):
            x, y = np.repeat(rewards, counts), np.repeat(ratings, counts)
            np.testing.assert_allclose(weighted_ranks(rewards, weights)[index][counts > 0], rankdata(x)[
                np.searchsorted(np.repeat(np.arange(num_responses), counts), np.flatnonzero(counts > 0))
            ])
            is_good = y > num_values / 3
            expected = {
                "pearson": pearsonr(x, y).statistic if np.ptp(x) and np.ptp(y) else math.nan,
                "spearman": spearmanr(x, y).statistic if np.ptp(x) and np.ptp(y) else math.nan,
                "auroc": roc_auc_score(is_good, x) if 0 < is_good.sum() < len(x) else math.nan,
            }
            for name, value in expected.items():
                assert result[name][index] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_pointwise_intervals_are_by_prompt_and_cover():
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(12): # 50 prompts with an effect of their own and 4 responses each; the true mean is 0
        prompts = np.repeat(np.arange(50), 4)
        values = draw.normal(size=50)[prompts] + 0.1 * draw.normal(size=200)
        result = estimate(partial(weighted_mean, values), prompts)
        covered += result["low"] <= 0 <= result["high"]
    assert covered >= 9
    width = result["high"] - result["low"]
    assert width == pytest.approx(2 * 1.96 * values.reshape(50, 4).mean(axis=1).std() / 50 ** 0.5, rel=0.15)
    of_one_prompt = estimate(partial(weighted_mean, values), np.zeros(200))
    assert of_one_prompt == {"value": pytest.approx(values.mean()), "low": None, "high": None}
    assert estimate(partial(weighted_pearson, values, np.ones(200)), prompts) is None


def length_rule(prompt, response):
    return float(len(response))


def test_pointwise_and_binary_rows_are_evaluated(tmp_path):
    draw = np.random.default_rng(2)
    rows = []
    for number in range(60):
        length = int(draw.integers(1, 20))
        score = length + float(draw.normal(scale=4))
        row = {"prompt": f"p{number % 25}", "response": "x" * length + str(number), "score": score, "source": None}
        rows.append({**row, "source": "even" if number % 25 % 2 == 0 else "odd", "label": score > 8})
    rewards = [len(row["response"]) for row in rows]
    scores = [row["score"] for row in rows]
    rule = Rule(length_rule)
    rule.offset = 10.0
    result = evaluate(rule, rows)
    report = result.report
    assert report["comparisons"] == 25 and report["responses"] == 60 and report["pairs"] > 40
    ratings, labels = report["ratings"], report["labels"]
    assert ratings["pearson"]["value"] == pytest.approx(pearsonr(rewards, scores).statistic)
    assert ratings["spearman"]["value"] == pytest.approx(spearmanr(rewards, scores).statistic)
    assert ratings["mse"]["value"] == pytest.approx(np.mean((np.array(rewards) - scores) ** 2))
    taus = []
    for prompt in range(25):
        own = [(len(row["response"]), row["score"]) for row in rows if row["prompt"] == f"p{prompt}"]
        taus.append(kendalltau(*zip(*own)).statistic)
    assert ratings["kendall"]["value"] == pytest.approx(np.nanmean(taus))
    assert ratings["kendall_prompts"] == np.isfinite(taus).sum()
    is_good = np.array([row["label"] for row in rows])
    assert labels["auroc"]["value"] == pytest.approx(roc_auc_score(is_good, rewards))
    above = np.sign(np.array(rewards) - 10.0)
    right = 0.5 + 0.5 * np.where(is_good, above, -above)
    assert labels["accuracy"]["value"] == pytest.approx(right.mean())
    for figure in (ratings["pearson"], ratings["spearman"], ratings["mse"], ratings["kendall"], labels["auroc"]):
        assert figure["low"] < figure["value"] < figure["high"]
    assert set(report["sources"]) == {"even", "odd"} and report["sources"]["odd"]["ratings"]["pearson"]
    # each prompt once: no pair is left
    alone = [{**row, "prompt": row["response"]} for row in rows]
    other = evaluate(Rule(length_rule), alone)
    assert other.report["pairs"] == 0 and "accuracy" not in other.report
    assert other.report["ratings"]["spearman"]["value"] == pytest.approx(ratings["spearman"]["value"])
    assert other.report["ratings"]["kendall"] is None and other.report["labels"]["accuracy"] is None
    assert "good above 10.000" in report_markdown({"rows": {"length": result}})
    write_report({"alone": {"length": other, "again": other}}, tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Reward and rating: Spearman" in text and "no offset in the model" in text
        assert "accuracy over all pairs" not in text
    figures = json.loads((tmp_path / "report.json").read_text())["data"]
    assert figures["alone"]["compared"] is None and figures["alone"]["models"]["again"]["labels"]["offset"] is None
    with pytest.raises(ValueError, match="no pair in which people prefer one response, no rating and no label"):
        evaluate(Rule(length_rule), [Comparison("p", ("x", "y"), (1, 1))])


def test_groups_of_which_a_model_has_left_out_a_response_are_not_compared():
    rows = [{"prompt": f"p{number // 2}", "response": "x" * number + "y", "score": number} for number in range(8)]
    whole = evaluate(Rule(length_rule), rows)
    less = evaluate(Rule(length_rule), [{**rows[0], "response": None}, *rows[1:]], on_bad_row="skip")
    assert less.report["left_out"]["rows"] == 1
    assert compare({"whole": whole, "less": less})["comparisons"] == 3


def test_binary_offset_of_a_checkpoint_reaches_the_evaluation(base, tmp_path):
    rows = Dataset.from_list(labeled(POINTWISE))
    trainer = trainer_of(base, tmp_path, rows, rows, loss="binary", max_steps=1)
    trainer.reward_loss.offset.data.fill_(-0.25)
    trainer.save_model()
    scorer = Scorer.from_pretrained(tmp_path, device="cpu")
    report = evaluate(scorer, rows).report
    assert scorer.offset == report["labels"]["offset"] == -0.25
    metrics = trainer.evaluate()
    assert report["labels"]["accuracy"]["value"] == pytest.approx(metrics["eval_labels_right"])
    assert report["labels"]["auroc"]["value"] == pytest.approx(metrics["eval_auroc"])
    assert Scorer(scorer.model, scorer.tokenizer).offset is None


# ----- the audit


def test_audit_of_pointwise_and_binary_rows():
    report = audit(Dataset.from_list(POINTWISE[:3] + POINTWISE[4:6]))
    assert not report["problems"] and report["pairs"] == 0
    assert report["single"] == {
        "responses": 5,
        "prompts": 2,
        "prompts_of_several": 2,
        "scores": {"min": 1.0, "5%": 1.0, "median": 1.0, "95%": pytest.approx(2.8), "max": 3.0},
    }
    counts = ("duplicates", "contradictions", "constant_scores", "all_tied", "inverted_scores")
    assert [report[name] for name in counts] == [0] * 5
    text = audit_table(report)
    assert "5 single responses to 2 prompts, of which 2 have several" in text and "rejected    -" in text
    json.dumps(report, allow_nan=False)
    rows = [*labeled(POINTWISE), {**labeled(POINTWISE)[0], "label": False}, labeled(POINTWISE)[1]]
    report = audit(Dataset.from_list(rows))
    assert report["labels"] == {"good": 4, "bad": 8} and "labels: 4 good, 8 bad" in audit_table(report)
    assert (report["contradictions"], report["duplicates"]) == (5, 2)
    assert report["forms"] == {"prompt, response, label": 12}
    for rows, problem in (
        ([{"prompt": str(number), "response": "a", "score": 2} for number in range(3)], "all 3 scores of .* are 2"),
        ([{"prompt": str(number), "response": "a", "label": True} for number in range(3)], "all 3 labels are good"),
        ([{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}], "no response ranks above another"),
    ):
        (result,) = [text for text in audit(Dataset.from_list(rows))["problems"] if "nothing to learn" in text]
        assert re.search(problem, result)
    mapped = audit(Dataset.from_list([{"prompt": "q", "response": "a", "label": value} for value in (0, 1)]))
    assert mapped["verdicts"] == {"0": "bad", "1": "good"} and not mapped["bad_rows"]
