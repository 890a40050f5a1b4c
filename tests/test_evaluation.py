"Each figure of an evaluation against an independent computation, and planted facts that the report has to find."
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from architectures import save_language_model, word_tokenizer
from datasets import Dataset

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer
from rlhf_reward.data import Comparison, to_comparison
from rlhf_reward.evaluation import (
    best_of_n, calibration, compare, evaluate, interval, length_bias, pair_table, ranking, response_table, statistics, usable, without_prompt)
from rlhf_reward.scoring import Scorer


class Said(Scorer):
    "A scorer whose reward is a function of prompt and response, and whose tokens are characters."
    def __init__(self, reward):
        self.reward = reward

    def tokenize(self, comparisons):
        text = lambda said: said if isinstance(said, str) else " ".join(message["content"] for message in said)
        return [[list(text(comparison.prompt) + text(response)) for response in comparison.responses] for comparison in comparisons]

    def score_comparisons(self, comparisons, normalize=False, processes=None):
        return [[self.reward(comparison.prompt, response) for response in comparison.responses] for comparison in comparisons]


def table(rewards, ranks, ratings=None, prompts=None, tokens=None, blind=None):
    "A response table of given numbers."
    comparisons = [Comparison(str(prompt), tuple(map(str, range(len(own)))), tuple(own), None if ratings is None else tuple(ratings[place]))
                   for place, (own, prompt) in enumerate(zip(ranks, prompts or range(len(ranks))))]
    return response_table(comparisons, rewards, blind or rewards, tokens or [[1] * len(own) for own in ranks])


def random_table(count=200, seed=0):
    draw = random.Random(seed)
    ranks = [[draw.randint(1, 3) for _ in range(draw.randint(2, 6))] for _ in range(count)]
    rewards = [[round(draw.gauss(-rank, 1), 1) for rank in own] for own in ranks] # rounded: some tie
    return rewards, ranks, [draw.randrange(60) for _ in ranks], [[draw.randint(1, 50) for _ in own] for own in ranks]


# ----- intervals

def test_interval_of_independent_pairs():
    values = np.array([1] * 70 + [0] * 30)
    found = interval(values, np.arange(100))
    error = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert found["value"] == 0.7
    assert found["low"] == pytest.approx(0.7 - error, abs=0.015) and found["high"] == pytest.approx(0.7 + error, abs=0.015)
    assert interval(values, np.arange(100)) == found
    uneven = np.linspace(0, 1, 100)
    assert interval(uneven, np.arange(100)) == interval(uneven, np.arange(100)) != interval(uneven, np.arange(100), seed=1) # by the seed alone
    assert interval(values, np.zeros(100)) == {"value": 0.7, "low": 0.0, "high": 1.0} # one prompt says nothing of others


def test_pairs_to_one_prompt_make_nothing_surer():
    values, prompts = np.array([1] * 70 + [0] * 30), np.arange(100)
    once, often = interval(values, prompts), interval(np.repeat(values, 9), np.repeat(prompts, 9))
    assert often == pytest.approx(once)
    alone = interval(np.repeat(values, 9), np.arange(900))
    assert alone["high"] - alone["low"] < 0.4 * (once["high"] - once["low"])


def test_interval_of_clusters_against_the_sandwich():
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 9, 300)
    values = np.concatenate([(draw.random(size) < share) * 1.0 for size, share in zip(sizes, draw.beta(2, 1, 300))])
    prompts = np.repeat(np.arange(300), sizes)
    residuals = np.array([(values[prompts == prompt] - values.mean()).sum() for prompt in range(300)])
    error = 1.96 * math.sqrt((residuals ** 2).sum()) / len(values) # of a ratio, linearised
    found = interval(values, prompts)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(error, rel=0.1)


def test_interval_covers_what_it_says():
    draw, inside = np.random.default_rng(1), 0
    for repetition in range(200):
        values = (draw.random(120).reshape(40, 3) < draw.beta(4, 2, 40)[:, None]).astype(float).ravel() # mean 2/3
        found = interval(values, np.repeat(np.arange(40), 3), seed=repetition)
        inside += found["low"] <= 2 / 3 <= found["high"]
    assert 0.89 <= inside / 200 <= 0.99


def test_interval_where_all_are_right_or_wrong():
    right = interval(np.ones(20), np.repeat(np.arange(10), 2))
    assert right == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 10)), "high": 1.0} # Clopper–Pearson, by hand: ten prompts
    wrong = interval(np.zeros(20), np.repeat(np.arange(10), 2))
    assert wrong == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 10))}
    with pytest.raises(ValueError, match="There is no pair"):
        interval(np.array([]), np.array([]))


