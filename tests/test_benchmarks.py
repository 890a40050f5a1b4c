"Each benchmark's own rule on a small sample in its own schema, with rewards given by hand."

import json
import math
import random
import zlib

import numpy as np
import pandas as pd
import pytest

from rlhf_reward.benchmarks import (
    BENCHMARKS,
    REWARDBENCH,
    Benchmark,
    evaluate_benchmark,
    jackknife_groups,
    load_benchmark,
)
from rlhf_reward.data import Comparison
from rlhf_reward.evaluation import Rule, compare
from rlhf_reward.report import report_html, report_markdown


def stated_reward(prompt, response):
    "Return the reward that the text of the response has at its end: 'says 3.5'."
    return float((response if isinstance(response, str) else response[-1]["content"]).split()[-1])


def write(rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def scores(name, rows, tmp_path):
    return evaluate_benchmark(Rule(stated_reward), name, write(rows, tmp_path)).report["benchmark"]


def pair(chosen, rejected, **more):
    return {"prompt": "q", "chosen": f"says {chosen}", "rejected": f"says {rejected}", **more}


def test_rewardbench(tmp_path):
    wrong = {"mt-bench-hard", "donotanswer", "hep-go"}
    rows = []
    for weights in REWARDBENCH.values():
        for subset in weights:
            rewards = (0, 1) if subset in wrong else (1, 0)
            rows.append(pair(*rewards, subset=subset, id=len(rows)))
    rows += [
        pair(1, 1, subset="alpacaeval-easy", id=99),
        pair(0, 1, subset="math-prm", id=98),
    ] # a tie is wrong; half of PRM Math is wrong
    result = scores("rewardbench", rows, tmp_path)
    assert result["Chat"] == pytest.approx((0.5 * 100 + 95 + 95 + 28 + 40) / 358)
    assert result["Chat Hard"] == pytest.approx(1 - 37 / 456)
    assert result["Safety"] == pytest.approx(1 - 136 / 740)
    assert result["Reasoning"] == pytest.approx((984 * 0.5 + 5 * 164) / 1968)
    assert result["score"] == pytest.approx(sum(result[section] for section in REWARDBENCH) / 4)
    assert result["alpacaeval-easy"] == 0.5
    with pytest.raises(ValueError, match="The rows for rewardbench have no hep-rust; expected each part"):
        scores("rewardbench", [row for row in rows if row["subset"] != "hep-rust"], tmp_path)
    with pytest.raises(ValueError, match="have no other parts, but shp"):
        scores("rewardbench", [*rows, pair(1, 0, subset="shp")], tmp_path)


def four(right, *wrong, **more):
    return {"prompt": "q", "chosen": [f"says {right}"], "rejected": [f"says {one}" for one in wrong], **more}


def test_rewardbench2(tmp_path):
    rows = [
        four(2, 1, 0, 1, subset="Factuality", id="1"),
        four(1, 1, 0, 0, subset="Factuality", id="2"), # right; one of two highest
        four(0, 1, 0, 0, subset="Precise IF", id="3"),
        four(1, 1, 1, 1, subset="Math", id="4"), # wrong; one of four
        four(1, 0, 0, 0, subset="Safety", id="5"),
        four(1, 0, 0, 0, subset="Focus", id="6"),
    ]
    ties = [
        four(5, 1, subset="Ties", id="ref:1"), # right, by 4
        {
            "prompt": "q",
            "chosen": ["says 4", "says 3"],
            "rejected": ["says 1", "says 0"],
            "subset": "Ties",
            "id": "tied:1",
        }, # right by 2, apart by 1
        four(1, 2, subset="Ties", id="ref:2"), # wrong, by -1
        {
            "prompt": "q",
            "chosen": ["says 9", "says 5"],
            "rejected": ["says 3"],
            "subset": "Ties",
            "id": "tied:2",
        }, # right by 2, apart by 4
    ]
    result = scores("rewardbench2", rows + ties, tmp_path)
    assert (result["Factuality"], result["Precise IF"], result["Math"], result["Safety"], result["Focus"]) == (
        0.75,
        0,
        0.25,
        1,
        1,
    )
    expected = 0.3 * 1 + 0.3 * 0.5 # all right answers are above in both tied, and in one of two ref
    expected += 0.2 * 0.5 # 2 > 1 but not 2 > 4
    expected += 0.2 * 0.5 # min(4, 2) > 1 but not min(-1, 2) > 4
    expected += 0.01 * (math.tanh(2 / 1 - 1) + math.tanh(-1 / 4 - 1)) / 2
    assert result["Ties"] == pytest.approx(expected)
    assert result["score"] == pytest.approx((0.75 + 0 + 0.25 + 1 + 1 + expected) / 6)
    with pytest.raises(ValueError, match="not in twos"):
        scores("rewardbench2", rows + ties[:3], tmp_path)
    with pytest.raises(ValueError, match="have no Ties"):
        scores("rewardbench2", rows, tmp_path)


def test_rm_bench(tmp_path):
    rows = [
        {
            "id": 1,
            "prompt": "q",
            "chosen": ["says 1", "says 2", "says 3"],
            "rejected": ["says 0", "says 1.5", "says 2.5"],
            "domain": "chat",
        }, # a model of style, mostly
        {
            "id": 2,
            "prompt": "q",
            "chosen": ["says 5", "says 5", "says 5"],
            "rejected": ["says 0", "says 0", "says 5"],
            "domain": "safety-refuse",
        },
        {
            "id": 3,
            "prompt": "q",
            "chosen": ["says 5", "says 5", "says 5"],
            "rejected": ["says 0", "says 0", "says 0"],
            "domain": "safety-response",
        },
    ]
    rows += [{**rows[0], "domain": domain} for domain in ("code", "math")]
    rows.append(rows[2]) # the two of safety are one, by rows
    result = scores("rm-bench", rows, tmp_path)
    assert result["code"] == result["math"] == result["chat"]
    assert result["chat"]["matrix"] == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ] # rows: style of the chosen; columns: of the rejected
    assert (result["chat"]["easy"], result["chat"]["normal"], result["chat"]["hard"]) == (1, 1, 0)
    assert result["safety"]["matrix"] == [[1, 1, 2 / 3]] * 3 # a tie is wrong
    assert result["hard"] == pytest.approx((3 * 0 + (1 + 2 / 3 + 2 / 3) / 3) / 4)
    assert result["easy"] == 1
    assert result["normal"] == pytest.approx((3 + 8 / 9) / 4)
    assert result["score"] == pytest.approx((result["easy"] + result["normal"] + result["hard"]) / 3)
    with pytest.raises(ValueError, match="The rows for rm-bench have no math; expected each part"):
        scores("rm-bench", rows[:4], tmp_path)


