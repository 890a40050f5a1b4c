"""
Packed rows on a GPU: training, best of N and exactness of each kernel, in one table, within minutes.

    python benchmarks/gpu.py [--minutes 8] [--output table.md]
    python benchmarks/gpu.py --smoke

Nothing is downloaded: the models are shaped like Qwen3-0.6B and Qwen3-4B, built from configs with random weights in
bf16, and the tokens are random. `--smoke` runs all of it at toy size, on a CPU too. What is not installed or does not
fit is a row with the reason. The parts run in the order of their worth, and one that finds no time left says so.

Training is forward, loss, backward, clipping and fused AdamW on the same batch for each side, each from the same
weights; reported are medians after warming up, and the losses of the steps: they must agree up to bf16, or the sides
did not do the same work. Unique tokens count a shared prompt once and no padding. FLOPs on unique tokens are six for
each parameter of the layers and token, and 12 for each layer, width of the heads and visible pair of positions; the
rate of the machine is that of a bf16 matrix product of 8192.

Sides: the kernels of this library ("packed"); one padded row for each response, by SDPA and by flash attention; all
responses one after another without padding, by flash attention ("unpadded": what OpenRLHF's packing of samples does);
TRL, OpenRLHF and vLLM where they are installed. Rewards are also computed by varlen without splits of the keys, which
makes a reward independent of its batch bit for bit, and by a cascade that does not copy the prefix.
"""
import argparse
import json
import math
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from gpu_others import vllm_table
from gpu_sides import CASCADE_SIDE, ONE_SPLIT, VARLEN_SIDE, Bench, all_sides, free, scoring_sides, short
from gpu_sides import shown_rewards, splits_of, time_steps, unpadded
from gpu_trainers import trainers_table

from rlhf_reward.kernels import packed_kernels
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.packing import by_comparison, choose_layout, model_inputs, pad_comparisons
from rlhf_reward.placing import to_device
from rlhf_reward.tokens import tokenized_comparison

HH_LENGTHS = json.loads(Path(__file__).with_name("hh_lengths_256.json").read_text())


# ----- rates and counts


def matrix_rate(bench):
    "Return the FLOP/s of a bf16 matrix product, the best of several."
    size = 64 if bench.smoke else 8192
    a, b = torch.randn(2, size, size, device=bench.device, dtype=torch.bfloat16)
    times = []
    for _ in range(3 if bench.smoke else 12):
        bench.wait()
        start = time.perf_counter()
        a @ b
        bench.wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def work(examples, config):
    "Return the unique tokens, and the FLOPs of forward and backward on them."
    tokens = visible = 0
    for example in examples:
        prefix = len(example["shared_prefix"])
        rests = [len(rest) for rest in example["rests"]]
        tokens += prefix + sum(rests)
        visible += prefix * (prefix + 1) // 2
        visible += sum(rest * prefix + rest * (rest + 1) // 2 for rest in rests)
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    return tokens, config.num_hidden_layers * (6 * layer * tokens + 12 * heads * visible)


# ----- training


def train_side(bench, config, attention, collator, examples):
    "Return the seconds and the losses of the steps, and the peak of the memory in GiB."
    model = bench.model(config, attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.device.type == "cuda")
    loss_of = BradleyTerry()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step_loss():
        batch = to_device(collator(examples), bench.device)
        rewards = by_comparison(model(**model_inputs(batch, model)), batch["ranks"])
        return loss_of(rewards, batch["ranks"], batch["margins"], batch["ratings"]).mean()

    seconds, losses = time_steps(bench, model, optimizer, step_loss)
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else math.nan
    return seconds, losses, peak


def train_table(bench, size, shape, lengths, rate):
    "Print how long a step takes on each side."
    config = bench.config(size)
    examples = bench.comparisons(lengths)
    tokens, flops = work(examples, config)
    bench.print(
        f"\n### {size}, {shape}: {len(examples)} comparisons, {tokens} unique tokens a step\n",
        "| side | seconds a step | times as long as varlen | unique tokens a second | share of the matrix rate "
        "| peak GiB | losses |",
        "|---|---|---|---|---|---|---|",
    )
    base = None
    for side, how in all_sides(bench.device).items():
        if isinstance(how, str) or bench.time_left() < 20:
            bench.print(f"| {side} | {how if isinstance(how, str) else 'no time left'} | | | | | |")
            continue
        try:
            spent, losses, peak = train_side(bench, config, *how, examples)
        except Exception as error: # a side that fails is a row of the table
            bench.print(f"| {side} | {short(error)} | | | | | |")
        else:
            median = statistics.median(spent)
            base = base or median
            shown = " ".join(f"{loss:.4f}" for loss in losses[:4])
            bench.print(
                f"| {side} | {median:.4f} | {median / base:.2f} | {tokens / median:.0f} | {flops / median / rate:.2f} "
                f"| {peak:.1f} | {shown} |"
            )
        free(bench)


def shapes(size):
    "Return the lengths of prompts and responses of each shape, the most telling first."
    small = size == "4B" # whose activations of more tokens do not fit
    many = 1 if small else 4
    return {
        "HH lengths, 16 pairs": HH_LENGTHS[:16],
        "4,096/64": [[4096, 64, 64]] * (2 * many),
        "K = 4, prompts of 1,000": [[1000, 100, 120, 80, 100]] * (4 * many),
        "HH lengths, 64 pairs": HH_LENGTHS[:64],
        "8,192/64": [[8192, 64, 64]] * many,
        "1,024/1,024": [[1024, 1024, 1024]] * (2 * many),
    }


def choice(bench, size):
    "Print which kernel the library chooses by itself, and how long it takes."
    model = bench.model(bench.config(size))
    examples = bench.comparisons(HH_LENGTHS[:4])
    start = time.perf_counter()
    layout = choose_layout(model, examples, for_training=True)
    names = [kernel.name for kernel in packed_kernels(model, "sdpa")]
    bench.print(
        f"\nChosen for {size} among {', '.join(names)}: {layout.attn_implementation} "
        f"({layout.difference or 'packed'}), in {time.perf_counter() - start:.1f} s."
    )


# ----- best of N


@torch.no_grad()
def score_table(bench, medians, count):
    "Print how long each side scores the responses to one prompt. The seconds of varlen go into `medians`."
    config = bench.config("0.6B")
    example = bench.best_of(count)
    part = min(count, 16) # responses in a padded batch
    bench.print(
        f"\n### Best of {count}, 0.6B: a prompt of {len(example['shared_prefix'])}, "
        f"responses of {len(example['rests'][0])}\n",
        "| side | seconds | times as long as varlen | first rewards |",
        "|---|---|---|---|",
    )
    for side, how in scoring_sides(bench.device).items():
        if count > 256 and side not in (VARLEN_SIDE, ONE_SPLIT, CASCADE_SIDE):
            continue # what is to choose between for very many responses
        if isinstance(how, str) or bench.time_left() < 15:
            bench.print(f"| {side} | {how if isinstance(how, str) else 'no time left'} | | |")
            continue
        attention, collator = how
        in_parts = collator in (pad_comparisons, unpadded)
        try:
            model = bench.model(config, attention)
            with splits_of(side):
                seconds, rewards = score_side(bench, model, collator, example, part if in_parts else count)
        except Exception as error: # as above
            bench.print(f"| {side} | {short(error)} | | |")
        else:
            base = medians.setdefault(count, seconds)
            bench.print(f"| {side} | {seconds:.4f} | {seconds / base:.2f} | {shown_rewards(rewards)} |")
        free(bench)


def score_side(bench, model, collator, example, part):
    "Return the median seconds, and the rewards."
    rests = example["rests"]
    seconds = []
    for _ in range(bench.warmup + bench.steps):
        bench.wait()
        start = time.perf_counter()
        rewards = []
        for first in range(0, len(rests), part):
            batch = collator([tokenized_comparison(example["shared_prefix"], rests[first : first + part])])
            rewards.append(model(**model_inputs(to_device(batch, bench.device), model)))
        rewards = torch.cat(rewards).flatten().tolist()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[bench.warmup :]), rewards


