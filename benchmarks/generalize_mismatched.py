"""
How many comparisons should get a response to another prompt: heads on frozen states, chosen on training prompts alone.

    python benchmarks/generalize_mismatched.py --model FOLDER --train TRAIN.jsonl --output FOLDER [--layer 20]

Of the states and folds of `generalize_heads.py`, in the same output folder. Each comparison has a response to another
prompt of its source and fold at hand; a share of them is fitted with it, as ranked last of three. Each line has the
length-controlled accuracy as there, mean of four draws of the share, and how often a response is better than one to
another prompt, on prompts that were left out.
"""
import random

import numpy as np
import torch
from generalize_data import read_rows
from generalize_heads import FOLDS, balanced_weights, fit, fold_of, largest_sources, length_controlled, pairs_of
from generalize_heads import state_parser, states_of
from generalize_table import correct

SHARES = (0.0, 0.1, 0.15, 0.2, 0.3, 0.5)
RIDGES = (1.0, 3.0)
DRAWS = 4


def best_response(row):
    return row["responses"][int(np.argmin(row["ranks"]))]


def other_rows(rows, folds):
    "Return for each row the number of another one with another prompt, of the same fold and source where there is one."
    rng = random.Random(0)
    others = []
    for row, fold in zip(rows, folds):
        same_fold = [number for number, other in enumerate(rows)
                     if folds[number] == fold and other["key"] != row["key"]]
        same_source = [number for number in same_fold if rows[number]["source"] == row["source"]]
        others.append(rng.choice(same_source or same_fold))
    return others


def mismatched_states(rows, others, model_name, layer):
    "Return the mean state of the best response to another prompt after the prompt of each row, (num_rows, width)."
    swapped = []
    for row, other in zip(rows, others):
        swapped.append({"prompt": row["prompt"], "responses": [best_response(row), best_response(rows[other])]})
    return states_of(swapped, model_name)["mean"][1::2, layer]


class Heads:
    "Fits and evaluates heads on differences of states."

    def __init__(self, rows, states, other_states):
        winner, loser, self.longer_by, prompts, self.sources = pairs_of(rows, states["lengths"])
        num_responses = [len(row["responses"]) for row in rows]
        self.row = np.repeat(np.arange(len(rows)), num_responses)[winner] # of each pair
        differences = states["own"][winner] - states["own"][loser]
        scale = differences.square().mean(dim=0).sqrt() + 1e-6
        self.differences = differences / scale
        self.chosen = (states["own"][winner] - other_states[self.row]) / scale
        self.rejected = (states["own"][loser] - other_states[self.row]) / scale
        self.folds = np.array(list(map(fold_of, prompts)))

    def left_out(self, is_left_out, is_extended, ridge):
        "Return what is right of the pairs left out: their own, chosen and rejected against the other response."
        others = ~is_left_out
        extended = others & is_extended[self.row]
        weights = balanced_weights(self.longer_by[others])
        weights = weights / weights.sum() * np.where(is_extended[self.row][others], 1 / 3, 1)
        added = np.full(extended.sum(), 1 / 3 / others.sum())
        features = torch.cat([self.differences[others], self.chosen[extended], self.rejected[extended]])
        head = fit(features, np.concatenate([weights, added, added]), ridge)
        kinds = (self.differences, self.chosen, self.rejected)
        return [correct((kind[is_left_out].double() @ head).numpy()) for kind in kinds]

    def evaluate(self, is_extended, ridge):
        "Return the mean length-controlled accuracy, and how often chosen and rejected are better than the other one."
        right = np.zeros((3, len(self.row)))
        for fold in range(FOLDS):
            is_left_out = self.folds == fold
            right[:, is_left_out] = self.left_out(is_left_out, is_extended, ridge)
        controlled = [length_controlled(right[0], self.longer_by)]
        for source in largest_sources(self.sources):
            is_left_out = self.sources == source
            own, _, _ = self.left_out(is_left_out, is_extended, ridge)
            controlled.append(length_controlled(own, self.longer_by[is_left_out]))
        return np.mean(controlled), right[1].mean(), right[2].mean()


def main():
    parser = state_parser(__doc__, "folder with states.pt of generalize_heads.py")
    parser.add_argument("--layer", type=int, default=20)
    arguments = parser.parse_args()
    rows = read_rows(arguments.train, arguments.max_characters)
    folds = [fold_of(row["key"]) for row in rows]
    file = arguments.output / f"mismatched_{arguments.layer}.pt"
    if not file.exists():
        torch.save(mismatched_states(rows, other_rows(rows, folds), arguments.model, arguments.layer), file)
    states = torch.load(arguments.output / "states.pt")
    own = {"own": states["mean"][:, arguments.layer].float(), "lengths": states["lengths"]}
    heads = Heads(rows, own, torch.load(file).float())
    print("| share | ridge | length-controlled | chosen better than another prompt's | rejected better |")
    print("|---|---|---|---|---|")
    for share in SHARES:
        for ridge in RIDGES:
            draws = []
            for seed in range(DRAWS if share else 1):
                is_extended = np.random.default_rng(seed).random(len(rows)) < share
                draws.append(heads.evaluate(is_extended, ridge))
            cells = [f"{value:.3f}" for value in np.mean(draws, axis=0)]
            print(f"| {share} | {ridge} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
