"The seven benchmarks that papers report, as one command: its local copies, what is missing, and its one table."

import itertools
import json
import re

import pytest

from rlhf_reward import cli as commands
from rlhf_reward.benchmarks import REWARDBENCH
from rlhf_reward.evaluation import Evaluation, Rule
from rlhf_reward.ppe import PPE_CORRECTNESS
from rlhf_reward.suite import SUITE, local_copy, suite_lines, suite_table


def stated_reward(prompt, response):
    "Return the reward that the text of the response has at its end: 'says 3.5'."
    return float((response if isinstance(response, str) else response[-1]["content"]).split()[-1])


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_copies(folder):
    "Write one to three rows of each part of the seven benchmarks, each under another kind of name."
    pair = {"prompt": "q", "chosen": "says 1", "rejected": "says 0"}
    subsets = itertools.chain.from_iterable(REWARDBENCH.values())
    rows = [{**pair, "subset": subset} for subset in subsets]
    write(folder / "reward-bench/data/filtered-00000-of-00001.jsonl", rows)
    four = {"prompt": "q", "chosen": ["says 1"], "rejected": ["says 0", "says 0", "says 2"]}
    kinds = [("Factuality", "1"), ("Precise IF", "2"), ("Math", "3"), ("Safety", "4"), ("Focus", "5")]
    kinds += [("Ties", "ref:1"), ("Ties", "tied:1")]
    write(folder / "RewardBench_2.jsonl", [{**four, "subset": subset, "id": number} for subset, number in kinds])
    votes = {"prompt": "q", "response_1": "says 1", "response_2": "says 0"}
    write(folder / "PPE-Human-Preference-V1/test.jsonl", [{**votes, "winner": w} for w in ("model_a", "model_b")])
    checked = {"prompt": "q", "response_1": "says 1", "response_2": "says 0", "scores": [True, False]}
    checked["sampled_conflict_pairs"] = [[0, 1]]
    for name in PPE_CORRECTNESS:
        write(folder / f"ppe_correctness/{name}.jsonl", [checked])
    styles = {"prompt": "q", "chosen": ["says 1"] * 3, "rejected": ["says 0"] * 3}
    domains = ("chat", "code", "math", "safety-refuse", "safety-response")
    write(folder / "rm-bench.jsonl", [{**styles, "domain": domain} for domain in domains])
    judged = {"question": "q", "response_A": "says 1", "response_B": "says 0", "source": "livebench-math"}
    write(folder / "JudgeBench/data/dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl", [
        {**judged, "label": label} for label in ("A>B", "A>B", "A>B", "B>A")
    ])
    write(folder / "JudgeBench/outputs/another.jsonl", [{"judgments": []}])


def run_suite(tmp_path, *more):
    arguments = ["--model", "mine", "--benchmark_dir", str(tmp_path / "copies"), "--device", "cpu"]
    commands.evaluate([*arguments, "--benchmark", "suite", "--output", str(tmp_path / "report"), *more])


def test_the_suite(tmp_path, monkeypatch, capsys):
    "A copy that does not exist and one that is damaged are named; the rest is one table."
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    monkeypatch.setattr("rlhf_reward.cli.evaluate_command.open_scorer", lambda *arguments: Rule(stated_reward))
    monkeypatch.setattr("rlhf_reward.evaluation._statistics_by", lambda *arguments: {})  # slow, and no part
    monkeypatch.setattr("rlhf_reward.report.plots", lambda evaluation: {})  # the same
    made_copies(tmp_path / "copies")
    write(tmp_path / "copies/rm-bench.jsonl", [{"prompt": "q"}])
    with pytest.raises(SystemExit, match="^2 of 7 benchmarks did not run:") as stopped:
        run_suite(tmp_path)
    lines = str(stopped.value).splitlines()
    assert re.match("  rmb: '.*copies' has no rmb; expected a file or folder rmb or RMB-Reward-Model-Benc", lines[1])
    assert lines[2].startswith("  rm-bench: Row 1 for rm-bench has no chosen, domain, rejected")
    scores = {"rewardbench": 100.0, "rewardbench2": None, "ppe-preference": 50.0, "ppe-correctness": 100.0}
    printed = capsys.readouterr().out
    table = printed[printed.index("Scores in percent"):].splitlines()
    assert [line.split()[0] for line in table[2:8]] == [*scores, "judgebench", "mean"]
    assert table[6].split() == ["judgebench", "75.0"] and table[2].split() == ["rewardbench", "100.0"]
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["suite"]["benchmarks"]["judgebench"]["mine"] == {"value": 0.75, "interval": None}
    ties = report["suite"]["benchmarks"]["rewardbench2"]["mine"]["value"]
    assert report["suite"]["mean"]["mine"]["value"] == pytest.approx((1 + ties + 0.5 + 1 + 0.75) / 5)
    page = (tmp_path / "report/report.html").read_text()
    assert "<td>mean of 5</td>" in page and "github.com/ScalerLab/JudgeBench" in page
    assert "| judgebench | 75.0 |" in (tmp_path / "report/report.md").read_text()


