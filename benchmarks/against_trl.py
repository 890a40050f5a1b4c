"""
Training and scoring compared with TRL, transformers and sentence-transformers, on the same model, data and batches.

    pip install 'rlhf_reward[benchmarks]'
    python benchmarks/against_trl.py [--data hh=HH_LENGTHS.json] [--data pairs=PAIRS.jsonl]
        [--data ranked=RANKED.jsonl] [--score]

Each measurement is `trainer.train()` from the first batch to the last step, every side from the same weights, in turn,
several rounds; reported are medians, and ratios round by round. The losses of all steps are printed for each side that
keeps the batch: they must agree, or the sides did not do the same work. TRL runs with its defaults ("as it comes", with
gradient checkpointing), without checkpointing (its best settings that keep the batch), and with length grouping (other
batches, so another loss).

- `hh`: a JSON list of [prompt, chosen, rejected] lengths; the tokens are random.
- `pairs`: `prompt`, `chosen`, `rejected`; `ranked`: `prompt`, `responses`, `scores`, of which TRL gets all pairs. Both
  are tokenized with a byte-level BPE trained on the texts.

Unique tokens count a shared prefix once and no padding. FLOP/s on unique tokens counts six per parameter of the layers
and token, and 12 per layer, width and visible pair of positions; the rate of the machine is that of a float32 matrix
product.
"""
import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from paths import kind_and_file
from sides import MEMORY, VOCAB, ours, print_nothing, theirs, tokenizer_and_model

from rlhf_reward import RewardModel, load_rows, tokenize_rows
from rlhf_reward.comparison import ranked_pairs
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.packing import by_comparison, choose_layout, model_inputs, pad_comparisons
from rlhf_reward.tokens import tokenized_comparison

OWN = "rlhf_reward, packed"


def read_lengths(path, seed=0):
    "Return comparisons of random tokens that have the lengths of the file."
    draw = random.Random(seed)

    def tokens(number):
        return draw.choices(range(4, VOCAB), k=number)

    comparisons = []
    for prompt_length, chosen_length, rejected_length in json.loads(Path(path).read_text()):
        prompt = tokens(prompt_length)
        chosen = [2, *tokens(chosen_length - 1)] # 2 and 3, so that they differ from the first token
        rejected = [3, *tokens(rejected_length - 1)]
        comparisons.append(tokenized_comparison(prompt, [chosen, rejected], ranks=[1, 2], margins=[0.0]))
    return comparisons


def texts_of(kind, rows):
    "Return all prompts and responses of the rows, for the training of the tokenizer."
    texts = []
    for row in rows:
        responses = row["responses"] if kind == "ranked" else (row["chosen"], row["rejected"])
        texts += [row["prompt"], *responses]
    return texts


# ----- training

def train(make, steps):
    "Return the seconds of training, and the loss of each step."
    trainer = make(
        max_steps=steps,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=False,
        train_sampling_strategy="sequential",
    )
    transformers.trainer_callback.PrinterCallback.on_log = print_nothing
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds, losses


