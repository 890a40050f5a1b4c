"The bench of methods: its split, its budget, what it skips, and the figures of its tables by hand."
import argparse
import json
import random
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from rlhf_reward import RewardConfig
from rlhf_reward.arguments import check_arguments

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="there are no benchmarks here")


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(import_module("generalize_table"), "DRAWS", 200)


def write_run(folder, method, seed, margins, blind_margins, longer_by):
    "Write a run as the bench does, with two sets of the same pairs, two to a prompt."
    figures = {"minutes": 6.0, "steps": 20, "comparisons": 160, "gigabytes": 4.0, "losses": [[1, 0.7], [4, 0.6]]}
    stem = f"{method}-{seed}"
    (folder / f"{stem}.json").write_text(json.dumps({"method": method, "seed": seed, **figures}))
    tables = []
    for name in ("held back", "other"):
        tables.append(pd.DataFrame({
            "set": name,
            "margin": margins,
            "blind_margin": blind_margins,
            "longer_by": longer_by,
            "prompt": np.arange(len(margins)) // 2,
        }))
    pd.concat(tables).to_json(folder / f"{stem}.pairs.json", orient="records")


def test_the_tables_have_the_figures_by_hand(tmp_path, capsys):
    longer_by = [3, 2, 1, -1, -2, 0] # half right for "longer wins" of the last
    nothing = [None] * 6
    write_run(tmp_path, "trl", 0, [1, -1, -1, -1, 1, 1], [1, 1, -1, -1, -1, 0], longer_by)
    write_run(tmp_path, "new", 0, [1, 1, 1, 1, -1, 0], nothing, longer_by)
    write_run(tmp_path, "new", 1, [1, 1, -1, 1, 1, 0], nothing, longer_by)
    import_module("generalize_table").print_tables(tmp_path)
    figures = pd.read_csv(tmp_path / "summary/figures.csv").set_index(["figure", "method", "set"])
    accuracy = figures.loc["Accuracy"].value
    controlled = figures.loc["Length-controlled accuracy"].value
    assert accuracy["trl", "other"] == 0.5
    assert accuracy["new", "other"] == pytest.approx(np.mean([4.5, 4.5]) / 6, abs=1e-4)
    assert accuracy["longer wins", "other"] == pytest.approx(3.5 / 6, abs=1e-4)
    assert controlled["longer wins", "other"] == 0.5
    assert controlled["trl", "other"] == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-4)
    assert controlled["new", "other"] == pytest.approx((2.5 / 3 + 1.5 / 2) / 2, abs=1e-4)
    assert accuracy["new", "mean"] == accuracy["new", "other"] # the set held back is not reported
    difference = figures.loc["Accuracy", "new", "mean minus trl"]
    assert difference.value == pytest.approx(0.25, abs=1e-4) and difference.low < 0.25 < difference.high
    blind = figures.loc["Accuracy without the prompt"].value
    assert blind["trl", "other"] == pytest.approx(2.5 / 6, abs=1e-4) and "new" not in blind.index.get_level_values(0)
    assert blind["trl", "mean with minus without"] == pytest.approx(0.5 - 2.5 / 6, abs=1e-4)
    printed = capsys.readouterr().out
    assert "| new | not measured |" in printed and "| trl | 0 | 6.0 | 20 | 160 | 4.0 | 0.70, 0.60 |" in printed
    assert list(pd.read_csv(tmp_path / "summary/runs.csv").seed) == [0, 1, 0]
    assert len(pd.read_csv(tmp_path / "summary/losses.csv")) == 6


def test_differences_are_paired_by_prompt(tmp_path):
    "Two methods with the same answers differ by 0 in every draw, though each has an interval of its own."
    draw = random.Random(0)
    margins = [draw.choice([-1, 1]) for _ in range(40)]
    for method in ("trl", "new"):
        write_run(tmp_path, method, 0, margins, margins, [1, -1] * 20)
    import_module("generalize_table").print_tables(tmp_path)
    figures = pd.read_csv(tmp_path / "summary/figures.csv").set_index(["figure", "method", "set"])
    assert list(figures.loc["Accuracy", "new", "mean minus trl"]) == [0, 0, 0]
    own = figures.loc["Accuracy", "new", "mean"]
    assert own.low < own.value < own.high