# ----- accuracy and its like

def test_accuracy_and_counts_by_a_plain_loop():
    rewards, ranks, prompts, tokens = random_table()
    found = statistics(table(rewards, ranks, prompts=prompts, tokens=tokens))
    pairs = [(own_rewards[one] - own_rewards[other], own_tokens[one] - own_tokens[other]) for own_rewards, own, own_tokens in zip(rewards, ranks, tokens)
             for one in range(len(own)) for other in range(len(own)) if own[one] < own[other]]
    share = lambda values: sum(1 if value > 0 else 0.5 if value == 0 else 0 for value in values) / len(values)
    assert found["pairs"] == len(pairs) and found["comparisons"] == 200 and found["responses"] == sum(map(len, ranks))
    assert found["accuracy"] == pytest.approx(share([margin for margin, _ in pairs])) == found["accuracy_interval"]["value"]
    assert found["tied_rewards"] == sum(margin == 0 for margin, _ in pairs) > 0
    assert found["baselines"]["longer wins"]["value"] == pytest.approx(share([longer for _, longer in pairs]))
    assert found["baselines"]["shorter wins"]["value"] == pytest.approx(1 - share([longer for _, longer in pairs]))
    random_share = statistics(table([[1.0, 2.0]] * 400, [[1, 2]] * 400))["baselines"]["random"]
    assert random_share["value"] == 0.5 and random_share["low"] == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.01) # 400 tosses of a coin
    assert random_share["high"] == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.01)
    assert found["length"]["chosen_longer"]["pairs"] == sum(longer > 0 for _, longer in pairs)
    assert found["length"]["chosen_shorter"]["accuracy"]["value"] == pytest.approx(share([margin for margin, longer in pairs if longer < 0]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_cannot_be_evaluated():
    with pytest.raises(ValueError, match="2 rewards are not finite, the first of comparison 2"):
        statistics(table([[1.0, 2.0], [math.nan, 1.0], [1.0, math.inf]], [[1, 2]] * 3))
    with pytest.raises(ValueError, match="no pair in which people prefer"):
        statistics(table([[1.0, 2.0]], [[1, 1]]))
    with pytest.raises(ValueError, match="There are no comparisons"):
        evaluate(Said(lambda prompt, response: 0.0), [])


# ----- calibration

def test_calibration_by_hand():
    margins = np.array([math.log(3)] * 4 + [-math.log(3)] * 4 + [math.log(0.96 / 0.04)] * 2) # 75 % sure and right in half, 96 % sure and always right
    found = calibration(margins)
    assert [(one["pairs"], one["accuracy"]) for one in found["bins"]] == [(8, 0.5), (2, 1.0)]
    assert [one["confidence"] for one in found["bins"]] == pytest.approx([0.75, 0.96])
    assert found["ece"] == pytest.approx(0.8 * 0.25 + 0.2 * 0.04)
    assert found["log_loss"] == pytest.approx(-(4 * math.log(0.75) + 4 * math.log(0.25) + 2 * math.log(0.96)) / 10)


def test_calibration_against_scikit_learn():
    draw = np.random.default_rng(0)
    strength = draw.normal(0, 2, 20_000) # of the first over the second response, as people are
    margins = np.where(draw.random(20_000) < 1 / (1 + np.exp(-strength)), strength, -strength) # of the one that is preferred
    found = calibration(margins)
    probability = 1 / (1 + np.exp(-np.abs(margins)))
    assert found["log_loss"] == pytest.approx(sklearn.metrics.log_loss(margins > 0, probability), rel=1e-6)
    accuracy, confidence = sklearn.calibration.calibration_curve(margins > 0, probability * 2 - 1, n_bins=10) # bins of 0.5 to 1, stretched to 0 to 1
    assert [one["accuracy"] for one in found["bins"]] == pytest.approx(accuracy)
    assert [one["confidence"] for one in found["bins"]] == pytest.approx((confidence + 1) / 2)
    assert found["ece"] < 0.01 and found["temperature"] == pytest.approx(1, abs=0.05)
    assert calibration(3 * margins)["temperature"] == pytest.approx(3, abs=0.15) # three times too sure
    assert calibration(3 * margins)["log_loss_at_temperature"] == pytest.approx(found["log_loss_at_temperature"], rel=1e-4)
    assert calibration(3 * margins)["log_loss_at_temperature"] < calibration(3 * margins)["log_loss"]


# ----- length

def lengths_and_quality(count=400, seed=0):
    draw = np.random.default_rng(seed)
    tokens, quality = draw.integers(5, 60, (count, 2)), draw.normal(0, 1, (count, 2))
    ranks = [[1, 2] if own[0] > own[1] else [2, 1] for own in quality]
    return tokens, quality, ranks


def test_a_model_that_is_length_is_called_so():
    tokens, quality, ranks = lengths_and_quality()
    responses = table((0.1 * tokens - 3).astype(np.float32).tolist(), ranks, tokens=tokens.tolist())
    found = length_bias(responses, pair_table(responses))
    assert found["pearson"] == pytest.approx(1) and found["spearman"] == pytest.approx(1) and found["reward_per_token"] == pytest.approx(0.1)
    assert found["controlled_accuracy"]["value"] == 0.5
    assert found["chosen_longer"]["accuracy"]["value"] == 1 and found["chosen_shorter"]["accuracy"]["value"] == 0


def test_length_is_taken_out_of_a_model_that_knows_more():
    tokens, quality, ranks = lengths_and_quality()
    responses = table((quality + 0.2 * tokens).tolist(), ranks, tokens=tokens.tolist())
    found = length_bias(responses, pair_table(responses))
    assert found["reward_per_token"] == pytest.approx(0.2, abs=0.01) and found["controlled_accuracy"]["value"] > 0.9
    assert statistics(responses)["accuracy"] < 0.7
    reward, length = (responses[name].to_numpy(float) for name in ("reward", "tokens"))
    assert found["pearson"] == pytest.approx(np.corrcoef(reward, length)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(scipy.stats.rankdata(reward), scipy.stats.rankdata(length))[0, 1])


def test_length_where_there_is_none():
    responses = table([[1.0, 2.0], [2.0, 1.0]], [[1, 2], [1, 2]])
    found = length_bias(responses, pair_table(responses))
    assert found["pearson"] is None and found["chosen_longer"] == {"pairs": 0, "accuracy": None} and found["controlled_accuracy"]["value"] == 0.5


# ----- more than two responses

def test_ranking_by_hand():
    # right order; best of three second; two share the highest reward, one of them the best; all tie; not more than two
    rewards = [[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0]]
    ranks = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2]]
    found = ranking(table(rewards, ranks))
    assert found["comparisons"] == 4 and found["without_tau"] == 1
    assert found["best_found"] == pytest.approx((1 + 0 + 1 / 2 + 1 / 3) / 4)
    tau_with_a_tie = 2 / math.sqrt(2 * 3) # concordant 2, discordant 0; 1 of 3 pairs tied in the rewards
    assert found["kendall_tau"] == pytest.approx((1 + 1 / 3 + tau_with_a_tie) / 3)
    discount = [1, 1 / math.log2(3), 1 / 2]
    ideal = 2 * discount[0] + 1 * discount[1]
    gains = [ideal, 1 * discount[0] + 2 * discount[1], 1.5 * (discount[0] + discount[1]), 1 * sum(discount)] # ties share their places
    assert found["ndcg"] == pytest.approx(sum(gain / ideal for gain in gains) / 4)
    assert ranking(table([[1.0, 2.0]], [[1, 2]])) is None


