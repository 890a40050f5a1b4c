"""
Branched batches next to padded ones, in training of tiny hybrids, on comparisons with the lengths of HH-RLHF.

    python benchmarks/branched_hybrids.py HH_LENGTHS.json [--steps 6] [--rounds 5] [--profile]

Each comparison has a prompt of at least 200 tokens and four responses; the tokens are random. A step is forward, loss
and backward of a batch. The two layouts take turns on the same batches, with the same weights, and what is reported are
medians, and the ratio of each round. The losses are printed for both: they must agree. `padded, by length` is what a
batch costs at best without branching: each response a row, in calls of rows of similar length.

With `--profile`, the operations that take most of the time of a branched step, and the share of the recurrence in the
forward pass. The kernels of `flash-linear-attention` and `mamba-ssm` are for GPUs; without them transformers computes
the recurrence in plain torch, with a loop over chunks of the sequence.
"""
import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from paths import existing
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_reward import RewardModel
from rlhf_reward.branching import branch_comparisons
from rlhf_reward.comparison import ranked_pairs
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.packing import by_comparison, choose_layout, model_inputs, pad_comparisons
from rlhf_reward.tokens import tokenized_comparison, whole_sequences

VOCAB = 8192
SIZE = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    pad_token_id=0,
)
FAMILIES = {
    "qwen3_5_text": dict(
        **SIZE,
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    ),
    "falcon_h1": dict(
        **SIZE,
        mamba_d_ssm=128,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=64,
    ),
}
# where the recurrences of the two families are computed, in transformers' own code
RECURRENCES = ("torch_chunk_gated_delta_rule", "mamba2_chunk_scan")


def read_examples(path, count, shortest_prompt=200, num_responses=4):
    "Return comparisons of random tokens with long prompts and lengths from the file."
    lengths = json.loads(Path(path).read_text())
    prompts = [prompt for prompt, *_ in lengths if prompt >= shortest_prompt]
    responses = []
    for _, *of_comparison in lengths:
        responses += of_comparison
    draw = random.Random(0)

    def tokens(number):
        return draw.choices(range(4, VOCAB), k=number)

    examples = []
    for _ in range(count):
        rests = [tokens(draw.choice(responses)) for _ in range(num_responses)]
        prompt = tokens(draw.choice(prompts))
        ranks = list(range(1, num_responses + 1))
        margins = [0.0] * len(ranked_pairs(ranks))
        examples.append(tokenized_comparison(prompt, rests, ranks=ranks, margins=margins))
    return examples


def open_model(family):
    "Return a reward model of the family with random weights."
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).save_pretrained(folder)
        return RewardModel(folder, dropout=0.0, device="cpu").train()


def rows_by_length(examples):
    "Write each response with its prompt, in calls of rows of similar length: branched, but without shared prefixes."
    apart = [{**example, "shared_prefix": [], "rests": whole_sequences(example)} for example in examples]
    return branch_comparisons(apart)


def step(model, collator, examples):
    "Run forward and backward. Return the seconds, the loss and the number of tokens that were computed."
    start = time.perf_counter()
    batch = collator(examples)
    rewards = by_comparison(model(**model_inputs(batch, model)), batch["ranks"])
    loss = BradleyTerry()(rewards, batch["ranks"], batch["margins"], batch["ratings"]).mean()
    loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=False)
    return seconds, loss.item(), batch["input_ids"].numel()


def measure(model, sides, batches, rounds):
    "Return the seconds of each round, the losses and the number of computed tokens of each side."
    seconds = {side: [] for side in sides}
    losses, computed = {}, {}
    for number in range(rounds + 1):
        for side, collator in sides.items():
            results = [step(model, collator, batch) for batch in batches]
            spent, losses[side], tokens = zip(*results)
            computed[side] = sum(tokens)
            if number > 0: # the first one warms up
                seconds[side].append(sum(spent))
    return seconds, losses, computed


def print_table(family, batches, rounds):
    "Print how long each side takes for the batches."
    model = open_model(family)
    layout = choose_layout(model, batches[0])
    assert layout.collator.func is branch_comparisons, layout.difference
    sides = {"branched": layout.collator, "padded": pad_comparisons, "padded, by length": rows_by_length}
    seconds, losses, computed = measure(model, sides, batches, rounds)
    unique = 0
    for batch in batches:
        for example in batch:
            unique += len(example["shared_prefix"]) + sum(map(len, example["rests"]))
    count = len(batches[0])
    print(f"\n### {family}: {len(batches)} steps of {count} comparisons, {unique} unique tokens, {rounds} rounds\n")
    print(
        "| side | tokens computed ÷ unique | seconds (median) | times as long as branched (median, least to most) "
        "| losses |\n|---|---|---|---|---|"
    )
    for side, spent in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(spent, seconds["branched"])]
        shown = " ".join(f"{loss:.4f}" for loss in losses[side])
        print(
            f"| {side} | {computed[side] / unique:.3f} | {statistics.median(spent):.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {shown} |",
            flush=True,
        )
    return model, layout.collator


def share_of_recurrence(model, collator, examples):
    "Return the seconds of a forward pass that are spent in the recurrence, and all of them."
    module = __import__(type(model.backbone).__module__, fromlist=["recurrence"])
    spent = []
    originals = {name: getattr(module, name) for name in RECURRENCES if hasattr(module, name)}

    def timed(function, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    for name, function in originals.items():
        setattr(module, name, partial(timed, function))
    try:
        batch = collator(examples)
        start = time.perf_counter()
        with torch.no_grad():
            model(**model_inputs(batch, model))
        return sum(spent), time.perf_counter() - start
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def print_profile(model, collator, examples):
    "Print the operations that take most of a branched step, and the share of the recurrence in a forward pass."
    for name, made in (("branched", collator), ("padded", pad_comparisons)):
        recurrence, total = share_of_recurrence(model, made, examples)
        print(f"\nRecurrence in the forward pass, {name}: {recurrence:.2f} of {total:.2f} s ({recurrence / total:.0%})")
    with torch.profiler.profile() as profile:
        step(model, collator, examples)
    table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=40)
    print(f"\n```\n{table}\n```")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lengths", type=existing, help="the JSON file of hh_lengths.py")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="comparisons of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="by default both")
    parser.add_argument("--profile", action="store_true", help="what a step spends its time on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, "
          f"{platform.machine()}")
    examples = read_examples(options.lengths, options.steps * options.batch)
    batches = [examples[start:start + options.batch] for start in range(0, len(examples), options.batch)]
    for family in options.family or FAMILIES:
        model, collator = print_table(family, batches, options.rounds)
        if options.profile:
            print_profile(model, collator, batches[0])


if __name__ == "__main__":
    main()