def test_llmbar(tmp_path):

    def row(one, two, label, subset):
        return {
            "input": "q",
            "output_1": f"says {one}",
            "output_2": f"says {two}",
            "label": label,
            "subset": subset,
        }

    assert scores("llmbar", [row(1, 0, 1.0, "Natural"), row(1, 0, "1", "Natural")], tmp_path)["score"] == 1
    result = scores(
        "llmbar",
        [row(1, 0, 1, "Natural"), row(1, 0, 2, "Manual"), row(0, 1, 2, "Manual"), row(1, 1, 2, "Manual")],
        tmp_path,
    )
    assert result["Natural"] == 1
    assert result["Manual"] == 0.5
    assert result["score"] == 0.75 # subsets count the same
    with pytest.raises(ValueError, match="Row 1 for llmbar cannot be used: its label is '3'; expected 1 or 2"):
        scores("llmbar", [row(1, 0, 3, "Natural")], tmp_path)


def test_judgebench(tmp_path):

    def row(one, two, label, source):
        return {
            "question": "q",
            "response_A": f"says {one}",
            "response_B": f"says {two}",
            "label": label,
            "source": source,
        }

    rows = [
        row(1, 0, "A>B", "mmlu-pro-law"),
        row(1, 0, "B>A", "mmlu-pro-math"),
        row(0, 1, "B>A", "livebench-math"),
        row(1, 1, "A>B", "livecodebench"),
        row(1, 1, "B>A", "livecodebench"),
        row(0, 0, "B>A", "livecodebench"),
        row(1, 2, "A>B", "livebench-reasoning"),
    ]
    result = scores("judgebench", rows, tmp_path)
    assert (result["knowledge"], result["math"], result["coding"], result["reasoning"]) == (
        0.5,
        1,
        pytest.approx(2 / 3),
        0,
    ) # of a tie its code says B>A
    assert result["score"] == pytest.approx(4 / 7) # pairs count the same
    with pytest.raises(
        ValueError, match="Row 1 for judgebench cannot be used: its label is 'A=B'; expected A>B or B>A"
    ):
        scores("judgebench", [row(1, 0, "A=B", "x")], tmp_path)


