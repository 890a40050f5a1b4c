"Several models on the same prompts: places, adjusted p-values, and what the report says of them."

import json

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from rlhf_reward.benchmarks import evaluate_benchmark
from rlhf_reward.data import Comparison
from rlhf_reward.evaluation import Rule, compare, evaluate
from rlhf_reward.intervals import Interval
from rlhf_reward.model_ranking import PairedDifference, holm, rank_models, ranking_lines, ranking_note
from rlhf_reward.report import report_html, report_json, report_markdown


def test_holm():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 3 · 0.01, 2 · 0.03, then 0.04 is not below
    assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []
    p_values = np.random.default_rng(0).uniform(size=20) ** 3
    adjusted = np.array(holm(p_values.tolist()))
    assert (adjusted >= false_discovery_control(p_values) - 1e-12).all()  # Holm is the stricter one
    for index, p_value in enumerate(p_values):  # each against its definition
        smaller = [other for other in p_values if other <= p_value]
        steps = [(20 - rank) * value for rank, value in enumerate(sorted(smaller))]
        assert adjusted[index] == pytest.approx(min(1, max(steps)))


def test_equal_models_are_rarely_told_apart():
    "If no difference is real, any of six pairs is told apart with a chance of at most 5 %."
    drawn = np.random.default_rng(1).uniform(size=(4000, 6))
    wrong = np.mean([min(holm(list(p_values))) < 0.05 for p_values in drawn])
    assert wrong == pytest.approx(1 - (1 - 0.05 / 6) ** 6, abs=0.01)  # the smallest of six p-values is below 0.05 / 6


def difference(value, p_value):
    return PairedDifference(Interval(value=value, low=value - 0.02, high=value + 0.01), p_value)


def test_places():
    "b and c cannot be told apart, nor a and b; a and c can. d is worse than all."
    values = {"d": 0.5, "c": 0.7, "a": 0.74, "b": 0.72}
    differences = {
        ("a", "b"): difference(0.02, 0.2),
        ("c", "a"): difference(-0.04, 0.01),
        ("b", "c"): difference(0.02, 0.03),  # below 0.05, but not adjusted
        ("d", "a"): difference(-0.24, 0.0001),
        ("d", "b"): difference(-0.22, 0.0002),
        ("d", "c"): difference(-0.2, 0.0003),
    }
    ranking = rank_models("accuracy", values, differences)
    assert [(line["model"], line["best_place"], line["worst_place"]) for line in ranking["models"]] == [
        ("a", 1, 2),
        ("b", 1, 3),
        ("c", 2, 3),
        ("d", 4, 4),
    ]
    first, second, third, last = ranking["models"]
    assert second["within_noise"] == ["a", "c"] and last["within_noise"] == []
    assert (first["to_first"], first["p_value"]) == (None, None)
    assert third["to_first"] == {"value": -0.04, "low": -0.06, "high": -0.03}  # as it was computed
    assert second["to_first"] == {"value": -0.02, "low": -0.03, "high": pytest.approx(0)}  # the other way round
    assert third["p_value"] == pytest.approx(3 * 0.01) and last["p_value"] == pytest.approx(6 * 0.0001)
    assert ranking_lines(ranking)[2] == ["2–3", "c", "0.7000", "-0.0400 (-0.0600 to -0.0300)", "0.03", "b"]
    assert "over 6 pairs of models" in ranking_note(ranking) and "paired bootstrap" in ranking_note(ranking)


def noisy(seed, noise):
    "A rule that knows the right answer but for noise, which is that of the text."
    def reward(prompt, response):
        text = prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)
        text += response if isinstance(response, str) else response[-1]["content"]
        return ("right" in text) + noise * np.random.default_rng([seed, *text.encode()]).standard_normal()

    return Rule(reward)


MODELS = {"good": noisy(0, 0.3), "also good": noisy(1, 0.3), "bad": noisy(2, 3.0)}


def test_the_ranking_of_a_report(monkeypatch):
    monkeypatch.setattr("rlhf_reward.report.plots", lambda evaluation: {})  # slow, and no part of it
    rows = [Comparison(f"question {number}", ("right", "other"), (1, 2)) for number in range(60)]
    models = {name: evaluate(rule, rows) for name, rule in MODELS.items()}
    ranking = compare(models)["ranking"]
    assert ranking["figure"] == "accuracy over all pairs" and ranking["pairs"] == 3
    for line in ranking["models"]:
        assert line["value"] == pytest.approx(models[line["model"]].report["accuracy"])
    assert [(line["best_place"], line["worst_place"]) for line in ranking["models"]] == [(1, 2), (1, 2), (3, 3)]
    assert ranking["models"][2]["model"] == "bad" and ranking["models"][2]["p_value"] < 0.01
    found = report_json({"data": models})["data"]["data"]["compared"]["ranking"]
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(ranking))
    markdown, page = report_markdown({"data": models}), report_html({"data": models})
    for cell in ranking_lines(ranking)[1]:
        assert cell in page and f"| {cell} " in markdown
    assert "adjusted by Holm&#39;s method over 3 pairs of models" in page
    same = compare({"one": models["bad"], "two": models["bad"]})["ranking"]
    assert [line["within_noise"] for line in same["models"]] == [["two"], ["one"]]
    assert same["models"][1]["p_value"] == 1 and "over one pair of models" in ranking_note(same)


def test_the_ranking_on_a_benchmark_is_by_its_score(tmp_path):
    "Subsets of LLMBar count the same: the score is not the accuracy."
    rows = []
    for number in range(40):
        texts = {"input": f"question {number}", "output_1": "right", "output_2": "other", "label": 1}
        rows.append({**texts, "subset": "Natural" if number < 10 else "Manual"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {name: evaluate_benchmark(rule, "llmbar", str(path)) for name, rule in MODELS.items()}
    compared = compare(models)
    ranking = compared["ranking"]
    assert ranking["figure"] == "the score of the benchmark" and "jackknife" in ranking_note(ranking)
    for line in ranking["models"]:
        assert line["value"] == models[line["model"]].report["benchmark"]["score"]
    assert ranking["models"][2]["model"] == "bad"
    by_pair = [pair["score_difference"]["p_value"] for pair in compared["pairs"]]
    pairs = [{pair["first"], pair["second"]} for pair in compared["pairs"]]
    adjusted = holm(by_pair)[pairs.index({"bad", ranking["models"][0]["model"]})]
    assert ranking["models"][2]["p_value"] == pytest.approx(adjusted)