def test_best_of_n_against_all_subsets():
    draw = random.Random(0)
    rewards = [[draw.choice([0.0, 1.0, 2.0, 3.0, 4.0]) for _ in range(5)] for _ in range(6)] + [[1.0, 2.0]]
    ratings = [[float(draw.randint(1, 9)) for _ in own] for own in rewards]
    curve = best_of_n(table(rewards, [[1] + [2] * (len(own) - 1) for own in rewards], ratings))
    assert [point["comparisons"] for point in curve] == [7, 7, 6, 6, 6]
    for point in curve:
        picked, best = [], []
        for own_rewards, own_ratings in zip(rewards, ratings):
            if len(own_rewards) >= point["n"]:
                subsets = list(itertools.combinations(range(len(own_rewards)), point["n"]))
                top = [[place for place in subset if own_rewards[place] == max(own_rewards[other] for other in subset)] for subset in subsets]
                # equal rewards: each is worth the mean of all with this reward
                worth = lambda place: np.mean([own_ratings[other] for other in range(len(own_rewards)) if own_rewards[other] == own_rewards[place]])
                picked.append(np.mean([worth(places[0]) for places in top]))
                best.append(np.mean([max(own_ratings[place] for place in subset) for subset in subsets]))
        assert point["picked"] == pytest.approx(np.mean(picked)) and point["best"] == pytest.approx(np.mean(best))
    assert curve[0]["picked"] == pytest.approx(curve[0]["mean"]) == pytest.approx(curve[0]["best"])
    assert best_of_n(table([[1.0, 2.0]], [[1, 2]])) == []


