"""
How many flipped labels are found, and what training gains from it.

    python benchmarks/find_flips.py pairs.jsonl [--judges text MODEL …] [--most 4000] [--share 0.2] [--seeds 5]
    python benchmarks/find_flips.py synthetic --train --judges text folds

A third of the prompts of FILE is held out, with its labels. Of the other labels a share is flipped at random, once for
each seed, and each judge names those that are wrong with a probability above one half. A linear Bradley–Terry head on
the judge's features is then trained on the labels as they were flipped, without the named ones, with these reversed,
with the soft labels of the file that `--find_flips` writes, and on the labels before; its accuracy is that on the
held-out pairs. With `--train` the tiny decoder is trained in place of the head, by `RewardTrainer`. The judge `folds`
is that decoder, trained on two of three folds and asked about the third. Prints a table in Markdown.
"""
import argparse
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from paths import existing_or_synthetic
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from transformers import AutoTokenizer

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, Scorer, load_rows
from rlhf_reward.comparison import text_key
from rlhf_reward.flip_features import judge, text_features
from rlhf_reward.flips import find_flips
from rlhf_reward.rows import to_comparison
from rlhf_reward.synthetic import RECIPE, synthetic_comparisons, synthetic_texts, tiny_decoder

CLEANINGS = ("flipped", "left out", "reversed", "soft labels", "labels before")


def read(name, most):
    "Return comparisons of two responses with a winner, the first one, of a file or made."
    if name == "synthetic":
        rows = synthetic_comparisons(2400, num_responses=2, likes="birds")
    else:
        rows = load_rows(name)
    comparisons = []
    for row in rows:
        comparison = to_comparison(row)
        if comparison.ranks == (2, 1):
            comparison = replace(comparison, responses=comparison.responses[::-1], ranks=(1, 2), ratings=None)
        if comparison.ranks == (1, 2):
            comparisons.append(comparison)
    kept = np.random.default_rng(0).permutation(len(comparisons))[:most]
    return [comparisons[index] for index in sorted(kept)]


def features_of(name, comparisons, max_length, dtype):
    "Return the comparisons that a judge can read, and its features."
    if name in ("text", "folds"):
        return comparisons, text_features(comparisons)
    judged = judge(name, comparisons, max_length, dtype=dtype)
    if judged.features is None:
        raise SystemExit(f"{name} gives rewards; expected a language model or an encoder.")
    return [comparisons[index] for index in judged.kept], judged.features


def flipped_labels(comparisons, share, generator):
    "Return the comparisons with a share of the labels flipped, and which ones are."
    is_flipped = generator.random(len(comparisons)) < share
    ranks = [(2, 1) if flip else (1, 2) for flip in is_flipped]
    return [replace(item, ranks=order) for item, order in zip(comparisons, ranks)], is_flipped


def targets(is_flipped, wrong):
    "Return, for each way of cleaning, the probability of the first response and the weight of each comparison."
    label = np.where(is_flipped, 0.0, 1.0)
    named = wrong > 0.5
    ones = np.ones(len(label))
    return {
        "flipped": (label, ones),
        "left out": (label, 1.0 * ~named),
        "reversed": (np.where(named, 1 - label, label), ones),
        "soft labels": (np.where(is_flipped, wrong, 1 - wrong), ones),
        "labels before": (ones, ones),
    }


def head_accuracy(features, is_held, probability, weight):
    "Return the accuracy on held-out pairs of a head that is trained on the others."
    differences = features[0::2] - features[1::2]
    train = np.flatnonzero(~is_held)
    differences_train = differences[train]
    signs = np.where(np.arange(len(train)) % 2, 1.0, -1.0)
    if hasattr(differences, "tocsr"):
        oriented = differences_train.multiply(signs[:, None]).tocsr()
        both = np.r_[0:len(train), 0:len(train)]
        stacked = oriented[both]
    else:
        oriented = differences_train * signs[:, None]
        stacked = np.concatenate([oriented, oriented])
    labels = np.concatenate([signs, -signs])
    share = probability[train]
    weights = np.concatenate([share * weight[train], (1 - share) * weight[train]])
    model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=300, tol=1e-3)
    model.fit(stacked[weights > 0], labels[weights > 0], sample_weight=weights[weights > 0])
    margins = differences[np.flatnonzero(is_held)] @ model.coef_[0]
    return float((margins > 0).mean())


