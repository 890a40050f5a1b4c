"""
Published tables, computed again from the published judgments of each model.

The judgments are in the repositories of the benchmarks. Clone them and name the folders:
`JUDGEBENCH=JudgeBench LLMBAR=LLMBar pytest tests/test_published.py`
(github.com/ScalerLab/JudgeBench, github.com/princeton-nlp/LLMBar).
"""
import json
import os
from pathlib import Path

import pytest

from rlhf_reward.benchmarks import evaluate_benchmark, load_benchmark
from rlhf_reward.evaluation import Rule


def folder(variable):
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a clone of the benchmark's repository")
    return Path(os.environ[variable])


def as_text(text):
    return text if isinstance(text, str) else "".join(message["content"] for message in text)


def evaluated(name, rows, rewards, tmp_path):
    "Evaluate rewards by (prompt, response) on the rows of a benchmark. Without the prompt all rewards are 0."
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rule = Rule(lambda prompt, response: rewards.get((as_text(prompt), as_text(response)), 0.0))
    return evaluate_benchmark(rule, name, str(path)).report["benchmark"]


# From Tan et al. 2024, arXiv 2410.12784: knowledge, reasoning, math, coding, overall, in percent
JUDGEBENCH = {
    "Ray2333_GRM-Gemma-2B-rewardmodel-ft": (62.99, 53.06, 64.29, 54.76, 59.43),
    "Skywork_Skywork-Reward-Gemma-2-27B": (59.74, 66.33, 83.93, 50.00, 64.29),
    "Skywork_Skywork-Reward-Llama-3.1-8B": (59.09, 64.29, 76.79, 50.00, 62.29),
    "internlm_internlm2-20b-reward": (62.34, 69.39, 66.07, 50.00, 63.43),
    "internlm_internlm2-7b-reward": (56.49, 61.22, 71.43, 50.00, 59.43),
}


@pytest.mark.parametrize("model", JUDGEBENCH)
def test_reward_models_on_judgebench(model, tmp_path):
    judge = f"judge_name=reward_model,judge_model={model}.jsonl"
    path = folder("JUDGEBENCH") / "outputs" / f"dataset=judgebench,response_model=gpt-4o-2024-05-13,{judge}"
    rows = []
    rewards = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores = row.pop("judgments")[0]["judgment"]["scores"]
        for response, score in zip(("response_A", "response_B"), scores):
            rewards[row["question"], row[response]] = score
        rows.append(row)
    found = evaluated("judgebench", rows, rewards, tmp_path)
    names = ("knowledge", "reasoning", "math", "coding", "score")
    assert tuple(round(100 * found[name], 2) for name in names) == JUDGEBENCH[model]


SUBSETS = ("Natural", "Adversarial/Neighbor", "Adversarial/GPTInst", "Adversarial/GPTOut", "Adversarial/Manual")


@pytest.mark.parametrize("subset", SUBSETS)
def test_judges_on_llmbar(subset, tmp_path):
    "The published accuracy of each of 65 judges; one that names no winner is wrong."
    path = folder("LLMBAR") / "Dataset/LLMBar" / subset
    rows = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    results = sorted(path.glob("evaluators/*/*/result.json"))
    assert len(results) == 65
    for result in results:
        rewards = {}
        for judged in json.loads(result.read_text(encoding="utf-8")):
            winner = str(judged["results"][-1]["swap = False"]["winner"])
            if winner not in ("1", "2"):
                winner = "2" if str(judged["label"]) == "1" else "1"
            for number in ("1", "2"):
                rewards[judged["input"], judged[f"output_{number}"]] = float(number == winner)
        published = json.loads(result.with_name("statistics.json").read_text(encoding="utf-8"))["correct_False"]
        right, total = published.split("=")[0].split("/")
        found = evaluated("llmbar", rows, rewards, tmp_path)["score"]
        assert found == pytest.approx(int(right) / int(total), abs=1e-9), result.parent


@pytest.mark.parametrize("name, variable, count", [("judgebench", "JUDGEBENCH", 350), ("llmbar", "LLMBAR", 419)])
def test_a_clone_is_a_local_copy(name, variable, count):
    "With all rows that the papers count, and each part."
    loaded = load_benchmark(name, str(folder(variable)))
    assert len(loaded) == count
    sources = {item.comparison.source for item in loaded}
    expected = set(SUBSETS) if name == "llmbar" else {"knowledge", "reasoning", "math", "coding"}
    assert sources == expected