# ----- exactness


@torch.no_grad()
def exact_table(bench):
    "Print how far the rewards of each kernel are from those in float64 on a CPU, and whether the batch changes them."
    config = bench.config("0.6B", num_hidden_layers=1 if bench.smoke else 4)
    examples = bench.comparisons([[600, 80, 120], [300, 40, 200, 90], [900, 64, 10]], seed=2)
    exact_model = bench.model(config).to("cpu", torch.float64)
    exact = torch.cat([exact_model(**model_inputs(pad_comparisons([one]), exact_model)) for one in examples]).double()
    bench.print(
        f"\n### Rewards against float64 on a CPU: {config.num_hidden_layers} layers of 0.6B, bf16, rewards from "
        f"{exact.min():.3f} to {exact.max():.3f}\n",
        "| side | largest difference | root mean square | the same in another batch, bit for bit |",
        "|---|---|---|---|",
    )
    for side, how in scoring_sides(bench.device).items():
        if isinstance(how, str):
            bench.print(f"| {side} | {how} | | |")
            continue
        attention, collator = how
        try:
            model = bench.model(config, attention)
            batches = [examples, *([one] for one in examples)]
            rewards = []
            with splits_of(side):
                for batch in batches:
                    inputs = model_inputs(to_device(collator(batch), bench.device), model)
                    rewards.append(model(**inputs).double().cpu())
            together, alone = rewards[0], torch.cat(rewards[1:])
        except Exception as error: # as above
            bench.print(f"| {side} | {short(error)} | | |")
        else:
            difference = together - exact
            same = "yes" if torch.equal(together, alone) else f"no, {(together - alone).abs().max():.1e}"
            bench.print(f"| {side} | {difference.abs().max():.1e} | {difference.square().mean().sqrt():.1e} | {same} |")
        free(bench)


# ----- command line


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; parts that come later are left out")
    parser.add_argument("--output", help="a file for the table too")
    parser.add_argument("--smoke", action="store_true", help="at toy size, on a CPU too")
    parser.add_argument("--no_trainers", action="store_true", help="leave out the trainers of other libraries and ours")
    options = parser.parse_args(arguments)
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.machine()
    rate = matrix_rate(bench)
    bench.print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}; bf16 matrix product: {rate / 1e12:.3g} TFLOP/s."
    )
    exact_table(bench)
    parts = [partial(choice, bench, "0.6B")]
    telling, *others = shapes("0.6B").items()
    parts.append(partial(train_table, bench, "0.6B", *telling, rate))
    if not options.no_trainers:
        parts.append(partial(trainers_table, bench, HH_LENGTHS))
    medians = {} # seconds of varlen by the number of responses
    parts += [partial(score_table, bench, medians, count) for count in (16, 256, 1024)]
    parts += [partial(train_table, bench, "0.6B", *shape, rate) for shape in others]
    parts.append(partial(vllm_table, bench, medians))
    parts += [partial(train_table, bench, "4B", *shape, rate) for shape in shapes("4B").items()]
    for part in parts:
        if bench.time_left() < 20:
            bench.print("\nNo time left for the rest.")
            break
        part()
    bench.print(f"\n{max(bench.time_left(), 0):.0f} s of the time are left.")


if __name__ == "__main__":
    main()