def test_what_the_suite_asks_for(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    (tmp_path / "copies").mkdir()
    with pytest.raises(SystemExit, match=r"no benchmark of the suite can be read \(rewardbench: '.*' has no rewardbe"):
        run_suite(tmp_path)
    with pytest.raises(SystemExit, match="--benchmark has the same name more than once: rewardbench, .*, rewardbench"):
        run_suite(tmp_path, "--benchmark", "rewardbench")
    with pytest.raises(SystemExit, match="'.*copies' has no rm-bench; expected a file or folder rm-bench or RM-Bench"):
        commands.evaluate(["--model", "m", "--benchmark", "rm-bench", "--benchmark_dir", str(tmp_path / "copies"),
                           "--output", str(tmp_path / "r")])
    with pytest.raises(SystemExit, match="--benchmark_dir 'nowhere' is no folder; expected one with a local copy"):
        run_suite(tmp_path, "--benchmark_dir", "nowhere")
    monkeypatch.setattr("rlhf_reward.benchmark_files.load_rows", lambda *a, **k: [][0])  # a bug is not a missing copy
    made_copies(tmp_path / "copies")
    with pytest.raises(IndexError):
        run_suite(tmp_path)


def test_local_copies(tmp_path):
    made_copies(tmp_path)
    found = {name: local_copy(str(tmp_path), name) for name in SUITE if name != "rmb"}
    assert {name: path.rpartition("/")[2] for name, path in found.items()} == {
        "rewardbench": "reward-bench",
        "rewardbench2": "RewardBench_2.jsonl",
        "ppe-preference": "PPE-Human-Preference-V1",
        "ppe-correctness": "ppe_correctness",
        "rm-bench": "rm-bench.jsonl",
        "judgebench": "JudgeBench",
    }
    (tmp_path / "rm_bench").mkdir()
    with pytest.raises(ValueError, match="rm-bench.jsonl and .*rm_bench for rm-bench; expected one of them"):
        local_copy(str(tmp_path), "rm-bench")


def evaluation(score, error=None):
    interval = error and {"value": score, "error": error, "low": score - error, "high": score + error}
    return Evaluation([], [], None, {"benchmark": {"score": score, "score_interval": interval}})


def test_the_mean_of_the_table():
    "Its error, of independent scores, is the root of the sum of squares by the number of benchmarks."
    table = suite_table({
        "a": {"m": evaluation(0.6, 0.03), "n": evaluation(0.5, 0.01)},
        "b": {"m": evaluation(0.8, 0.04), "n": evaluation(0.7)},
        "data": {"m": Evaluation([], [], None, {}), "n": Evaluation([], [], None, {})},
    })
    assert list(table["benchmarks"]) == ["a", "b"]
    mean = table["mean"]["m"]["interval"]
    assert mean["value"] == pytest.approx(0.7) and mean["high"] - mean["value"] == pytest.approx(1.96 * 0.025)
    assert table["mean"]["n"] == {"value": pytest.approx(0.6), "interval": None}
    assert suite_lines(table)[1:] == [
        ["a", "60.0 (57.0 to 63.0)", "50.0 (49.0 to 51.0)"],
        ["b", "80.0 (76.0 to 84.0)", "70.0"],
        ["mean of 2", "70.0 (65.1 to 74.9)", "60.0"],
    ]
    assert suite_table({"a": {"m": evaluation(0.6)}}) is None
