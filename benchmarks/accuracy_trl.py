"""
Held-out accuracy compared with TRL's: after as many steps, and after as much time.

    pip install 'rlhf_reward[benchmarks]'
    python benchmarks/accuracy_trl.py TRAIN.jsonl EVAL.jsonl [--model FOLDER] [--minutes 3]

Each side trains for that many minutes (without start and evaluation) from the same weights, on the same comparisons in
the same order, with the same batch, optimizer and learning rate; TRL without gradient checkpointing and with all pairs
of a comparison. (From an encoder each side has its own new head, so they start from different heads.)
This library's accuracy is taken at the step that TRL reached, and at the end of the time; both sides' weights are
evaluated by the same code. Without --model a llama is trained from random weights, with a byte-level BPE of the texts.
"""
import argparse
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from paths import existing
from sides import MEMORY, ours, print_nothing, theirs, tokenizer_and_model

from rlhf_reward import RewardModel, load_rows, tokenize_rows
from rlhf_reward.comparison import ranked_pairs
from rlhf_reward.losses import BradleyTerry
from rlhf_reward.metrics import pair_metrics
from rlhf_reward.packing import by_comparison, pad_comparisons

LEARNING_RATE = 1e-4


class Clock(transformers.TrainerCallback):
    "Stop after so many seconds of training. Keep the weights of one step, in time that does not count."

    def __init__(self, seconds, keep_step=None):
        self.seconds = seconds
        self.keep_step = keep_step
        self.kept = None # the weights of that step

    def on_train_begin(self, *args, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.keep_step:
            paused = time.perf_counter()
            self.kept_after = paused - self.begin
            self.kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.begin += time.perf_counter() - paused
        if time.perf_counter() - self.begin >= self.seconds:
            control.should_training_stop = True


def train(make, clock):
    "Train until the clock stops it."
    trainer = make(
        max_steps=100_000,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=False,
        train_sampling_strategy="sequential",
    )
    trainer.add_callback(clock)
    trainer.train()
    return trainer


@torch.no_grad()
def accuracy(model, examples, batch=8):
    "Return accuracy over pairs, loss and number of pairs, of padded batches: the same way for both sides."
    examples = sorted(examples, key=lambda example: example["length"])
    width = max(len(example["ranks"]) for example in examples)
    rewards = []
    ranks = []
    for start in range(0, len(examples), batch):
        inputs = pad_comparisons(examples[start : start + batch])
        output = model.eval()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        flat_rewards = output if isinstance(output, torch.Tensor) else output.logits
        table = by_comparison(flat_rewards, inputs["ranks"])
        missing = (0, width - table.shape[1])
        rewards.append(F.pad(table, missing))
        ranks.append(F.pad(inputs["ranks"], missing))
    rewards = torch.cat(rewards)
    ranks = torch.cat(ranks)
    metrics = pair_metrics(transformers.EvalPrediction(rewards.numpy(), ranks.numpy()))
    return metrics["accuracy"], BradleyTerry()(rewards, ranks).mean().item(), metrics["pairs"]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("train", type=existing)
    parser.add_argument("eval", type=existing)
    parser.add_argument("--model", help="a folder with a one-label classifier or a backbone and its tokenizer")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    return parser.parse_args()


def make_model(options, rows, folder):
    "Save the model that both sides start from. Return its tokenizer."
    if options.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        torch.manual_seed(0)
        RewardModel(options.model, 0.0, "cpu").save_pretrained(folder, tokenizer)
        return tokenizer
    texts = []
    for row in rows:
        responses = row.get("responses") or (row["chosen"], row["rejected"])
        texts += [row["prompt"], *responses]
    return tokenizer_and_model(folder, texts, options.width, options.layers)


def training_examples(rows, read):
    "Return the comparisons that have the most pairs, shuffled: TRL's batches hold a fixed number of pairs."
    examples = list(read(rows))
    most = max(len(ranked_pairs(example["ranks"])) for example in examples)
    examples = [example for example in examples if len(ranked_pairs(example["ranks"])) == most]
    random.Random(0).shuffle(examples)
    return examples, most


def print_row(side, steps, minutes, model, held_out):
    share, loss, pairs = accuracy(model, held_out)
    print(f"| {side} | {steps} | {minutes:.1f} | {share:.4f} | {loss:.4f} | {pairs} |", flush=True)


def main():
    transformers.trainer_callback.PrinterCallback.on_log = print_nothing # the table is the whole output
    options = parse_arguments()
    import trl

    rows = load_rows(options.train)
    held_out = load_rows(options.eval)
    folder = Path(tempfile.mkdtemp()) / "model"
    tokenizer = make_model(options, rows, folder)
    read = partial(tokenize_rows, tokenizer=tokenizer, max_length=options.max_length)
    examples, most = training_examples(rows, read)
    held_out = list(read(held_out, name="the held-out rows"))
    print(
        f"torch {torch.__version__} ({torch.get_num_threads()} threads), transformers {transformers.__version__}, "
        f"trl {trl.__version__}; {len(examples)} comparisons of {most} pairs in training, {options.batch} a step, "
        f"at most {options.max_length} tokens, learning rate {LEARNING_RATE}",
        flush=True,
    )
    layout = {"layout": "padded"} if options.model else {}
    make_theirs = partial(theirs, folder, examples, tokenizer, options.batch)
    their_trainer = train(make_theirs, Clock(60 * options.minutes))
    steps = their_trainer.state.global_step
    clock = Clock(60 * options.minutes, steps)
    make_ours = partial(ours, folder, examples, tokenizer, options.batch, **layout)
    own_trainer = train(make_ours, clock)
    print("| side | steps | minutes | held-out accuracy | held-out loss | pairs |\n|---|---|---|---|---|---|")
    start = RewardModel.from_pretrained(folder, device="cpu")
    print_row("before training", 0, 0, start, held_out)
    print_row("TRL", steps, options.minutes, their_trainer.model, held_out)
    own_steps = own_trainer.state.global_step
    print_row("rlhf_reward, as much time", own_steps, options.minutes, own_trainer.model, held_out)
    if clock.kept is not None:
        own_trainer.model.load_state_dict(clock.kept)
        print_row("rlhf_reward, as many steps", steps, clock.kept_after / 60, own_trainer.model, held_out)


if __name__ == "__main__":
    if not MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
    main()
