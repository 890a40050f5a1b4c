"""
The rules of PPE, RMB, M-RewardBench, prior sets, IF-RewardBench, LLMBar's tree and JudgeBench's two means.

Rows are dummies of exactly the published schema; figures are computed by hand, or by the published arithmetic again.
"""
import itertools
import json
import random
from statistics import fmean

import pandas as pd
import pytest

from rlhf_reward.benchmark_files import read_parts
from rlhf_reward.benchmarks import BENCHMARKS, jackknife_groups, load_benchmark
from rlhf_reward.ppe import PPE_CORRECTNESS
from rlhf_reward.rewardbench_relatives import M_REWARDBENCH, M_REWARDBENCH_LANGUAGES


def stated_reward(prompt, response):
    "Return the reward that the text of the response has at its end: 'says 3.5'."
    return float(response[-1]["content"].split()[-1])


def write(path, rows, as_lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if as_lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def figures(name, path):
    "Return the figures of the rule alone, without all other statistics."
    lines = []
    for number, item in enumerate(load_benchmark(name, str(path))):
        comparison = item.comparison
        line = {"comparison": number, "key": item.key, "source": comparison.source}
        for rank, response in zip(comparison.ranks, comparison.responses):
            lines.append({**line, "rank": rank, "reward": stated_reward(comparison.prompt, response)})
    return BENCHMARKS[name].rule(pd.DataFrame(lines))


def vote(first, second, winner, **columns):
    return {
        "question_id": "q",
        "model_a": "m",
        "model_b": "n",
        "language": "English",
        "prompt": "q",
        "response_1": f"says {first}",
        "response_2": f"says {second}",
        "winner": winner,
        **columns,
    }


def test_ppe_preference(tmp_path):
    rows = [
        vote(1, 0, "model_a", hard_prompt=True, is_code=True),
        vote(1, 0, "model_b", hard_prompt=True, is_code=False),
        vote(0, 1, "model_b", hard_prompt=False, is_code=False),
        vote(1, 1, "model_b", hard_prompt=True, is_code=False),  # a tie of rewards is wrong
        vote(0, 5, "tie", hard_prompt=True, is_code=True),  # a tie of people is no pair
        vote(0, 5, "tie (bothbad)", hard_prompt=True, is_code=True),
    ]
    result = figures("ppe-preference", write(tmp_path / "rows.jsonl", rows, as_lines=True))
    assert (result["score"], result["Hard"], result["Coding"]) == (0.5, pytest.approx(1 / 3), 1)
    assert result["lower bound of 2 domains"] == result["Hard"] and "Math" not in result
    without = [vote(1, 0, "model_a")]
    assert not any("lower" in name for name in figures("ppe-preference", write(tmp_path / "a.json", without)))
    with pytest.raises(ValueError, match="Row 1 for ppe-preference cannot be used: its winner is 'model_c'; expected"):
        load_benchmark("ppe-preference", write(tmp_path / "b.json", [vote(1, 0, "model_c")]))


def checked(rewards, scores, pairs, **columns):
    texts = {f"response_{number}": f"says {reward}" for number, reward in enumerate(rewards, start=1)}
    scores = {"scores": scores, "sampled_conflict_pairs": pairs}
    return {"question_id": "q", "model_name": "m", "prompt": "q", **texts, **scores, **columns}


def curve_by_all_subsets(rewards, scores):
    "Return the expected correctness of the pick, and of the best, for each K, one subset at a time."
    picks, bests, losses = [], [], []
    for size in range(1, len(rewards) + 1):
        own = []
        for subset in itertools.combinations(range(len(rewards)), size):
            highest = max(rewards[index] for index in subset)
            picked = [scores[index] for index in subset if rewards[index] == highest]
            best = max(scores[index] for index in subset)
            own.append((fmean(picked), best, fmean((score - best) ** 2 for score in picked)))
        for values, curve in zip(zip(*own), (picks, bests, losses)):
            curve.append(fmean(values))
    return picks, losses


def test_ppe_correctness(tmp_path):
    "Every figure of two prompts with four responses each, with equal rewards among them, from all subsets."
    first = ([3.0, 2.0, 2.0, 1.0], [False, True, False, True], [[1, 0], [2, 1], [0, 3]])
    second = ([0.5, 4.0, 0.0, 2.5], [False, True, True, False], [[1, 0], [0, 2]])
    names = ["mmlu_pro_best_of_k", "PPE-MATH-Best-of-K", "gpqa_best_of_k", "mbpp_plus_best_of_k", "IFEval"]
    for name in names:
        folder = tmp_path / "ppe" / name
        write(folder / "data/train-00000-of-00001.json", [checked(*first), checked(*second)])
    perfect = [checked([1.0, 0.0], [1, 0], [[0, 1]])]
    write(tmp_path / "ppe" / "gpqa_best_of_k/data/train-00000-of-00001.json", perfect)
    result = figures("ppe-correctness", tmp_path / "ppe")
    math = result["MATH"]
    # right: none of the first row's three (the second of them is a tie), and the first of the second row's two
    assert math["accuracy"] == pytest.approx(1 / 5)
    picks, losses = zip(*(curve_by_all_subsets(rewards, scores) for rewards, scores, _ in (first, second)))
    curve = [fmean(point) for point in zip(*picks)]
    assert math["best of K"] == pytest.approx(max(curve)) and math["end"] == pytest.approx(curve[-1]) == 0.5
    assert math["loss"] == pytest.approx(fmean([fmean(point) for point in zip(*losses)]))
    right = [2.0, 1.0, 4.0, 0.0]
    wrong = [3.0, 2.0, 0.5, 2.5]
    wins = [(high > low) + 0.5 * (high == low) for high, low in itertools.product(right, wrong)]
    assert math["auc"] == pytest.approx(fmean(wins))
    assert result["GPQA"]["accuracy"] == result["GPQA"]["auc"] == result["GPQA"]["best of K"] == 1
    assert result["GPQA"]["loss"] == 0
    assert result["score"] == pytest.approx((4 / 5 + 1) / 5)
    assert result["lower bound of 5 domains"] == pytest.approx(1 / 5)
    assert result["mean"]["end"] == pytest.approx((4 * 0.5 + 1) / 5)
    whole = [{**checked([1.0, 0.0], [1, 0], [[1, 0]]), "benchmark": name} for name in PPE_CORRECTNESS]
    assert figures("ppe-correctness", write(tmp_path / "one.jsonl", whole, as_lines=True))["score"] == 1
    with pytest.raises(ValueError, match="for ppe-correctness have no GPQA, IFEval, MBPP-Plus, MMLU-Pro; expected"):
        load_benchmark("ppe-correctness", write(tmp_path / "two.jsonl", [whole[1]], as_lines=True))
    with pytest.raises(ValueError, match="has none of MMLU-Pro, MATH, .*; expected a file or folder for each"):
        load_benchmark("ppe-correctness", str(tmp_path / "ppe/IFEval/data"))


@pytest.mark.parametrize(
    "scores, pairs, message",
    [
        ([1, 0], [[0, 1]], "it has 3 responses and 2 scores"),
        ([1, 0, 0], [[1, 2]], "its pair 1, 2 has equal scores"),
    ],
)
def test_ppe_correctness_with_other_rows(scores, pairs, message, tmp_path):
    rows = [checked([1.0, 0.0, 0.0], scores, pairs, benchmark="MATH")]
    with pytest.raises(ValueError, match=f"Row 1 for ppe-correctness cannot be used: {message}"):
        load_benchmark("ppe-correctness", write(tmp_path / "rows.json", rows))


def rmb_rows(category, *rewards):
    prompt = [{"role": "user", "content": "q", "language": "English"}, {"role": "assistant", "content": "a"}]
    row = {"conversation_input": [*prompt, prompt[0]], "category_path": category}
    best, *others = [{"llm_name": "m", "answer": f"says {reward}"} for reward in rewards]
    if category.startswith("BoN"):
        return {**row, "bon_best": best, "loser_list": others, "bon_uid": "1"}
    return {**row, "chosen": best, "reject": others[0], "pair_uid": "2"}


def test_rmb(tmp_path):
    tree = {
        "BoN_set/Helpfulness/Chat/Discussion": [(3, 1, 2), (3, 3, 1), (1, 0, 2, 0)],  # right, a tie, wrong
        "BoN_set/Harmlessness/S1": [(1, 0, 0)],
        "Pairwise_set/Helpfulness/Code/Data Management": [(1, 0), (1, 0), (0, 1)],
        "Pairwise_set/Helpfulness/Chat/Discussion": [(1, 1)],
        "Pairwise_set/Harmlessness/S1": [(0, 1)],
    }
    for category, rewards in tree.items():
        path = tmp_path / "clone/RMB_dataset" / f"{category}.json"
        write(path, [rmb_rows(category, *own) for own in rewards])
    result = figures("rmb", tmp_path / "clone")
    assert result["Helpfulness, best of n"] == pytest.approx(1 / 3)
    assert result["Harmlessness, best of n"] == 1
    assert result["Helpfulness, pairs"] == 0.5  # every pair counts the same, whatever its category
    assert result["Harmlessness, pairs"] == 0
    assert result["score"] == pytest.approx((1 / 3 + 1 + 0.5 + 0) / 4)
    assert figures("rmb", tmp_path / "clone/RMB_dataset")["score"] == result["score"]
    with pytest.raises(ValueError, match="has no rows on the hub; expected a local copy"):
        load_benchmark("rmb")
    pairs = [rmb_rows("Pairwise_set/Harmlessness/S1", 1, 0)]
    with pytest.raises(ValueError, match="The rows for rmb have no Helpfulness, best of n; no Helpfulness, pairs; no"):
        load_benchmark("rmb", write(tmp_path / "rows.json", pairs))
    with pytest.raises(ValueError, match="Row 1 for rmb cannot be used: it has no chosen and no reject; expected both"):
        wrong = {**rmb_rows("BoN_set/Harmlessness/S1", 1, 0), "category_path": "Pairwise_set/Harmlessness/S1"}
        load_benchmark("rmb", write(tmp_path / "rows.json", [wrong]))
    with pytest.raises(ValueError, match="'.*Pairwise_set' has 0 folders 'Pairwise_set'; expected one"):
        load_benchmark("rmb", str(tmp_path / "clone/RMB_dataset/Pairwise_set"))


def test_m_rewardbench(tmp_path):
    "The arithmetic of its code again, on random rewards."
    drawn = random.Random(0)
    shares = {}
    rows = []
    for language in M_REWARDBENCH_LANGUAGES:
        for subset in itertools.chain.from_iterable(M_REWARDBENCH.values()):
            right = [drawn.random() < 0.6 for _ in range(2)]
            shares[language, subset] = fmean(right)
            for number, is_right in enumerate(right):
                texts = {"prompt": "q", "chosen": f"says {int(is_right)}", "rejected": "says 0"}  # wrong is a tie
                rows.append({"id": number, **texts, "source": subset, "category": "", "language": language})
    path = write(tmp_path / "rows.json", rows)
    scores = {}
    for language in M_REWARDBENCH_LANGUAGES:
        sections = []
        for weights in M_REWARDBENCH.values():
            total = sum(shares[language, subset] * weight for subset, weight in weights.items())
            sections.append(total / sum(weights.values()))
        scores[language] = fmean(sections)
    result = figures("m-rewardbench", path)
    assert {language: result[language] for language in scores} == pytest.approx(scores)
    assert result["score"] == pytest.approx(fmean(scores.values()))
    loaded = load_benchmark("m-rewardbench", path)
    units = {BENCHMARKS["m-rewardbench"].unit(item.comparison, item.key) for item in loaded}
    assert len(units) == 23 * 2 and len(loaded) == 23 * 2 * 23  # a prompt is one, whatever its language
    with pytest.raises(ValueError, match="have no arb_Arab, ces_Latn, .*, zho_Hans; expected each part"):
        load_benchmark("m-rewardbench", write(tmp_path / "m/zho_Hant.json", rows[-46:]))
    missing = [row for row in rows if (row["language"], row["source"]) != ("vie_Latn", "hep-go")]
    with pytest.raises(ValueError, match="differ in vie_Latn by hep-go; expected its 23 subsets"):
        load_benchmark("m-rewardbench", write(tmp_path / "missing.json", missing))


def test_prior_sets(tmp_path):
    "The four of its mean count the same, whatever their sizes; a tie is wrong."
    rewards = {
        "anthropic_helpful": [(1, 0)],
        "anthropic_hhh": [(1, 0), (0, 1), (1, 1), (0, 1)],
        "shp": [(1, 0), (0, 1)],
        "summarize": [(0, 1)],
        "anthropic_harmless": [(0, 1)],
        "mtbench_gpt4": [(1, 0)],
        "pku_safer": [(1, 0)],  # no longer part of it
    }
    turns = [{"content": "q", "role": "human"}, {"content": "a", "role": "gpt"}, {"content": "r", "role": "human"}]
    for name, pairs in rewards.items():
        rows = []
        for chosen, rejected in pairs:
            texts = {"chosen": f"says {chosen}", "rejected": f"says {rejected}"}
            rows.append({"prompt": turns if "anthropic" in name else "q", **texts, "subset": "subsubset"})
        write(tmp_path / "data" / f"{name}-00000-of-00001.json", rows)
    result = figures("rewardbench-prior-sets", tmp_path)
    assert result["score"] == pytest.approx((1 + 0.25 + 0.5 + 0) / 4)
    assert (result["anthropic_harmless"], result["mtbench_gpt4"]) == (0, 1) and "pku_safer" not in result
    prompt = load_benchmark("rewardbench-prior-sets", str(tmp_path))[0].comparison.prompt
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]
    (tmp_path / "data/shp-00000-of-00001.json").unlink()
    with pytest.raises(ValueError, match="The rows for rewardbench-prior-sets have no shp; expected anthropic_helpful"):
        load_benchmark("rewardbench-prior-sets", str(tmp_path))