def test_hh_rlhf(tmp_path):

    def whole(value):
        return f"\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: says {value}"

    assert (
        scores(
            "hh-rlhf",
            [{"chosen": whole(1), "rejected": whole(0)}, {"chosen": whole(1), "rejected": whole(2)}],
            tmp_path,
        )["score"]
        == 0.5
    )


def test_ultrafeedback(tmp_path):

    def chat(value):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"says {value}"}]

    def row(one, two, *given):
        return {
            "prompt": "q",
            "prompt_id": "x",
            "chosen": chat(one),
            "rejected": chat(two),
            "messages": chat(one),
            "score_chosen": given[0],
            "score_rejected": given[1],
        }

    result = scores("ultrafeedback", [row(1, 0, 9.0, 2.0), row(1, 2, 7.0, 6.0), row(1, 2, 7.0, 7.0)], tmp_path)
    assert result["score"] == 0.5


def test_helpsteer2(tmp_path):

    def row(prompt, value, helpful):
        return {
            "prompt": prompt,
            "response": f"says {value}",
            "helpfulness": helpful,
            "correctness": 4,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 1,
        }

    rows = [row("a", 1, 4), row("a", 0, 2), row("b", 1, 1), row("b", 0, 3), row("c", 1, 3), row("c", 0, 3)]
    assert scores("helpsteer2", rows, tmp_path)["score"] == 0.5
    with pytest.raises(
        ValueError,
        match="Row 1 for helpsteer2 cannot be used: 'a' is followed by 'b'; expected two rows of one prompt",
    ):
        scores("helpsteer2", rows[1:5], tmp_path)
    with pytest.raises(ValueError, match="Row 3 for helpsteer2 cannot be used: 'b' is followed by None"):
        scores("helpsteer2", rows[:3], tmp_path)
    read = load_benchmark("helpsteer2", write(rows, tmp_path))
    assert [(comparison.ranks, comparison.ratings, number) for comparison, _, number in read] == [
        ((1, 2), (4.0, 2.0), 1),
        ((1, 2), (3.0, 1.0), 3),
        ((1, 1), (3.0, 3.0), 5),
    ] # the better one first
    report = evaluate_benchmark(Rule(stated_reward), "helpsteer2", write(rows, tmp_path)).report
    assert (report["comparisons"], report["pairs"]) == (3, 2) # what is no pair is counted


def test_helpsteer2_has_conversations(tmp_path):
    "As its card writes them."
    prompt = "first\n\nquestion\n\n<extra_id_1>Assistant\nanswer\n\n<extra_id_1>User\nsecond"
    (read,) = load_benchmark(
        "helpsteer2",
        write(
            [{"prompt": prompt, "response": text, "helpfulness": place} for place, text in enumerate("ab")], tmp_path
        ),
    )
    assert [(turn["role"], turn["content"]) for turn in read[0].prompt] == [
        ("user", "first\n\nquestion"),
        ("assistant", "answer"),
        ("user", "second"),
    ]
    assert [response[0]["content"] for response in read[0].responses] == ["b", "a"]


def test_numbers_are_those_of_the_file(tmp_path):
    "In messages and mistakes, though a row of RM-Bench is nine comparisons."
    rows = [
        {"prompt": "q", "chosen": [f"says {2 * (row != 3)}"] * 3, "rejected": ["says 1"] * 3, "domain": domain}
        for row, domain in enumerate(("chat", "code", "math", "safety-refuse", "safety-response"))
    ]
    assert {
        mistake["row"]
        for mistake in evaluate_benchmark(Rule(stated_reward), "rm-bench", write(rows, tmp_path)).mistakes()
    } == {4}
    rows[1]["rejected"][2] = "says nan"
    with pytest.raises(ValueError, match="^Row 2 of rm-bench: The rule gives "):
        scores("rm-bench", rows, tmp_path)
    with pytest.raises(
        ValueError, match="on_bad_row is 'skip'; expected 'error': without some rows rm-bench is another benchmark"
    ):
        evaluate_benchmark(Rule(stated_reward), "rm-bench", write(rows, tmp_path), on_bad_row="skip")


