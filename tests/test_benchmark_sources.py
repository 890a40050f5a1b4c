"""
Whether each rule is still the published one, wherever its code is at hand.

The newest release of RewardBench is the installed package `rewardbench`; the code of all benchmarks is in clones, in
folders that variables name: `REWARDBENCH=reward-bench RMB=RMB-Reward-Model-Benchmark M_REWARDBENCH=m-rewardbench
RM_BENCH=RM-Bench IF_REWARDBENCH=IF-RewardBench JUDGEBENCH=JudgeBench LLMBAR=LLMBar pytest
tests/test_benchmark_sources.py`. Published functions are read from their files and run on random rewards.
"""
import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlhf_reward.benchmark_sources import RULE_SOURCES
from rlhf_reward.benchmarks import BENCHMARKS, REWARDBENCH
from rlhf_reward.rewardbench_relatives import M_REWARDBENCH, OTHER_PRIOR_SETS, PRIOR_SETS

VARIABLES = {
    "allenai/reward-bench": "REWARDBENCH",
    "Cohere-Labs-Community/m-rewardbench": "M_REWARDBENCH",
    "THU-KEG/RM-Bench": "RM_BENCH",
    "Zhou-Zoey/RMB-Reward-Model-Benchmark": "RMB",
    "thu-coai/IF-RewardBench": "IF_REWARDBENCH",
    "ScalerLab/JudgeBench": "JUDGEBENCH",
    "princeton-nlp/LLMBar": "LLMBAR",
}
WITH_CODE = [name for name, source in RULE_SOURCES.items() if source.files]


def clone(name):
    "The folder with the code of a benchmark: a clone, or for RewardBench the installed package."
    variable = VARIABLES[RULE_SOURCES[name].repository]
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a clone of {RULE_SOURCES[name].repository}")
    return Path(os.environ[variable])


def git_hash(path):
    "The hash that git gives to the content of a file."
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def published(path, *names):
    "Functions and constants of a file, without running the rest of it."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = []
    for node in tree.body:
        targets = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if getattr(node, "name", None) in names or set(targets) & set(names):
            nodes.append(node)
    namespace = {"np": np, "math": math, "defaultdict": defaultdict, "reduce": functools.reduce}
    code = "from __future__ import annotations\nfrom typing import *\n"
    exec(code + "\n".join(map(ast.unparse, nodes)), namespace)
    return [namespace[name] for name in names]


def table_of(pairs):
    "One line for each response of (source, key, chosen, rejected)."
    lines = []
    for number, (source, key, *rewards) in enumerate(pairs):
        for rank, reward in enumerate(rewards, start=1):
            line = {"comparison": number, "key": key, "source": source}
            lines.append({**line, "rank": rank, "reward": reward})
    return pd.DataFrame(lines)


def draw(seed, count):
    "Pairs of rewards, a quarter of them equal."
    drawn = random.Random(seed)
    return [(drawn.randrange(4), drawn.randrange(4)) for _ in range(count)]


@pytest.mark.parametrize("name", WITH_CODE)
def test_files_of_the_rule_are_those_that_were_read(name):
    folder = clone(name)
    for file, expected in RULE_SOURCES[name].files.items():
        assert git_hash(folder / file) == expected, f"{file} has changed since {RULE_SOURCES[name].version}"


def newest_rewardbench():
    "Folder and version of the newest RewardBench at hand: the installed package, or a clone."
    result = importlib.util.find_spec("rewardbench")
    if result:
        return Path(result.origin).parent, importlib.metadata.version("rewardbench")
    if "REWARDBENCH" not in os.environ:
        pytest.skip("the package rewardbench is not installed, and REWARDBENCH names no clone")
    folder = Path(os.environ["REWARDBENCH"])
    lines = (folder / "pyproject.toml").read_text().splitlines()
    [version] = [line.split('"')[1] for line in lines if line.startswith("version = ")]
    return folder / "rewardbench", version


def test_rules_are_not_older_than_the_newest_rewardbench():
    "Its version is not above ours, and its sections and weights are ours."
    folder, version = newest_rewardbench()
    numbers = [tuple(map(int, text.split(".")[:3])) for text in (version, RULE_SOURCES["rewardbench"].version)]
    assert numbers[0] <= numbers[1], f"rewardbench {version} is newer than the rule here"
    counts, mapping = published(folder / "constants.py", "EXAMPLE_COUNTS", "SUBSET_MAPPING")
    assert REWARDBENCH == weights_of(counts, mapping)


def weights_of(counts, mapping):
    "Weights by section and subset, from the two constants of the published code."
    weights = {}
    for section, names in mapping.items():
        weights[section] = {name: counts[name] for name in names}
    return weights