def graph(number, kind, rewards, edges):
    preferences = []
    for chosen, rejected in edges:
        preferences.append({"chosen": {"response_id": chosen}, "rejected": {"response_id": rejected}})
    system = [{"role": "system", "content": "s"}] if kind == "System_Prompt" else []
    return {
        "id": number,
        "response_generation_model": "m",
        "instruction_type": kind,
        "messages": [*system, {"role": "user", "content": f"q{number}"}],
        "checklist": ["c"],
        "constraint_type": [["t"]],
        "responses": [{"response": f"says {reward}", "judgements": [1]} for reward in rewards],
        "preference_graph": preferences,
    }


def test_if_rewardbench(tmp_path):
    rows = [
        graph(0, "Single_Turn", (3, 2, 2, 1), [(0, 1), (1, 2), (3, 0), (0, 3)]),  # right, tie, wrong, right
        graph(1, "Single_Turn", (1, 0), [(0, 1)]),
        graph(2, "Multi_Turn", (1, 0), [(1, 0)]),
        graph(3, "System_Prompt", (1, 1), [(0, 1)]),
    ]
    write(tmp_path / "clone/data/if_rewardbench.json", rows)
    result = figures("if-rewardbench", tmp_path / "clone")
    assert result["Single_Turn"]["accuracy"] == pytest.approx((2 / 4 + 1) / 2)
    assert result["Single_Turn"]["kendall tau"] == pytest.approx(((2 - 1) / (3 * 4) ** 0.5 + 1) / 2)
    assert result["Multi_Turn"] == {"accuracy": 0, "kendall tau": -1}
    assert result["System_Prompt"] == {"accuracy": 0, "kendall tau": 0}
    assert result["score"] == pytest.approx(0.75 / 3)  # types count the same
    assert result["kendall tau"] == pytest.approx((result["Single_Turn"]["kendall tau"] - 1) / 3)
    with pytest.raises(ValueError, match="its graph prefers response 0 to 2; it has 0 to 1"):
        path = write(tmp_path / "rows.json", [graph(0, "Single_Turn", (1, 0), [(0, 2)])])
        load_benchmark("if-rewardbench", path)