def test_intervals_of_a_score_against_the_binomial(tmp_path):
    "Pairs are independent; the difference of two models on the same pairs is surer where they agree."
    draw = random.Random(0)
    rows = [
        {
            "question": f"q{row}",
            "response_A": f"says {draw.random()}",
            "response_B": f"says {draw.random()}",
            "label": draw.choice(["A>B", "B>A"]),
            "source": f"mmlu-{row % 3}",
        }
        for row in range(300)
    ]

    def drawn(seed, text):
        return zlib.crc32(f"{seed} {text}".encode())

    def noisy(seed, share):
        return Rule(
            lambda prompt, response: (
                stated_reward(prompt, response) if drawn(seed, prompt) % 100 < share else drawn(seed, response) % 997
            )
        )

    path = write(rows, tmp_path)
    result = [evaluate_benchmark(noisy(seed, 0), "judgebench", path) for seed in range(3)]
    errors = [one.report["benchmark"]["score_interval"]["error"] for one in result]
    assert np.mean(errors) == pytest.approx(np.sqrt(0.25 / 300), rel=0.2)
    one = evaluate_benchmark(Rule(stated_reward), "judgebench", path)
    alike = evaluate_benchmark(noisy(0, 90), "judgebench", path)
    near, far = (compare({"one": one, "other": other})["pairs"][0]["score_difference"] for other in (alike, result[0]))
    assert near["error"] < 0.6 * far["error"]
    assert 0 <= near["p_value"] <= 1
    assert near["value"] == pytest.approx(one.report["benchmark"]["score"] - alike.report["benchmark"]["score"])
    again = evaluate_benchmark(Rule(stated_reward), "judgebench", path)
    assert (again.replicates == one.replicates).all()
    assert compare({"one": one, "again": again})["pairs"][0]["score_difference"] is None # nothing differs


@pytest.mark.usefixtures("no_pictures")
def test_units_stay_together(tmp_path):
    "Both Ties of a number, all of a prompt; no part is left without any."
    groups = jackknife_groups(
        pd.Series(["a"] * 8 + ["b"] * 4), pd.Series([1, 1, 2, 2, 3, 3, 4, 4, "x", "x", "y", "y"])
    )
    assert groups.groupby([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]).nunique().max() == 1
    assert groups.nunique() == 6
    assert jackknife_groups(pd.Series(["a", "a", "b"]), pd.Series([1, 2, 3])) is None
    assert jackknife_groups(pd.Series(["a", "b", "a", "b"]), pd.Series([1, 1, 2, 2])) is not None
    rows = []
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        for row in range(30):
            rows.append({**four(1, 0, 0, 0, subset=subset, id=str(row)), "prompt": f"{subset} {row}"})
    ties = []
    for row in range(40):
        for kind in ("ref", "tied"):
            ties.append({**four(row % 2, 0, subset="Ties", id=f"{kind}:{row}"), "prompt": f"{kind} {row}"})
    result = evaluate_benchmark(Rule(stated_reward), "rewardbench2", write(rows + ties, tmp_path))
    assert len(result.replicates) == 20
    assert result.report["benchmark"]["score_interval"]["error"] > 0
    other = evaluate_benchmark(
        Rule(lambda prompt, response: -stated_reward(prompt, response)), "rewardbench2", write(rows + ties, tmp_path)
    )
    for report in (report_markdown, report_html):
        page = report({"rewardbench2": {"m": result, "other": other}})
        assert "95 % interval of the score" in page
        assert "difference of the benchmark" in page
        assert page.count("m − other") == 2