# ----- a model on comparisons

ROWS = [Comparison(f"question {row % 40}", (f"answer {'x' * (row % 7)}", f"reply {'y' * (row % 5)} {row}"), (1, 2) if row % 3 else (2, 1), source="one" if row % 2 else "two")
        for row in range(120)]


def test_the_prompt_is_left_out():
    found = evaluate(Said(lambda prompt, response: float(len(prompt) > 0 and response.startswith("answer"))), ROWS)
    assert found.report["accuracy"] == pytest.approx(2 / 3) and found.report["baselines"]["prompt-blind"]["value"] == 0.5
    messages = Comparison([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], ([{"role": "assistant", "content": "a"}],) * 2, (1, 2))
    assert without_prompt(messages).prompt == [{"role": "user", "content": ""}] and without_prompt(messages).responses == messages.responses
    ids = to_comparison({"chosen_ids": [3, 4, 5], "rejected_ids": [3, 4]})
    assert without_prompt(ids).prompt == [] and without_prompt(ids).responses == ([5], [4])


def test_sources_apart():
    found = evaluate(Said(lambda prompt, response: float(len(response))), ROWS)
    for source in ("one", "two"):
        alone = evaluate(Said(lambda prompt, response: float(len(response))), [row for row in ROWS if row.source == source]).report
        assert found.report["sources"][source] == {name: value for name, value in alone.items() if name != "sources"}
    ties = [*ROWS, Comparison("p", ("a", "b"), (1, 1), source="ties")]
    assert evaluate(Said(lambda prompt, response: 1.0), ties).report["sources"]["ties"] == {"comparisons": 1, "pairs": 0}


def test_mistakes_are_the_most_confident_ones():
    found = evaluate(Said(lambda prompt, response: float(len(response))), ROWS)
    mistakes, margins = found.mistakes(5), np.sort(found.pairs["margin"])
    assert [mistake["margin"] for mistake in mistakes] == margins[:5].tolist() and margins[0] < 0
    for mistake in mistakes:
        comparison = ROWS[mistake["comparison"] - 1]
        assert mistake["prompt"] == comparison.prompt and mistake["source"] == comparison.source
        assert mistake["chosen"]["text"] == comparison.responses[comparison.ranks.index(1)] and mistake["chosen"]["reward"] < mistake["rejected"]["reward"]
        assert mistake["probability"] == pytest.approx(1 / (1 + math.exp(mistake["margin"])))
    assert len(found.mistakes(1000)) == (margins < 0).sum() # all of them where there are fewer


def test_two_models_on_the_same_pairs():
    one = evaluate(Said(lambda prompt, response: float(response.startswith("answer"))), ROWS)
    other = evaluate(Said(lambda prompt, response: float(len(response))), ROWS)
    found = compare({"one": one, "other": other, "again": one})
    right = {name: np.sign(evaluation.pairs["margin"].to_numpy()) for name, evaluation in (("one", one), ("other", other))}
    first = next(pair for pair in found["pairs"] if (pair["first"], pair["second"]) == ("one", "other"))
    more, less = (int((right[one] > right[other]).sum()) for one, other in (("one", "other"), ("other", "one")))
    assert (first["only_first"], first["only_second"]) == (more, less)
    tail = sum(math.comb(more + less, k) for k in range(0, min(more, less) + 1)) / 2 ** (more + less)
    assert first["p_value"] == pytest.approx(min(1, 2 * tail))
    assert first["difference"]["value"] == pytest.approx(one.report["accuracy"] - other.report["accuracy"])
    assert first["difference"]["low"] < first["difference"]["value"] < first["difference"]["high"]
    same = next(pair for pair in found["pairs"] if (pair["first"], pair["second"]) == ("one", "again"))
    assert same["p_value"] == 1 and same["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and found["agreement"]["one"]["again"] == 1
    assert found["agreement"]["one"]["other"] == pytest.approx((right["one"] == right["other"]).mean())
    with pytest.raises(ValueError, match="evaluated on different comparisons"):
        compare({"one": one, "less": evaluate(Said(lambda prompt, response: 1.0), ROWS[:10])})


# ----- a real model

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), word_tokenizer()
    RewardModel(save_language_model("llama", folder / "base"), 0.0, "cpu").save_pretrained(folder / "reward", tokenizer)
    return str(folder / "reward")