def test_llmbar_as_a_tree(tmp_path):
    subsets = ("Natural", "Adversarial/Neighbor", "Adversarial/GPTInst", "Adversarial/GPTOut", "Adversarial/Manual")
    for number, subset in enumerate(subsets):
        row = {"input": "q", "output_1": "says 1", "output_2": "says 0", "label": 1 + (number == 2)}
        write(tmp_path / "clone/Dataset/LLMBar" / subset / "dataset.json", [row])
        write(tmp_path / "clone/Dataset/LLMBar" / subset / "evaluators/a/result.json", [{"results": []}])
    write(tmp_path / "clone/Dataset/CaseStudy/Negation/dataset.json", [row])  # another benchmark
    for folder in ("clone", "clone/Dataset", "clone/Dataset/LLMBar"):
        result = figures("llmbar", tmp_path / folder)
        assert (result["score"], result["Adversarial/GPTInst"], result["Natural"]) == (0.8, 0, 1)
    broken = {**row, "label": 3}
    write(tmp_path / "clone/Dataset/LLMBar/Natural/dataset.json", [broken])
    with pytest.raises(ValueError, match=r"Row 5 \(Natural/dataset.json\) for llmbar cannot be used: its label is"):
        load_benchmark("llmbar", str(tmp_path / "clone"))
    (tmp_path / "clone/Dataset/LLMBar/Adversarial/Manual").rename(tmp_path / "Manual")
    with pytest.raises(ValueError, match="LLMBar' has no Adversarial/Manual; expected all of Natural, Adversarial/N"):
        load_benchmark("llmbar", str(tmp_path / "clone"))