def test_baselines_by_the_rule_itself(tmp_path):
    "The longer response, by RewardBench 2's best of four."
    rows = [
        four(0, 0, 0, 0, subset=subset, id="1") for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    ]
    chosen = ("says 1, at length", "says 1", "s", "says 1", "s") # longer than the others, as long, shorter
    for row, text in zip(rows, chosen):
        row["chosen"] = [text]
    ties = [
        four(1, 0, subset="Ties", id="ref:1"),
        {"prompt": "q", "chosen": ["says 1", "says 1"], "rejected": ["says 0"], "subset": "Ties", "id": "tied:1"},
    ]
    result = evaluate_benchmark(
        Rule(lambda prompt, response: 1.0), "rewardbench2", write(rows + ties, tmp_path)
    ).report["benchmark"]
    assert result["baselines"]["longer wins"] == pytest.approx((1 + 0.25 + 0 + 0.25 + 0 + 0) / 6)
    assert result["baselines"]["shorter wins"] == pytest.approx((0 + 0.25 + 1 + 0.25 + 1 + 0) / 6)
    assert result["baselines"]["prompt-blind"] == result["score"] == pytest.approx(0.25 * 5 / 6)


@pytest.mark.parametrize(
    "name, row, wrong",
    [
        (
            "rm-bench",
            {"prompt": "q", "chosen": "abc", "rejected": ["a", "b", "c"], "domain": "chat"},
            "'abc' as chosen; expected a list of three texts",
        ),
        (
            "rm-bench",
            {"prompt": "q", "chosen": ["a", "b"], "rejected": ["a", "b", "c"], "domain": "chat"},
            "as chosen; expected a list of three texts",
        ),
        (
            "rewardbench2",
            {"id": 1, "prompt": "q", "chosen": "abc", "rejected": ["a"], "subset": "Math"},
            "'abc' as chosen; expected a list of texts",
        ),
        (
            "rewardbench2",
            {"id": 1, "prompt": "q", "chosen": ["a"], "rejected": [], "subset": "Ties"},
            r"\[\] as rejected; expected a list of texts",
        ),
        (
            "rewardbench",
            {"prompt": "q", "chosen": "a", "rejected": ["b"], "subset": "hep-go"},
            "as rejected; expected a text",
        ),
        ("llmbar", {"input": "q", "output_1": "a", "output_2": 5, "label": 1}, "5 as output_2; expected a text"),
        ("helpsteer2", {"prompt": "q", "response": "a", "helpfulness": "4"}, "'4' as helpfulness; expected a number"),
        ("hh-rlhf", {"chosen": 5, "rejected": "b"}, "5 as chosen; expected a text"),
    ],
)
def test_values_of_another_kind(name, row, wrong, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"Row 1 for {name} has {wrong}" if not wrong.startswith("as") else f"Row 1 for {name} has .* {wrong}",
    ):
        load_benchmark(name, write([row], tmp_path))


@pytest.mark.parametrize(
    "ids, wrong",
    [
        (["1", "ref:2", "tied:2"], "but have the id '1'"),
        (["ref:1", "ref:1", "tied:1", "tied:1"], "are not in twos"),
        (["ref:1", "tied:2"], "are not in twos"),
        (["other:1", "ref:1", "tied:1"], "but have the id 'other:1'"),
    ],
)
def test_ties_have_their_numbers(ids, wrong, tmp_path):
    rows = [
        four(1, 0, 0, 0, subset=subset, id="9") for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    ]
    with pytest.raises(ValueError, match=f"The Ties of rewardbench2 .*{wrong}"):
        load_benchmark("rewardbench2", write([*rows, *(four(1, 0, subset="Ties", id=one) for one in ids)], tmp_path))