def matrix_product_rate(size=2048):
    "Return the FLOP/s of a matrix product, the best of several."
    a = torch.randn(size, size)
    b = torch.randn(size, size)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def times_as_long(spent, own):
    "Compare the seconds of two sides round by round: median, least and most of the ratios."
    ratios = [theirs / ours for theirs, ours in zip(spent, own)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def work(examples, config):
    "Return the unique tokens, and the FLOPs of forward and backward on them."
    tokens = 0
    visible = 0 # pairs of positions
    for example in examples:
        prefix = len(example["shared_prefix"])
        rests = [len(rest) for rest in example["rests"]]
        tokens += prefix + sum(rests)
        visible += prefix * (prefix + 1) // 2
        for rest in rests:
            visible += rest * prefix + rest * (rest + 1) // 2
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    flops = config.num_hidden_layers * (6 * layer * tokens + 12 * config.hidden_size * visible)
    return tokens, flops


def count_computed(collator, examples, batch):
    "Count the tokens of all batches of a collator, padding included."
    count = 0
    for start in range(0, len(examples), batch):
        count += collator(examples[start : start + batch])["input_ids"].numel()
    return count


def measure_sides(sides, steps, rounds):
    "Train each side in turn. Return the seconds and losses of the sides, and the machine's rates in between."
    seconds = {side: [] for side in sides}
    losses = {}
    train(sides[OWN], 1) # warm up
    rates = [matrix_product_rate()]
    for _ in range(rounds):
        for side, make in sides.items():
            spent, losses[side] = train(make, steps)
            seconds[side].append(spent)
        rates.append(matrix_product_rate())
    return seconds, losses, rates


def train_table(name, examples, folder, tokenizer, batch, steps, rounds):
    "Print how long each side trains."
    used = examples[: batch * steps]
    padded = count_computed(pad_comparisons, used, batch)
    model = RewardModel.from_pretrained(folder, device="cpu")
    layout = choose_layout(model, used[:batch])
    layout.apply_to(model)
    collator = layout.collator
    computed = count_computed(collator, used, batch)
    unique, flops = work(used, model.config)
    pairs = sum(len(ranked_pairs(example["ranks"])) for example in used)

    other = partial(theirs, folder, used, tokenizer, batch)
    sides = {
        OWN: partial(ours, folder, used, tokenizer, batch),
        "TRL, no checkpointing": other,
        "TRL, grouped by length": partial(other, grouped=True),
        "TRL as it comes": partial(other, checkpointing=True),
    }
    seconds, losses, rates = measure_sides(sides, steps, rounds)
    print(
        f"\n### {name}: {len(used)} comparisons, {pairs} pairs, "
        f"{steps} steps of {batch} comparisons, {rounds} rounds\n"
    )
    print(
        "| side | seconds (median) | pairs a second | times as long as rlhf_reward (median, least to most) "
        "| losses of the steps |\n|---|---|---|---|---|"
    )
    for side, spent in seconds.items():
        median = statistics.median(spent)
        ratios = times_as_long(spent, seconds[OWN])
        shown_losses = " ".join(f"{loss:.4f}" for loss in losses[side])
        print(f"| {side} | {median:.2f} | {pairs / median:.1f} | {ratios} | {shown_losses} |")
    rate = statistics.median(rates)
    spent = statistics.median(seconds[OWN])
    print(
        f"\nTokens computed ÷ unique: {computed / unique:.3f} packed, "
        f"{padded / unique:.2f} with one padded row for each response. "
        f"FLOP/s on unique tokens: {flops / spent / 1e9:.1f} G of {rate / 1e9:.1f} G ({flops / spent / rate:.2f}).",
        flush=True,
    )


# ----- forward and backward alone

def peak_table(examples, texts, batch=16, steps=6):
    "Print how close forward and backward come to the machine's matrix products, by the width of the model."
    print(f"\n### Forward and backward of {batch} comparisons, median of {steps} steps\n")
    print(
        "| width, layers | parameters | unique tokens a second | share of the matrix-product rate |\n"
        "|---|---|---|---|"
    )
    for width, layers in ((512, 4), (1024, 4), (2048, 2)):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer_and_model(folder, texts, width, layers)
            model = RewardModel.from_pretrained(folder, dropout=0.0, device="cpu")
        speeds, shares = peak_of(model, examples, batch, steps)
        million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"| {width}, {layers} | {million:.0f} M | {speeds:.0f} | {shares:.2f} |", flush=True)


def peak_of(model, examples, batch, steps):
    "Return the median tokens a second of one model, and their share of the matrix-product rate."
    layout = choose_layout(model, examples[:batch])
    layout.apply_to(model)
    collator = layout.collator
    model.train()
    speeds = []
    shares = []
    for step in range(-2, steps): # two to warm up
        start_index = step % 8 * batch
        used = examples[start_index : start_index + batch]
        start = time.perf_counter()
        inputs = collator(used)
        rewards = by_comparison(model(**model_inputs(inputs, model)), inputs["ranks"])
        BradleyTerry()(rewards, inputs["ranks"], inputs["margins"]).mean().backward()
        spent = time.perf_counter() - start
        model.zero_grad(set_to_none=False)
        tokens, flops = work(used, model.config)
        speeds.append(tokens / spent)
        shares.append(flops / spent / matrix_product_rate())
    return statistics.median(speeds[2:]), statistics.median(shares[2:])


# ----- scoring

def random_texts(tokenizer, lengths):
    "Return texts of random words that have these lengths in tokens."
    draw = random.Random(0)
    words = [tokenizer.decode([draw.randrange(260, len(tokenizer))]) for _ in range(4000)]
    texts = []
    for length in lengths:
        text = " ".join(draw.choices(words, k=2 * length))
        texts.append(tokenizer.decode(tokenizer(text)["input_ids"][:length]))
    return texts