def test_the_interval_leaves_out_a_prompt_in_all_languages():
    benchmark = BENCHMARKS["m-rewardbench"]
    sources, units = [], []
    for language, number in itertools.product(("deu_Latn", "fra_Latn"), range(40)):
        texts = {"prompt": f"q {language}", "chosen": "a", "rejected": "b"}
        [(comparison, key)] = benchmark.read({"id": number, **texts, "source": "hep-go", "language": language})
        sources.append(comparison.source)
        units.append(benchmark.unit(comparison, key))
    groups = jackknife_groups(pd.Series(sources), pd.Series(units)).tolist()
    assert groups[:40] == groups[40:] and sorted(groups[:40]) == sorted(2 * list(range(20)))


def test_two_means_of_judgebench(tmp_path):
    rows = []
    for source, is_right in (("mmlu-pro-law", 1), ("mmlu-pro-math", 1), ("livebench-math", 0), ("livecodebench", 1)):
        responses = {"response_A": f"says {is_right}", "response_B": "says 0.5"}
        rows.append({"question": "q", **responses, "label": "A>B", "source": source})
    result = figures("judgebench", write(tmp_path / "rows.json", rows))
    assert result["score"] == result["mean over pairs"] == 0.75
    assert result["mean over 3 categories"] == pytest.approx(2 / 3)