def test_ties_at_the_edge(tmp_path):
    "As the benchmark's own code: above means more than, and 0 / 0 adds nothing."
    rows = [
        four(1, 0, 0, 0, subset=subset, id="9") for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    ]
    tied = {
        "prompt": "q",
        "chosen": ["says 2", "says 1"],
        "rejected": ["says 1"],
        "subset": "Ties",
        "id": "tied:1",
    } # above by 0, apart by 1
    same = {
        "prompt": "q",
        "chosen": ["says 1", "says 1"],
        "rejected": ["says 1"],
        "subset": "Ties",
        "id": "tied:2",
    } # above by 0, apart by 0
    result = scores(
        "rewardbench2",
        [*rows, four(1, 1, subset="Ties", id="ref:1"), tied, four(2, 1, subset="Ties", id="ref:2"), same],
        tmp_path,
    )
    assert result["Ties"] == pytest.approx(0.3 * 0 + 0.3 * 0.5 + 0.01 * (math.tanh(0 / 1 - 1) + 0) / 2)
    turned = scores(
        "rewardbench2",
        [*rows, same, four(2, 1, subset="Ties", id="ref:2"), tied, four(1, 1, subset="Ties", id="ref:1")],
        tmp_path,
    )
    assert turned["Ties"] == result["Ties"] # each with its own, in any order


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_another_schema(name, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"Row 1 for {name} has no .*; it has \\['answer', 'question_'\\]. Expected rows of that benchmark",
    ):
        scores(name, [{"question_": "q", "answer": "a"}], tmp_path)


def test_unknown_names_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="There is no benchmark 'rewardbanch' here; there are rewardbench,"):
        load_benchmark("rewardbanch")
    with pytest.raises(ValueError, match="no pair in which people prefer"):
        scores("helpsteer2", [{"prompt": "a", "response": "says 1", "helpfulness": 3}] * 2, tmp_path)


def test_another_benchmark(tmp_path, monkeypatch):
    "Its page says what it takes; figures may be whole numbers."

    def read(row):
        return [(Comparison(row["q"], (row["good"], row["bad"]), (1, 2), source="mine"), "")]

    def rule(table):
        return {"score": int((table[table["rank"] == 1]["reward"] > 0).sum())}

    monkeypatch.setitem(
        BENCHMARKS,
        "mine",
        Benchmark("me/mine", dict.fromkeys(("q", "good", "bad"), "a text"), read, rule, says="Good answers above 0."),
    )
    result = scores(
        "mine",
        [{"q": "q", "good": "says 1", "bad": "says 5"}, {"q": "q", "good": "says -1", "bad": "says -5"}],
        tmp_path,
    )
    assert result == {
        "name": "mine",
        "rule": "Good answers above 0.",
        "rule_source": None,
        "score": 1,
        "score_interval": None,
        "baselines": {"longer wins": 2, "shorter wins": 0, "prompt-blind": 1},
    }


def test_names_and_splits_on_the_hub():
    assert {name: (benchmark.hub, benchmark.split) for name, benchmark in BENCHMARKS.items()} == {
        "rewardbench": ("allenai/reward-bench", "filtered"),
        "rewardbench2": ("allenai/reward-bench-2", "test"),
        "rm-bench": ("THU-KEG/RM-Bench", "train"),
        "llmbar": ("princeton-nlp/LLMBar", "test"),
        "judgebench": ("ScalerLab/JudgeBench", "gpt"),
        "ppe-preference": ("lmarena-ai/PPE-Human-Preference-V1", "test"),
        "ppe-correctness": ("lmarena-ai/PPE-*-Best-of-K", "train"),
        "rmb": ("Zhou-Zoey/RMB-Reward-Model-Benchmark", "test"),
        "m-rewardbench": ("CohereLabsCommunity/multilingual-reward-bench", "test"),
        "rewardbench-prior-sets": ("allenai/preference-test-sets", "test"),
        "if-rewardbench": ("thu-coai/IF-RewardBench", "test"),
        "hh-rlhf": ("Anthropic/hh-rlhf", "test"),
        "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"),
        "helpsteer2": ("nvidia/HelpSteer2", "validation"),
    }
    assert sum(sum(weights.values()) for weights in REWARDBENCH.values()) == 358 + 456 + 740 + 1968


def test_weights_of_rewardbench_are_those_of_its_code_since_0_1_3(tmp_path):
    "A model that never refuses: the safety of 0.1.4 is (250 + 136) / 740 if it is also right where it need not refuse."
    right = {"xstest-should-respond", "donotanswer"}
    rows = []
    for weights in REWARDBENCH.values():
        for subset in weights:
            rewards = (1, 0) if subset in right else (0, 1)
            rows.append(pair(*rewards, subset=subset, id=len(rows)))
    assert scores("rewardbench", rows, tmp_path)["Safety"] == pytest.approx((250 + 136) / 740)
    assert REWARDBENCH["Safety"] == {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    }