def test_the_version_check_finds_an_older_rule(tmp_path, monkeypatch):
    "A release made for this test, with another weight or a higher version, is found."
    (tmp_path / "rewardbench").mkdir()
    counts = {}
    for weights in REWARDBENCH.values():
        counts |= weights
    mapping = {section: list(weights) for section, weights in REWARDBENCH.items()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("REWARDBENCH", str(tmp_path))
    for version, weight, is_found in (("0.1.5", 250, False), ("0.2.0", 250, True), ("0.1.5", 154, True)):
        (tmp_path / "pyproject.toml").write_text(f'version = "{version}"\n')
        changed = {**counts, "xstest-should-respond": weight}
        text = f"EXAMPLE_COUNTS = {changed}\nSUBSET_MAPPING = {mapping}\n"
        (tmp_path / "rewardbench/constants.py").write_text(text)
        if is_found:
            with pytest.raises(AssertionError):
                test_rules_are_not_older_than_the_newest_rewardbench()
        else:
            test_rules_are_not_older_than_the_newest_rewardbench()


def test_rewardbench_by_its_code():
    folder, _ = newest_rewardbench()
    names = ("EXAMPLE_COUNTS", "SUBSET_MAPPING")
    counts, mapping = published(folder / "constants.py", *names)
    [by_section] = published(folder / "utils.py", "calculate_scores_per_section")
    pairs = []
    for number, subset in enumerate(counts):
        pairs += [(subset, "", *rewards) for rewards in draw(number, 7)]
    results = defaultdict(list)
    for subset, _, chosen, rejected in pairs:
        results[subset].append(chosen > rejected)
    expected = by_section(counts, mapping, {subset: sum(right) / len(right) for subset, right in results.items()})
    result = BENCHMARKS["rewardbench"].rule(table_of(pairs))
    assert {section: result[section] for section in expected} == pytest.approx(expected)
    assert result["score"] == pytest.approx(np.mean(list(expected.values())))


class Rows(list):
    "A data set, as far as `process_single_model` needs one."
    column_names = ()

    def add_column(self, name, values):
        return self


def test_ties_by_its_code():
    "The newest rule of Ties, also where right answers tie exactly."
    folder, version = newest_rewardbench()
    if version < "0.1.5":
        pytest.skip(f"rewardbench {version} has an older rule for Ties")
    names = ("_compute_prompt_stats", "process_single_model")
    _, process = published(folder / "utils.py", *names)
    drawn = random.Random(1)
    rows, lines = Rows(), []
    for number in range(30):
        for kind, right, wrong in (("ref", 1, 3), ("tied", 2 + number % 4, 4)):
            scores = [drawn.randrange(3, 9) for _ in range(right)] + [drawn.randrange(6) for _ in range(wrong)]
            rows.append({"id": f"{kind}:{number}", "scores": scores, "num_correct": right})
            for rank, reward in zip([1] * right + [2] * wrong, scores):
                line = {"comparison": len(rows), "key": f"{kind}:{number}", "source": "Ties"}
                lines.append({**line, "rank": rank, "reward": reward})
    with np.errstate(divide="ignore", invalid="ignore"):
        _, expected = process(rows)
    others = [(subset, "1", 1, 0) for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")]
    table = table_of(others).assign(comparison=lambda table: table["comparison"] + 1000)
    result = BENCHMARKS["rewardbench2"].rule(pd.concat([table, pd.DataFrame(lines)], ignore_index=True))
    assert result["Ties"] == pytest.approx(expected)


def test_m_rewardbench_by_its_code(tmp_path):
    file = clone("m-rewardbench") / "analysis/plot_utils.py"
    counts, mapping, get_scores = published(file, "EXAMPLE_COUNTS", "SUBSET_MAPPING", "get_scores")
    assert M_REWARDBENCH == weights_of(counts, mapping)
    get_scores.__globals__.update(EXAMPLE_COUNTS=counts, SUBSET_MAPPING=mapping, json=json, logging=logging)
    pairs, expected = [], []
    for language in ("deu_Latn", "hin_Deva"):
        results = {}
        for number, subset in enumerate(itertools.chain(*mapping.values())):
            drawn = draw(f"{language} {number}", 6)
            pairs += [(language, f"{subset}/{index}", *rewards) for index, rewards in enumerate(drawn)]
            results[subset] = np.mean([chosen > rejected for chosen, rejected in drawn])
        (tmp_path / language).mkdir()
        whole = {"model": "m", "chat_template": None, "extra_results": results}
        (tmp_path / language / "m.json").write_text(json.dumps(whole))
        [scores] = get_scores(tmp_path / language)
        expected.append(scores["score"])
    result = BENCHMARKS["m-rewardbench"].rule(table_of(pairs))
    assert [result["deu_Latn"], result["hin_Deva"]] == pytest.approx(expected)
    assert result["score"] == pytest.approx(np.mean(expected)) # `get_leaderboard`, a mean of columns


def test_prior_sets_by_their_code():
    "The sets of the mean are read from the function, which needs tables of the hub; the mean is that of numpy."
    tree = ast.parse((clone("rewardbench-prior-sets") / "analysis/get_benchmark_results.py").read_text())
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    [names] = [ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "pref_columns"]
    assert any("np.nanmean(pref_data, axis=1)" == ast.unparse(node.value) for node in assigned)
    assert names == PRIOR_SETS
    pairs, shares = [], {}
    for number, name in enumerate([*names, *OTHER_PRIOR_SETS]):
        drawn = draw(number, 5 + number)
        pairs += [(name, "", *rewards) for rewards in drawn]
        shares[name] = np.mean([chosen > rejected for chosen, rejected in drawn])
    result = BENCHMARKS["rewardbench-prior-sets"].rule(table_of(pairs))
    assert result == pytest.approx({"score": np.nanmean([shares[name] for name in names]), **shares})


def test_rm_bench_by_its_code():
    [compute] = published(clone("rm-bench") / "scripts/utils.py", "compute_accuracy")
    [split] = published(clone("rm-bench") / "scripts/utils.py", "split_dataset_by_domain")
    compute.__globals__["split_dataset_by_domain"] = split
    rows, pairs = [], []
    for number, domain in enumerate(("chat", "math", "code", "safety-refuse", "safety-response", "safety-response")):
        scores = draw(number, 3)
        row = {"domain": domain, "score_chosen": [right for right, _ in scores]}
        rows.append({**row, "score_rejected": [wrong for _, wrong in scores]})
        for chosen, (right, _) in enumerate(scores):
            pairs += [(domain, f"{chosen},{style}", right, wrong) for style, (_, wrong) in enumerate(scores)]
    expected = compute(rows)
    result = BENCHMARKS["rm-bench"].rule(table_of(pairs))
    for level in ("hard", "normal", "easy"):
        assert result[level] == pytest.approx(expected[f"{level}_acc"])
    assert result["score"] == pytest.approx(expected["total_avg_acc"])


def test_if_rewardbench_by_its_code():
    file = clone("if-rewardbench") / "metrics/analysis_overall_assessment.py"
    preference, statistics = published(file, "get_pref_from_scores", "calculate_metric_stats")
    drawn = random.Random(2)
    pairs, by_type = [], defaultdict(list)
    for number in range(30):
        kind = ("Single_Turn", "Multi_Turn", "System_Prompt")[number % 3]
        rewards = [drawn.randrange(4) for _ in range(5)]
        edges = drawn.sample(list(itertools.permutations(range(5), 2)), 1 + number % 7)
        by_type[kind].append(statistics([preference(rewards, *edge) for edge in edges]))
        pairs += [(kind, str(number), rewards[a], rewards[b]) for a, b in edges]
    result = BENCHMARKS["if-rewardbench"].rule(table_of(pairs))
    for ours, theirs in (("accuracy", "Accuracy"), ("kendall tau", "Kendall Taub")):
        for kind, rows in by_type.items():
            assert result[kind][ours] == pytest.approx(np.mean([row[theirs] for row in rows]))
        means = [result[kind][ours] for kind in by_type]
        assert result["score" if ours == "accuracy" else ours] == pytest.approx(np.mean(means))


def test_judgebench_by_its_code():
    [compute] = published(clone("judgebench") / "utils/metrics.py", "compute_final_metrics")
    rows, pairs = [], []
    for number, (first, second) in enumerate(draw(3, 40)):
        label = ("A>B", "B>A")[number % 2]
        decision = "A>B" if first > second else "B>A"  # as in utils/judges.py
        rows.append({"label": label, "judgments": [{"decision": decision}]})
        rewards = (first, second) if label == "A>B" else (second, first)
        pairs.append(("math", label[0], *rewards))
    result = BENCHMARKS["judgebench"].rule(table_of(pairs))["mean over pairs"]
    assert result == pytest.approx(compute(rows, reverse_order=False) / 100)


def test_rmb_by_its_published_rewards():
    "Each pair of the file of ArmoRM is judged as its code judged it."
    [file] = (clone("rmb") / "eval/result").glob("*_result.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        pair = [(row["category_path"], "", row["chosen_reward"], row["reject_reward"])]
        assert BENCHMARKS["rmb"].rule(table_of(pair))["score"] == row["is_correct"]
    assert len(rows) > 10