def train_decoder(base, comparisons, probability, weight, seed):
    "Return the tiny decoder, trained by `RewardTrainer`, and its tokenizer."
    rows = []
    for item, share, own_weight in zip(comparisons, probability, weight):
        row = {"prompt": item.prompt, "response_a": item.responses[0], "response_b": item.responses[1]}
        if own_weight > 0:
            rows.append({**row, "probability_a": float(share), "weight": float(own_weight)})
    torch.manual_seed(seed)
    options = {**RECIPE, "learning_rate": 1e-3, "num_train_epochs": 3, "seed": seed}
    options |= {"eval_strategy": "no", "logging_strategy": "no"}
    dropout = options.pop("dropout")
    model = RewardModel(base, dropout=dropout, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(output_dir=folder, report_to="none", disable_tqdm=True, **options)
        RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    return model, tokenizer


def trained_accuracy(base, comparisons, is_held, probability, weight, seed):
    "Return the accuracy on held-out pairs of the tiny decoder that is trained on the others."
    train = np.flatnonzero(~is_held)
    model, tokenizer = train_decoder(
        base, [comparisons[index] for index in train], probability[train], weight[train], seed
    )
    rewards = Scorer(model, tokenizer).score_comparisons([comparisons[index] for index in np.flatnonzero(is_held)])
    return float(np.mean([chosen > rejected for chosen, rejected in rewards]))


def fold_rewards(base, comparisons, prompts, seed):
    "Return the rewards of all responses, each by a tiny decoder that was trained on two other folds of the prompts."
    rewards = np.zeros(2 * len(comparisons))
    label = np.array([float(item.ranks == (1, 2)) for item in comparisons])
    for others, own in GroupKFold(3).split(prompts, groups=prompts):
        model, tokenizer = train_decoder(
            base, [comparisons[index] for index in others], label[others], np.ones(len(others)), seed
        )
        scored = Scorer(model, tokenizer).score_comparisons([comparisons[index] for index in own])
        rewards[2 * own], rewards[2 * own + 1] = np.array(scored).T
    return rewards


def interval(values):
    "Return the mean over seeds and the 95 % interval of it, by Student's t."
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return f"{values.mean():.3f}" if len(values) else "–"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("file", type=existing_or_synthetic, help="pairs, or synthetic")
    parser.add_argument("--judges", nargs="+", default=["text"], help="text, or models")
    parser.add_argument("--most", type=int, default=4000, help="pairs, chosen at random")
    parser.add_argument("--share", type=float, default=0.2, help="of the labels that is flipped")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--train", action="store_true", help="train the tiny decoder in place of a head")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    all_comparisons = read(options.file, options.most)
    base = tiny_decoder(Path(tempfile.mkdtemp()), synthetic_texts()) if options.train else None
    lines = []
    for name in options.judges:
        comparisons, features = features_of(name, all_comparisons, options.max_length, options.dtype)
        prompts = np.unique([text_key(item.prompt) for item in comparisons], return_inverse=True)[1]
        figures = []
        for seed in range(options.seeds):
            generator = np.random.default_rng(seed)
            labeled, is_flipped = flipped_labels(comparisons, options.share, generator)
            is_held = (generator.random(prompts.max() + 1) < 1 / 3)[prompts]
            train = np.flatnonzero(~is_held)
            of_train = [labeled[index] for index in train]
            if name == "folds":
                rewards = fold_rewards(base, of_train, prompts[train], seed)
                flips = find_flips(of_train, rewards=rewards)
            else:
                responses = np.stack([2 * train, 2 * train + 1], axis=1).ravel()
                flips = find_flips(of_train, features[responses])
            pairs = flips.pairs.sort_values("comparison")
            named = pairs["wrong"].to_numpy() > 0.5
            wrong = np.zeros(len(comparisons))
            wrong[train] = pairs["wrong"]
            flipped = is_flipped[train]
            top = np.argsort(pairs["margin"].to_numpy())[:int(flipped.sum())]
            own = {
                "labels that the margins agree with": flips.report["accuracy"]["value"],
                "estimated rate of wrong labels": flips.report["flips"]["rate"],
                "named": named.mean(),
                "precision": flipped[named].mean() if named.any() else np.nan,
                "recall": flipped[named].sum() / flipped.sum(),
                "precision of the first, as many as are flipped": flipped[top].mean(),
                "AUC": roc_auc_score(flipped, -pairs["margin"]),
            }
            for cleaning, (probability, weight) in targets(is_flipped, wrong).items():
                if options.train and cleaning == "reversed":
                    continue # to save time
                if options.train:
                    accuracy = trained_accuracy(base, comparisons, is_held, probability, weight, seed)
                else:
                    accuracy = head_accuracy(features, is_held, probability, weight)
                own[f"accuracy, {cleaning}"] = accuracy
            figures.append(own)
            print(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in own.items()), flush=True)
        table = pd.DataFrame(figures)
        for cleaning in CLEANINGS[1:]:
            if f"accuracy, {cleaning}" not in table:
                continue
            gain = table[f"accuracy, {cleaning}"] - table["accuracy, flipped"]
            table[f"gain, {cleaning}"] = gain
        lines.append((name, len(comparisons), {column: interval(table[column]) for column in table}))
    print(f"\n| | {' | '.join(f'{name} ({count} pairs)' for name, count, _ in lines)} |")
    print("|---|" + "---|" * len(lines))
    for column in lines[0][2]:
        print(f"| {column} | {' | '.join(values[column] for *_, values in lines)} |")


if __name__ == "__main__":
    main()