def scoring_sides(folder, tokenizer, prompt, responses):
    "Return the example that is scored, and a function of each side that returns its rewards."
    from sentence_transformers import CrossEncoder

    count = len(responses)
    row = {"prompt": prompt, "responses": responses, "scores": list(range(count))}
    (example,) = tokenize_rows(Dataset.from_list([row]), tokenizer, 100_000)
    model = RewardModel.from_pretrained(folder, device="cpu")
    layout = choose_layout(model, [example])
    layout.apply_to(model)
    collator = layout.collator
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    classifier.eval()
    saved = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    identity = torch.nn.Identity()
    cross = CrossEncoder(str(folder), device="cpu", max_length=4096, activation_fn=identity)

    @torch.no_grad()
    def packed():
        return model(**model_inputs(collator([example]), model)).flatten().tolist()

    @torch.no_grad()
    def padded():
        inputs = pad_comparisons([example])
        output = classifier(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return output.logits.flatten().tolist()

    def cross_encoder():
        pairs = [(prompt, response + saved.eos_token) for response in responses]
        return cross.predict(pairs, batch_size=count, show_progress_bar=False).tolist()

    sides = {
        OWN: packed,
        "AutoModelForSequenceClassification, one padded batch": padded,
        "CrossEncoder.predict": cross_encoder,
    }
    return example, sides


def score_table(folder, tokenizer, rounds, prompt_length=1000, response_length=100, n=16):
    "Print how long each side scores the responses to one prompt."
    prompt, *responses = random_texts(tokenizer, [prompt_length, *[response_length] * n])
    responses = [" " + response for response in responses]
    example, sides = scoring_sides(folder, tokenizer, prompt, responses)
    seconds = {side: [] for side in sides}
    rewards = {}
    for round in range(rounds + 1):
        for side, score in sides.items():
            start = time.perf_counter()
            rewards[side] = score()
            if round > 0: # the first one warms up
                seconds[side].append(time.perf_counter() - start)
    print(
        f"\n### Best of {n}: a prompt of {len(example['shared_prefix'])} tokens, "
        f"responses of about {response_length}, {rounds} rounds\n"
    )
    print(
        "| side | seconds (median) | times as long as rlhf_reward (median, least to most) | first rewards |\n"
        "|---|---|---|---|"
    )
    for side, spent in seconds.items():
        ratios = times_as_long(spent, seconds[OWN])
        first = " ".join(f"{reward:.5f}" for reward in rewards[side][:4])
        print(f"| {side} | {statistics.median(spent):.3f} | {ratios} | {first} |", flush=True)


# ----- command line

def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=kind_and_file,
        metavar="KIND=FILE",
        help="hh=, pairs= or ranked=; may be repeated",
    )
    parser.add_argument("--score", action="store_true", help="best of 16 too")
    parser.add_argument(
        "--peak",
        action="store_true",
        help="forward and backward on the hh lengths at three widths too",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=1024)
    return parser.parse_args()


def prepare(kind, data, tokenizer, max_length):
    "Return the comparisons of a data set in their order of training."
    if kind == "hh":
        examples = data
    else:
        examples = list(tokenize_rows(data, tokenizer, max_length, name=kind))
    if kind == "ranked": # TRL's batches hold a fixed number of pairs, so all comparisons have all of them
        examples = [example for example in examples if len(ranked_pairs(example["ranks"])) == 6]
    random.Random(0).shuffle(examples)
    return examples


def main():
    options = parse_arguments()
    data = {}
    texts = []
    for kind, path in options.data:
        if kind == "hh":
            data[kind] = read_lengths(path)
        else:
            data[kind] = load_rows(path)
            texts += texts_of(kind, data[kind])
    texts = texts or [f" word{n}" for n in range(5000)]
    import trl

    print(
        f"Python {platform.python_version()}, torch {torch.__version__} ({torch.get_num_threads()} threads), "
        f"transformers {transformers.__version__}, trl {trl.__version__}, {platform.machine()}; "
        f"llama of {options.layers} layers, width {options.width}, float32"
    )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        tokenizer = tokenizer_and_model(folder, texts, options.width, options.layers)
        for kind, read in data.items():
            examples = prepare(kind, read, tokenizer, options.max_length)
            batch = 4 if kind == "ranked" else 16
            train_table(kind, examples, folder, tokenizer, batch, options.steps, options.rounds)
            if kind == "hh" and options.peak:
                peak_table(examples, texts)
        if options.score:
            score_table(folder, tokenizer, max(5, options.rounds))


if __name__ == "__main__":
    if not MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
    main()
