"""
Find what a frozen decoder knows already: heads fitted to the states of each layer, chosen on training prompts alone.

    python benchmarks/generalize_heads.py --model FOLDER --train TRAIN.jsonl --output FOLDER [--layers 12 16 20 24 30]

The states of all texts are computed once and kept in the output folder: of the last token, and the mean over the tokens
after the shared prefix. A head minimizes the Bradley-Terry loss on differences of states that are divided by their root
mean square, with a ridge. "balanced" weighs pairs whose better response is longer as much as the others, together. Each
line has the length-controlled accuracy on prompts that were left out (five folds), and on the two largest sources when
they were left out whole; the mean of the three is what a method is chosen by.

The library's `head_start.fit_head` fits the head of one model, to what that model pools of its last layer, and
`length_balance` weighs comparisons. Here one pass gives the states of all layers in two poolings, and pairs are weighed
by themselves.
"""
import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from generalize_data import read_rows
from generalize_table import correct
from paths import existing_path

from rlhf_reward.comparison import ranked_pairs, shared_length

RIDGES = (0.3, 1.0, 3.0)
FOLDS = 5


def state_parser(description, output_help):
    "Return a parser with the arguments of a program that fits heads to the states of training comparisons."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained decoder with a chat template")
    parser.add_argument("--train", type=existing_path, required=True, help="JSON Lines of comparisons")
    parser.add_argument("--output", type=Path, required=True, help=output_help)
    parser.add_argument("--max_characters", type=int, default=1000, help="of a prompt with its longest response")
    return parser


def fold_of(prompt):
    "Return the number of the fold of a prompt."
    return zlib.crc32(prompt.encode()) % FOLDS


def largest_sources(sources):
    "Return the names of the two sources with most pairs."
    names, counts = np.unique(sources, return_counts=True)
    return names[np.argsort(-counts)[:2]]


def sequences_of(row, tokenizer):
    "Return the token ids of each response of a row with its prompt, without a line break at the end."
    sequences = []
    for response in row["responses"]:
        text = tokenizer.apply_chat_template(row["prompt"] + response, tokenize=False).rstrip("\n")
        sequences.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return sequences


@torch.no_grad()
def states_of(rows, model_name, batch_size=16):
    "Return, for each text in order, the states of the last token and their means, (num_texts, num_layers + 1, width)."
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_name)
    model = transformers.AutoModel.from_pretrained(model_name, dtype=torch.bfloat16).eval()
    texts = []
    for row in rows:
        sequences = sequences_of(row, tokenizer)
        prefix = shared_length(sequences)
        texts += [(ids, min(prefix, len(ids) - 1)) for ids in sequences]
    last = [None] * len(texts)
    mean = [None] * len(texts)
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index][0]))
    for start in range(0, len(texts), batch_size):
        batch = by_length[start:start + batch_size]
        ids = [torch.tensor(texts[index][0]) for index in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
        outputs = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        states = torch.stack(outputs.hidden_states) # (num_layers + 1, batch_size, seq_len, width)
        for number, index in enumerate(batch):
            end = len(ids[number])
            last[index] = states[:, number, end - 1].half()
            mean[index] = states[:, number, texts[index][1]:end].float().mean(dim=1).half()
    lengths = [len(ids) - prefix for ids, prefix in texts]
    return {"last": torch.stack(last), "mean": torch.stack(mean), "lengths": lengths}


def pairs_of(rows, lengths):
    "Return winner and loser of each pair as numbers of texts, how much longer the winner is, its prompt and source."
    pairs = []
    first = 0
    for row in rows:
        for winner, loser in ranked_pairs(row["ranks"]):
            longer_by = lengths[first + winner] - lengths[first + loser]
            pairs.append((first + winner, first + loser, longer_by, row["key"], row["source"]))
        first += len(row["responses"])
    return [np.array(column) for column in zip(*pairs)]


def balanced_weights(longer_by):
    "Return weights under which the longer response wins half of the time."
    weights = np.ones(len(longer_by))
    for is_kind in (longer_by > 0, longer_by < 0):
        weights[is_kind] = 0.5 / is_kind.sum()
    weights[longer_by == 0] = 1 / len(longer_by)
    return weights


def fit(differences, weights, ridge):
    "Return the head (width,) with the lowest weighted mean loss and ridge penalty."
    features = differences.double()
    weights = torch.tensor(weights / weights.sum())
    head = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = (F.softplus(-(features @ head)) * weights).sum() + ridge / 2 * head.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    return head.detach()


def length_controlled(right, longer_by):
    return float(np.mean([right[longer_by > 0].mean(), right[longer_by < 0].mean()]))


def left_out(features, longer_by, groups, is_balanced, ridge):
    "Return what is right of each pair by a head that was fitted to the other groups; NaN without a group."
    right = np.full(len(longer_by), np.nan)
    for group in np.unique(groups[groups >= 0]):
        others = groups != group
        weights = balanced_weights(longer_by[others]) if is_balanced else np.ones(others.sum())
        head = fit(features[others], weights, ridge)
        right[~others] = correct((features[~others].double() @ head).numpy())
    return right


def main():
    parser = state_parser(__doc__, "folder of the states")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 16, 20, 24, 30])
    arguments = parser.parse_args()
    rows = read_rows(arguments.train, arguments.max_characters)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "states.pt"
    if not file.exists():
        torch.save(states_of(rows, arguments.model), file)
    states = torch.load(file)
    winner, loser, longer_by, prompts, sources = pairs_of(rows, states["lengths"])
    folds = np.array(list(map(fold_of, prompts)))
    largest = largest_sources(sources)
    print(f"| weights | states | layer | ridge | prompts left out | {' | '.join(largest)} left out | mean |")
    print("|---|---|---|---|---|---|---|---|")
    for is_balanced in (False, True):
        for pooling in ("last", "mean"):
            for layer in arguments.layers:
                own = states[pooling][:, layer].float()
                differences = own[winner] - own[loser]
                features = differences / (differences.square().mean(dim=0).sqrt() + 1e-6)
                for ridge in RIDGES:
                    right = left_out(features, longer_by, folds, is_balanced, ridge)
                    values = [length_controlled(right, longer_by)]
                    for source in largest:
                        groups = np.where(sources == source, 0, -1)
                        right = left_out(features, longer_by, groups, is_balanced, ridge)
                        is_source = sources == source
                        values.append(length_controlled(right[is_source], longer_by[is_source]))
                    cells = [f"{value:.3f}" for value in [*values, np.mean(values)]]
                    weights = "balanced" if is_balanced else "equal"
                    print(f"| {weights} | {pooling} | {layer} | {ridge} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