def text(length, seed):
    return " " + " ".join(random.Random(seed).choices([f"w{place}" for place in range(3, 64)], k=length))


def rows(count=40):
    return [{"prompt": text(4, row // 2), "responses": [text(1 + (row + 3 * k) % 7, 100 * row + k) for k in range(3)], "scores": [(row * k) % 5 for k in range(1, 4)],
             "source": "ab"[row % 2]} for row in range(count)]


def test_training_and_evaluation_agree(model, tmp_path):
    reward_model = RewardModel.from_pretrained(model, 0.0, "cpu")
    config = RewardConfig(str(tmp_path), per_device_eval_batch_size=7, report_to="none", use_cpu=True, disable_tqdm=True)
    data = [row for row in rows() if len(set(row["scores"])) > 1]
    trainer = RewardTrainer(reward_model, config, None, Dataset.from_list(data), word_tokenizer())
    metrics, report = trainer.evaluate(), evaluate(Scorer(reward_model, word_tokenizer()), map(to_comparison, data)).report
    for name in ("pairs", "tied_rewards", "accuracy", "margin", "margin_q25", "margin_median", "margin_q75", "chosen_reward", "rejected_reward"):
        assert report[name] == pytest.approx(metrics[f"eval_{name}"], abs=1e-5), name


def test_batches_change_nothing(model):
    comparisons = list(map(to_comparison, rows()))
    reports = [evaluate(Scorer.from_pretrained(model, device="cpu", tokens_per_batch=size), comparisons).report for size in (20, 5000)]
    flat = [{name: value for name, value in report.items() if isinstance(value, (int, float))} for report in reports]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5) and reports[0]["accuracy_interval"] == pytest.approx(reports[1]["accuracy_interval"], abs=1e-9)


def test_rows_that_are_left_out(model, caplog):
    scorer = Scorer.from_pretrained(model, device="cpu")
    bad = [*rows(2), {"prompt": "w3"}, {"prompt": text(50, 0), "chosen": text(30, 1), "rejected": "w4"}]
    with pytest.raises(ValueError, match="Row 3 of the data cannot be used.*on_bad_row='skip'"):
        usable(bad, scorer)
    comparisons, left_out = usable(bad, scorer, "skip", "rows.jsonl")
    assert len(comparisons) == 2 and left_out["rows"] == 2 and "Row 3 of rows.jsonl" in left_out["first"]
    with pytest.raises(ValueError, match="No comparison of the data is left"):
        usable(bad[2:], scorer, "skip")
    assert usable(rows(2), scorer)[1] is None
    cutting = Scorer.from_pretrained(model, device="cpu", max_length=10, on_overlong="truncate_prompt")
    with caplog.at_level("WARNING"):
        usable(rows(30), cutting)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("rlhf_reward")]
    assert len(told) == 1 and "Cut the prompt of" in told[0] # told once, not for each row


def test_the_command_with_two_models_and_two_processes(model, tmp_path, capfd):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(30 if name == "one" else 20)))
    RewardModel(model, 0.0, "cpu").save_pretrained(tmp_path / "other", word_tokenizer())
    arguments = ["-m", "rlhf_reward", "evaluate", "--model", f"{model},{tmp_path / 'other'}", "--device", "cpu", "--tokens_per_batch", "50",
                 "--data", f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}", "--output"]
    alone = {**__import__("os").environ, "OMP_NUM_THREADS": "1"}
    one = subprocess.run([sys.executable, *arguments, str(tmp_path / "alone")], capture_output=True, text=True, env=alone)
    assert one.returncode == 0 and "longer wins" in one.stdout and "without the prompt" in one.stdout, one.stdout + one.stderr
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments, str(tmp_path / "together")],
                         capture_output=True, text=True, env=alone, timeout=200)
    assert two.returncode == 0, two.stdout + two.stderr
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    report = json.loads((tmp_path / "alone/report.json").read_text())["data"][str(tmp_path / "one.jsonl")]
    assert set(report["models"]) == {model, str(tmp_path / "other")} and report["compared"]["pairs"][0]["first"] == model
    assert set(report["models"][model]["sources"]) == {"a", "b"} and report["models"][model]["best_of_n"][2]["n"] == 3