@pytest.mark.parametrize("steps", [None, 4])
def test_the_budget_is_minutes_or_steps(monkeypatch, steps):
    generalize = import_module("generalize")
    clock = generalize.Clock(60, steps, warmup=0.5)
    monkeypatch.setattr(generalize.time, "process_time", lambda: 15 * clock.steps_done)
    clock.start()
    callback = clock.callback()
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}, {"lr": 0.1}])
    rates = []
    control = SimpleNamespace(should_training_stop=False)
    while not control.should_training_stop:
        callback.on_step_begin(None, None, control, optimizer=optimizer)
        rates.append([group["lr"] for group in optimizer.param_groups])
        callback.on_step_end(None, None, control)
    assert clock.steps_done == 4 and clock.minutes() == 1
    expected = [0.02, 0.52 * 0.75, 0.5, 0.25] # rising for half of the budget, falling to 0 over all of it
    assert np.allclose(rates, [[rate, 0.1 * rate] for rate in expected])


def test_what_is_done_is_skipped(tmp_path, monkeypatch):
    generalize = import_module("generalize")
    write_run(tmp_path, "trl", 0, [1, -1], [1, 1], [1, -1])
    started = []
    monkeypatch.setattr(generalize.subprocess, "run", lambda command, **kwargs: started.append(command[-3:]))
    options = ["generalize.py", "--output", str(tmp_path), "--methods", "trl", "fitted head", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", options)
    generalize.main()
    assert started == [["--one", "fitted head", "0"], ["--one", "trl", "1"], ["--one", "fitted head", "1"]]


def test_no_prompt_is_on_both_sides_of_the_split(tmp_path):
    data = import_module("generalize_data")
    rows = []
    for number in range(40):
        pair = {"chosen": f"good {number}", "rejected": "bad"}
        rows.append({"prompt": f"prompt {number // 2}", **pair})
    rows.append({"prompt": "long", "chosen": "x" * 2000, "rejected": "bad"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = data.read_rows(file, 1000)
    assert len(read) == 40 and data.read_rows(file, 1000) == read
    train, held_back = data.split_by_prompt(read, 0.2)
    prompts = {row["key"] for row in train}
    others = {row["key"] for row in held_back}
    assert (len(prompts), len(others)) == (16, 4) and not prompts & others
    assert len(train) == 32 and len(data.first_responses(train, 9)) == 4


def test_every_method_has_options_that_exist(tmp_path):
    generalize = import_module("generalize")
    names = {field.name for field in fields(RewardConfig)}
    apart = {"side", "model", "lora", "calibrated", "of"} # not of `RewardConfig`
    for method, options in generalize.METHODS.items():
        args = {name: value for name, value in options.items() if name not in apart}
        assert set(args) <= names, method
        check_arguments(RewardConfig(str(tmp_path), use_cpu=True, report_to="none", **args))
        assert options.get("of", "trl") in generalize.METHODS


def test_a_file_that_does_not_exist_is_an_error_of_the_arguments(tmp_path):
    paths = import_module("paths")
    file = str(tmp_path / "rows.jsonl")
    kinds = [(paths.existing, file), (paths.existing_or_synthetic, file), (paths.kind_and_file, f"hh={file}")]
    for kind, text in kinds:
        with pytest.raises(argparse.ArgumentTypeError, match="rows.jsonl' does not exist; expected a file of rows"):
            kind(text)
    Path(file).touch()
    assert paths.kind_and_file(f"hh={file}") == ("hh", file) and paths.existing_path(file) == Path(file)
    with pytest.raises(argparse.ArgumentTypeError, match="has no kind; expected hh=FILE"):
        paths.kind_and_file(file)
