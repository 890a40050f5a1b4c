"""
Training and scoring beside TRL, transformers and sentence-transformers, on the same model, data and batches.

    pip install 'rlhf_reward[benchmarks]'
    python benchmarks/against_trl.py [--data hh=HH_LENGTHS.json] [--data pairs=PAIRS.jsonl] [--data ranked=RANKED.jsonl] [--score]

Each measurement is `trainer.train()` from the first batch to the last step, every side from the same weights, in turn, several
rounds; given are medians, and ratios round by round. The losses of all steps are printed for each side that keeps the batch:
they must agree, or the sides did not do the same work. TRL runs as it comes (gradient checkpointing), without checkpointing
(its best settings that keep the batch), and with length grouping (other batches, so another loss).

- `hh`: a JSON list of [prompt, chosen, rejected] lengths; the tokens are random.
- `pairs`: `prompt`, `chosen`, `rejected`; `ranked`: `prompt`, `responses`, `scores`, of which TRL gets all pairs. Both are tokenized
  with a byte-level BPE trained on the texts.

Unique tokens count a shared prefix once and no padding. FLOP/s on unique tokens counts six per parameter of the layers and token,
and 12 per layer, width and visible pair of positions; the rate of the machine is that of a float32 matrix product.
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

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, load_rows, tokenize_rows
from rlhf_reward.data import ranked_pairs
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.packing import by_comparison, choose_collator, model_inputs, pad_comparisons
from rlhf_reward.synthetic import tiny_decoder
from rlhf_reward.tokens import FEATURES, whole_sequences

VOCAB = 8192
OWN = "rlhf_reward, packed"
MEMORY = { # glibc's settings by which memory stays with the process: else page faults take up to half of the padded sides' time
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 40), "MALLOC_TOP_PAD_": str(2 ** 29)}


def comparison(prefix, rests):
    return {"shared_prefix": prefix, "rests": rests, "ranks": [1, 2], "margins": [0.0], "ratings": None, "weight": 1.0, "length": len(prefix) + max(map(len, rests)),
            "source": None, "prompt_key": 0, "row": 0}


def read(kind, path, tokenizer_texts, seed=0):
    "Comparisons of random tokens, or rows whose texts are added to those that the tokenizer is trained on."
    draw = random.Random(seed)
    if kind == "hh":
        tokens = lambda number: draw.choices(range(4, VOCAB), k=number)
        return [comparison(tokens(prompt), [[2, *tokens(chosen - 1)], [3, *tokens(rejected - 1)]]) # 2 and 3, so that they part at once
                for prompt, chosen, rejected in json.loads(Path(path).read_text())]
    rows = load_rows(path)
    for row in rows:
        tokenizer_texts += [row["prompt"], *(row["responses"] if kind == "ranked" else (row["chosen"], row["rejected"]))]
    return rows


def tokenizer_and_model(folder, texts, width, layers):
    tiny_decoder(folder, texts or ["words"], vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
                 num_attention_heads=width // 64, max_position_embeddings=4096, initializer_range=0.02)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    model = RewardModel(folder, 0.0, "cpu")
    model.backbone.resize_token_embeddings(VOCAB)
    model.save_pretrained(folder, tokenizer)
    return tokenizer


def ours(folder, examples, tokenizer, batch, **options):
    model = RewardModel.from_pretrained(folder, dropout=0.0, device="cpu")
    for module in model.modules(): # as TRL does
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = RewardConfig(str(folder / "ours"), per_device_train_batch_size=batch, **{"layout": "packed", **options})
    return RewardTrainer(model, args, Dataset.from_list(examples, features=FEATURES), processing_class=tokenizer)


def theirs(folder, examples, tokenizer, batch, checkpointing=False, grouped=False, **options):
    import trl

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    pairs = [{"chosen_ids": ids[winner], "rejected_ids": ids[loser], "length": max(len(ids[winner]), len(ids[loser]))}
             for example in examples for ids in [whole_sequences(example)] for winner, loser in ranked_pairs(example["ranks"])]
    per_comparison = len(pairs) // len(examples)
    options = {**options, "train_sampling_strategy": "group_by_length", "remove_unused_columns": False} if grouped else options
    args = trl.RewardConfig(str(folder / "theirs"), per_device_train_batch_size=batch * per_comparison, max_length=None,
                            gradient_checkpointing=checkpointing, **options)
    return trl.RewardTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


def train(make, steps):
    trainer = make(max_steps=steps, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
                   learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0, bf16=False, train_sampling_strategy="sequential")
    transformers.trainer_callback.PrinterCallback.on_log = lambda *args, **kwargs: None
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def matrix_product_rate(size=2048):
    "FLOP/s, the best of several."
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(times)


def times_as_long(spent, own):
    ratios = [theirs / ours for theirs, ours in zip(spent, own)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def work(examples, config):
    "Unique tokens, and FLOPs of forward and backward on them."
    tokens = visible = 0
    for example in examples:
        prefix, rests = len(example["shared_prefix"]), list(map(len, example["rests"]))
        tokens += prefix + sum(rests)
        visible += prefix * (prefix + 1) // 2 + sum(rest * prefix + rest * (rest + 1) // 2 for rest in rests)
    layer = 4 * config.hidden_size ** 2 + 3 * config.hidden_size * config.intermediate_size
    return tokens, config.num_hidden_layers * (6 * layer * tokens + 12 * config.hidden_size * visible)


def train_table(name, examples, folder, tokenizer, batch, steps, rounds):
    used = examples[:batch * steps]
    padded = sum(pad_comparisons(used[i:i + batch])["input_ids"].numel() for i in range(0, len(used), batch))
    model = RewardModel.from_pretrained(folder, device="cpu")
    collator, _ = choose_collator(model, used[:batch])
    computed = sum(collator(used[i:i + batch])["input_ids"].numel() for i in range(0, len(used), batch))
    unique, flops = work(used, model.config)
    pairs = sum(len(ranked_pairs(example["ranks"])) for example in used)

    own, other = (partial(side, folder, used, tokenizer, batch) for side in (ours, theirs))
    sides = {OWN: own, "TRL, no checkpointing": other, "TRL, grouped by length": partial(other, grouped=True), "TRL as it comes": partial(other, checkpointing=True)}
    seconds, losses = {side: [] for side in sides}, {}
    train(own, 1) # warm up
    rates = [matrix_product_rate()]
    for _ in range(rounds):
        for side, make in sides.items():
            spent, losses[side] = train(make, steps)
            seconds[side].append(spent)
        rates.append(matrix_product_rate())
    print(f"\n### {name}: {len(used)} comparisons, {pairs} pairs, {steps} steps of {batch} comparisons, {rounds} rounds\n")
    print("| side | seconds (median) | pairs a second | times as long as rlhf_reward (median, least to most) | losses of the steps |\n|---|---|---|---|---|")
    for side, spent in seconds.items():
        print(f"| {side} | {statistics.median(spent):.2f} | {pairs / statistics.median(spent):.1f} | {times_as_long(spent, seconds[OWN])} | {' '.join(f'{loss:.4f}' for loss in losses[side])} |")
    rate, spent = statistics.median(rates), statistics.median(seconds[OWN])
    print(f"\nTokens computed ÷ unique: {computed / unique:.3f} packed, {padded / unique:.2f} with one padded row for each response. "
          f"FLOP/s on unique tokens: {flops / spent / 1e9:.1f} G of {rate / 1e9:.1f} G ({flops / spent / rate:.2f}).", flush=True)


def peak_table(examples, texts, batch=16, steps=6):
    "Forward and backward alone, without trainer and optimizer: how near to the machine's matrix products, by the width of the model."
    print(f"\n### Forward and backward of {batch} comparisons, median of {steps} steps\n")
    print("| width, layers | parameters | unique tokens a second | share of the matrix-product rate |\n|---|---|---|---|")
    for width, layers in ((512, 4), (1024, 4), (2048, 2)):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer_and_model(folder, texts, width, layers)
            model = RewardModel.from_pretrained(folder, dropout=0.0, device="cpu")
        collator, _ = choose_collator(model, examples[:batch])
        model.train()
        speeds, shares = [], []
        for step in range(-2, steps): # two to warm up
            used = examples[step % 8 * batch:(step % 8 + 1) * batch]
            start = time.perf_counter()
            made = collator(used)
            rewards = by_comparison(model(**model_inputs(made, model)), made["ranks"])
            BradleyTerry()(rewards, made["ranks"], made["margins"]).mean().backward()
            spent = time.perf_counter() - start
            model.zero_grad(set_to_none=False)
            tokens, flops = work(used, model.config)
            speeds.append(tokens / spent)
            shares.append(flops / spent / matrix_product_rate())
        million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"| {width}, {layers} | {million:.0f} M | {statistics.median(speeds[2:]):.0f} | {statistics.median(shares[2:]):.2f} |", flush=True)


def score_table(folder, tokenizer, rounds, prompt_length=1000, response_length=100, n=16):
    from sentence_transformers import CrossEncoder

    draw = random.Random(0)
    words = [tokenizer.decode([draw.randrange(260, len(tokenizer))]) for _ in range(4000)]
    def text(length):
        ids = tokenizer(" ".join(draw.choices(words, k=2 * length)))["input_ids"][:length]
        return tokenizer.decode(ids)
    prompt, responses = text(prompt_length), [" " + text(response_length) for _ in range(n)]
    rows = Dataset.from_list([{"prompt": prompt, "responses": responses, "scores": list(range(n))}])
    example, = tokenize_rows(rows, tokenizer, 100_000)
    model = RewardModel.from_pretrained(folder, device="cpu")
    collator, _ = choose_collator(model, [example])
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    saved = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    cross = CrossEncoder(str(folder), device="cpu", max_length=4096, activation_fn=torch.nn.Identity())

    @torch.no_grad()
    def packed():
        return model(**model_inputs(collator([example]), model)).flatten().tolist()

    @torch.no_grad()
    def padded():
        inputs = pad_comparisons([example])
        return classifier(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.flatten().tolist()

    def cross_encoder():
        return cross.predict([(prompt, response + saved.eos_token) for response in responses], batch_size=n, show_progress_bar=False).tolist()

    sides = {OWN: packed, "AutoModelForSequenceClassification, one padded batch": padded, "CrossEncoder.predict": cross_encoder}
    seconds, rewards = {side: [] for side in sides}, {}
    for round in range(rounds + 1):
        for side, score in sides.items():
            start = time.perf_counter()
            rewards[side] = score()
            if round:
                seconds[side].append(time.perf_counter() - start)
    print(f"\n### Best of {n}: a prompt of {len(example['shared_prefix'])} tokens, responses of about {response_length}, {rounds} rounds\n")
    print("| side | seconds (median) | times as long as rlhf_reward (median, least to most) | first rewards |\n|---|---|---|---|")
    for side, spent in seconds.items():
        print(f"| {side} | {statistics.median(spent):.3f} | {times_as_long(spent, seconds[OWN])} | "
              f"{' '.join(f'{reward:.5f}' for reward in rewards[side][:4])} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], metavar="KIND=FILE", help="hh=, pairs= or ranked=, as often as expected")
    parser.add_argument("--score", action="store_true", help="best of 16 too")
    parser.add_argument("--peak", action="store_true", help="forward and backward on the hh lengths at three widths too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=1024)
    options = parser.parse_args()
    data = [item.split("=", 1) for item in options.data]
    texts = []
    sets = {kind: read(kind, path, texts) for kind, path in data}
    import trl

    print(f"Python {platform.python_version()}, torch {torch.__version__} ({torch.get_num_threads()} threads), transformers {transformers.__version__}, "
          f"trl {trl.__version__}, {platform.machine()}; llama of {options.layers} layers, width {options.width}, float32")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_and_model(Path(folder) / "model", texts or [f" word{n}" for n in range(5000)], options.width, options.layers)
        folder = Path(folder) / "model"
        for kind, examples in sets.items():
            if kind != "hh":
                examples = list(tokenize_rows(examples, tokenizer, options.max_length, name=kind))
            draw = random.Random(0)
            if kind == "ranked": # TRL's batches are of a fixed number of pairs, so all comparisons have all of them
                examples = [example for example in examples if len(ranked_pairs(example["ranks"])) == 6]
            draw.shuffle(examples)
            train_table(kind, examples, folder, tokenizer, 4 if kind == "ranked" else 16, options.steps, options.rounds)
            if kind == "hh" and options.peak:
                peak_table(examples, texts or [f" word{n}" for n in range(5000)])
        if options.score:
            score_table(folder, tokenizer, max(5, options.rounds))


if __name__ == "__main__":
    if not MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
    main()
