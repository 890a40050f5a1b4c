"""
The sides that `gpu.py` compares: models from configs, comparisons of random tokens, and the ways to batch them.
"""
import contextlib
import inspect
import math
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from gpu_cascade import CASCADE, AuxRequest, pack_cascade
from torch import nn

from rlhf_reward import RewardModel, varlen
from rlhf_reward.attention import BY_SEGMENT
from rlhf_reward.kernels import add_sequences, pad_rows
from rlhf_reward.packing import pack_comparisons, pad_comparisons
from rlhf_reward.tokens import tokenized_comparison, whole_sequences
from rlhf_reward.varlen import VARLEN, varlen_attn

SIZES = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}
TOY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
VARLEN_SIDE = "packed, varlen"
ONE_SPLIT = "packed, varlen, num_splits=1"
CASCADE_SIDE = "packed, cascade"


class Bench:
    "The device, the sizes, the time, and where the table goes."

    def __init__(self, options):
        self.smoke = options.smoke
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.deadline = time.monotonic() + 60 * options.minutes
        self.output = options.output
        self.steps, self.warmup = (1, 0) if self.smoke else (4, 2)
        self.lines = []

    def print(self, *lines):
        "Print lines, and write all so far to the file: what was measured is kept if the time is over."
        for line in lines:
            print(line, flush=True)
            self.lines.append(line)
        if self.output:
            Path(self.output).write_text("\n".join(self.lines) + "\n")

    def time_left(self):
        return self.deadline - time.monotonic()

    def scaled(self, length):
        "Return a length in tokens, smaller in a smoke test."
        return max(2, length // 64) if self.smoke else length

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def config(self, size, **options):
        vocabulary = 96 if self.smoke else 151936
        head = dict(num_key_value_heads=2, head_dim=8) if self.smoke else dict(num_key_value_heads=8, head_dim=128)
        return transformers.Qwen3Config(
            vocab_size=vocabulary,
            max_position_embeddings=16384,
            rope_theta=1e6,
            tie_word_embeddings=True,
            pad_token_id=0,
            **{**(TOY if self.smoke else SIZES[size]), **head, **options},
        )

    def model(self, config, attention="sdpa", seed=0):
        "Return a reward model of random weights: the parts of a tiny one are replaced, so that no file is read."
        tiny = transformers.Qwen3Config(vocab_size=8, **TOY, num_key_value_heads=2, head_dim=8)
        with tempfile.TemporaryDirectory() as folder:
            transformers.Qwen3Model(tiny).save_pretrained(folder)
            model = RewardModel(folder, 0.0, "cpu", dtype=torch.bfloat16)
        with self.device:
            torch.manual_seed(seed)
            model.backbone = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
            model.score = nn.Linear(config.hidden_size, 1, bias=False)
        model.num_base_embeddings = config.vocab_size
        if attention != model.config._attn_implementation:
            model.backbone.set_attn_implementation(attention)
        return model

    def best_of(self, count):
        "Return a prompt with this many responses."
        return self.comparisons([[1000, *[100] * count]], seed=1)[0]

    def comparisons(self, lengths, seed=0):
        "Return comparisons of random tokens: a prompt and responses of these lengths."
        draw = random.Random(seed)
        last = 95 if self.smoke else 151000
        made = []
        for prompt, *responses in lengths:
            prefix = [draw.randrange(10, last) for _ in range(self.scaled(prompt))]
            rests = []
            for number, length in enumerate(responses):  # they differ from the first token
                rests.append([number % 8 + 1, *(draw.randrange(10, last) for _ in range(self.scaled(length) - 1))])
            count = len(rests)
            ranks = list(range(1, count + 1))
            made.append(tokenized_comparison(prefix, rests, ranks=ranks, margins=[0.0] * (count * (count - 1) // 2)))
        return made


def scoring_sides(device):
    "Return the sides, with varlen without splits of the keys and the cascade, both for scoring only."
    sides = all_sides(device)
    of_varlen = sides[VARLEN_SIDE]
    reason = of_varlen if isinstance(of_varlen, str) else None
    has_splits = "num_splits" in inspect.signature(varlen_attn or len).parameters
    sides[ONE_SPLIT] = reason or (of_varlen if has_splits else "needs a later torch")
    sides[CASCADE_SIDE] = reason or ((CASCADE, pack_cascade) if AuxRequest else "needs a later torch")
    return sides


@contextlib.contextmanager
def splits_of(side):
    "Let varlen split the keys of a sequence as it likes, or for one side not at all, inside a `with` block."
    if side == ONE_SPLIT:
        varlen.KERNEL_OPTIONS["num_splits"] = 1
    try:
        yield
    finally:
        varlen.KERNEL_OPTIONS.pop("num_splits", None)


def packed_with(examples, finish, **options):
    "Pack comparisons into one row, with what a kernel needs."
    return finish(pack_comparisons(examples, math.inf, **options))


def unpadded(examples):
    "All responses one after another, each with its prompt."
    whole = [{**example, "shared_prefix": [], "rests": whole_sequences(example)} for example in examples]
    return packed_with(whole, add_sequences)


def all_sides(device):
    "Return the attention and the collator of each side, or why there is none."
    on_gpu = device.type == "cuda"
    no_varlen = "needs a GPU" if varlen_attn is not None else "needs torch 2.10"
    can_varlen = on_gpu and varlen_attn is not None
    flash = flash_name()
    sequences = partial(packed_with, finish=add_sequences)
    sides = {
        VARLEN_SIDE: (VARLEN, sequences) if can_varlen else no_varlen,
        "packed, FlexAttention": ("flex_attention", partial(packed_with, finish=pad_rows)) if on_gpu else "needs a GPU",
        "packed, flash of transformers": (flash, sequences) if flash else "flash-attn is not installed",
        "packed, segments": (BY_SEGMENT, partial(pack_comparisons, row_length=math.inf)),
        "packed, dense mask": ("sdpa", pack_comparisons),
        "unpadded, varlen": (VARLEN, unpadded) if can_varlen else no_varlen,
        "padded, SDPA": ("sdpa", pad_comparisons),
        "padded, flash": (flash, pad_comparisons) if flash else "flash-attn is not installed",
    }
    if on_gpu:
        del sides["packed, segments"] # for CPUs
    return sides


def flash_name():
    "Return the name of the flash attention of transformers that is installed, or None."
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


def shown_rewards(rewards):
    return " ".join(f"{reward:.4f}" for reward in rewards[:4])


def short(error):
    "Return an error as a cell of a table."
    text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).replace("|", "/")[:120]


def time_steps(bench, model, optimizer, step_loss):
    "Train on one batch. Return the seconds of the steps without the first ones, and the losses of all."
    seconds, losses = [], []
    for _ in range(bench.warmup + bench.steps):
        bench.wait()
        start = time.perf_counter()
        loss = step_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bench.wait()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.detach())
    return seconds[bench.warmup :], torch.stack(losses).tolist()


def free(bench):
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
