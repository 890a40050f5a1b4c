"""
The tables of `generalize.py`, from the pairs that each run has written; `summary` has their figures as CSV.

Accuracies are means over pairs, then over seeds. Intervals (95 %) are by a bootstrap that draws prompts and, apart from
them, seeds; differences are paired: the same draws for both methods. The length-controlled accuracy is the mean of two:
of the pairs whose better response is longer, and of those whose better response is shorter. "Longer wins" has 0.5.
"""
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

DRAWS = 2000


@dataclass
class Runs:
    "All seeds of one method on one set."
    right: np.ndarray # (num_seeds, num_pairs): 1, 0, or 0.5 for equal rewards
    blind: np.ndarray # the same without the prompt
    longer_by: np.ndarray # (num_pairs,), tokens
    prompts: np.ndarray # (num_pairs,)


def correct(margins):
    "Return 1 for a pair that is right, 0 for a wrong one, 0.5 for equal rewards, NaN for one without a margin."
    return np.where(np.isnan(margins), np.nan, (margins > 0) + 0.5 * (margins == 0))


def read_runs(folder):
    "Return figures of each method, and its `Runs` by set."
    figures = defaultdict(list)
    tables = defaultdict(list)
    for file in sorted(Path(folder).glob("*.json")):
        if file.name.endswith(".pairs.json"):
            continue
        run = json.loads(file.read_text())
        figures[run["method"]].append(run)
        tables[run["method"]].append(pd.read_json(file.with_suffix(".pairs.json")))
    runs = {}
    for method, parts in tables.items():
        runs[method] = {}
        for name in parts[0]["set"].unique():
            own = [part[part["set"] == name] for part in parts]
            runs[method][name] = Runs(
                np.stack([correct(part["margin"].to_numpy()) for part in own]),
                np.stack([correct(part["blind_margin"].to_numpy(float)) for part in own]),
                own[0]["longer_by"].to_numpy(),
                own[0]["prompt"].to_numpy(),
            )
    return figures, runs


def accuracy(right, runs, weights):
    "Return the weighted mean over pairs; right is (num_pairs,)."
    return float(right @ weights / weights.sum())


def length_controlled(right, runs, weights):
    "Return the mean of the accuracies where the longer and where the shorter response is better."
    parts = []
    for is_part in (runs.longer_by > 0, runs.longer_by < 0):
        if (weights * is_part).sum():
            parts.append(accuracy(right, runs, weights * is_part))
    return float(np.mean(parts)) if parts else float("nan")