def test_every_rule_says_where_it_is_from():
    own = {"hh-rlhf", "ultrafeedback", "helpsteer2"}  # data for training: a share of pairs, without published code
    for name, benchmark in BENCHMARKS.items():
        assert (benchmark.source is None) == (name in own)
        if benchmark.source and not name.startswith("ppe"):
            assert benchmark.source.commit and all(len(blob) == 40 for blob in benchmark.source.files.values())
    assert "the code of github.com/lmarena/PPE was not at hand" in str(BENCHMARKS["ppe-correctness"].source)


def test_parts_on_the_hub(monkeypatch):
    "Each part is asked for with its own arguments."
    asked = []

    def load_rows(name, split, form, config=None):
        asked.append((name, split, config))
        return [{"prompt": "q"}]

    monkeypatch.setattr("rlhf_reward.benchmark_files.load_rows", load_rows)
    for name in ("ppe-correctness", "m-rewardbench", "rewardbench-prior-sets"):
        benchmark = BENCHMARKS[name]
        assert benchmark.rows.func is read_parts
        rows = benchmark.rows(benchmark.hub, benchmark.split, None)
        assert {row[benchmark.rows.keywords["column"]] for row in rows} == set(benchmark.rows.keywords["parts"])
    assert ("lmarena-ai/PPE-MBPP-Plus-Best-of-K", "train", None) in asked
    assert ("CohereLabsCommunity/multilingual-reward-bench", "test", "deu_Latn") in asked
    assert ("allenai/preference-test-sets", "anthropic_hhh", None) in asked and len(asked) == 5 + 23 + 7