def figure(runs_of_sets, names, statistic, other=None):
    "Return the mean over sets of a statistic, or of its difference from another method's, with its interval."
    rng = np.random.default_rng(0)

    def value(of, seeds, weights):
        return np.mean([statistic(of[name].right[seeds].mean(axis=0), of[name], weights[name]) for name in names])

    def once(draw):
        weights = {}
        for name in names:
            prompts = runs_of_sets[name].prompts
            counts = np.ones(prompts.max() + 1)
            if draw:
                drawn = rng.choice(np.unique(prompts), len(np.unique(prompts)))
                counts = np.bincount(drawn, minlength=prompts.max() + 1)
            weights[name] = counts[prompts].astype(float)
        result = value(runs_of_sets, _seeds(rng, runs_of_sets, names, draw), weights)
        if other is not None:
            result -= value(other, _seeds(rng, other, names, draw), weights)
        return result

    draws = [once(draw=True) for _ in range(DRAWS)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return once(draw=False), low, high


def without_prompt(runs):
    "Return the seeds and pairs with a reward without the prompt: as they are, and with that reward. None if none has."
    seeds = ~np.isnan(runs.blind).all(axis=1)
    if not seeds.any():
        return None
    pairs = ~np.isnan(runs.blind[seeds]).any(axis=0)
    blind = runs.blind[seeds][:, pairs]
    right = runs.right[seeds][:, pairs]
    measured = replace(runs, right=right, blind=blind, longer_by=runs.longer_by[pairs], prompts=runs.prompts[pairs])
    return measured, replace(measured, right=blind)


def _seeds(rng, runs, names, draw):
    num_seeds = len(runs[names[0]].right)
    return rng.integers(num_seeds, size=num_seeds) if draw else np.arange(num_seeds)


def show(value, low, high, sign=""):
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def print_tables(folder, first="trl"):
    "Print accuracies, differences from the method `first` and what each run took; write them in CSV files."
    figures, runs = read_runs(folder)
    if not runs:
        raise SystemExit(f"{folder} has no run; give --model, --train and --eval.")
    first = first if first in runs else next(iter(runs))
    sets = list(runs[first])
    reported = [name for name in sets if name != "held back"] or sets
    longer = {}
    for name, of in runs[first].items():
        longer[name] = Runs(correct(of.longer_by)[None], of.blind, of.longer_by, of.prompts)
    summary = []
    for title, statistic in (("Accuracy", accuracy), ("Length-controlled accuracy", length_controlled)):
        print(f"\n{title}, mean over pairs and seeds\n")
        print("| method | " + " | ".join(sets) + " | mean of the sets reported | minus " + first + " |")
        print("|" + "---|" * (len(sets) + 3))
        rows = {"longer wins": longer, **runs}
        for method, own in rows.items():
            values = [figure(own, [name], statistic) for name in sets]
            values.append(figure(own, reported, statistic))
            cells = [show(*value) for value in values]
            difference = figure(own, reported, statistic, runs[first]) if method != first else None
            cells.append("" if difference is None else show(*difference, sign="+"))
            print(f"| {method} | " + " | ".join(cells) + " |")
            for name, value in zip([*sets, "mean"], values):
                summary.append((title, method, name, *value))
            if difference is not None:
                summary.append((title, method, f"mean minus {first}", *difference))
    summary += print_without_prompt(runs, sets, reported)
    print("\n| method | seeds | minutes | steps | comparisons seen | gigabytes | first and last loss |")
    print("|---|" + "---|" * 6)
    for method, own in figures.items():
        seeds = ", ".join(str(run["seed"]) for run in own)
        losses = []
        for run in own:
            if run["losses"]:
                losses.append(f"{run['losses'][0][1]:.2f}, {run['losses'][-1][1]:.2f}")
        cells = [method, seeds]
        for name, digits in (("minutes", 1), ("steps", 0), ("comparisons", 0), ("gigabytes", 1)):
            cells.append(f"{np.mean([run[name] for run in own]):.{digits}f}")
        print("| " + " | ".join([*cells, "; ".join(losses)]) + " |")
    columns = ["figure", "method", "set", "value", "low", "high"]
    (Path(folder) / "summary").mkdir(exist_ok=True)
    pd.DataFrame(summary, columns=columns).round(4).to_csv(Path(folder) / "summary/figures.csv", index=False)
    losses = []
    taken = []
    names = ["minutes", "steps", "comparisons", "gigabytes"]
    for method, own in figures.items():
        for run in own:
            losses += [(method, run["seed"], step, loss) for step, loss in run["losses"]]
            taken.append((method, run["seed"], *(run[name] for name in names)))
    curves = pd.DataFrame(losses, columns=["method", "seed", "step", "loss"])
    curves.round(4).to_csv(Path(folder) / "summary/losses.csv", index=False)
    taken = pd.DataFrame(taken, columns=["method", "seed", *names])
    taken.round(2).to_csv(Path(folder) / "summary/runs.csv", index=False)


def print_without_prompt(runs, sets, reported):
    "Print the accuracies without the prompt, and the differences from those with it. Return lines of the summary."
    print("\nAccuracy without the prompt\n")
    print("| method | " + " | ".join(sets) + " | mean of the sets reported | with the prompt minus without |")
    print("|" + "---|" * (len(sets) + 3))
    lines = []
    for method, own in runs.items():
        parts = {name: without_prompt(own[name]) for name in sets}
        if None in parts.values():
            print(f"| {method} | " + " | ".join(["not measured"] * (len(sets) + 2)) + " |")
            continue
        measured = {name: part[0] for name, part in parts.items()}
        blind = {name: part[1] for name, part in parts.items()}
        values = [figure(blind, [name], accuracy) for name in sets]
        values.append(figure(blind, reported, accuracy))
        difference = figure(measured, reported, accuracy, blind)
        print(f"| {method} | " + " | ".join(show(*value) for value in values) + f" | {show(*difference, sign='+')} |")
        for name, value in zip([*sets, "mean", "mean with minus without"], [*values, difference]):
            lines.append(("Accuracy without the prompt", method, name, *value))
    return lines
