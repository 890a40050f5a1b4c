"""
Which way of training generalizes: one base, one budget, several methods, seeds and held-out sets.

    pip install 'rlhf_reward[benchmarks]'
    python benchmarks/generalize.py --model FOLDER --train TRAIN.jsonl --eval A.jsonl B.jsonl --output FOLDER
        --methods trl "fitted head" --seeds 0 1 --minutes 8
    python benchmarks/generalize.py --output FOLDER --table

Each method and seed trains in a process of its own, on one thread, for so many minutes of that thread (from the call of
`train()`: with the fit of a head, without loading and evaluation) or, with `--steps`, for so many steps, with the
learning rate going down to 0 over the budget. What is done already is skipped, so a run that was stopped continues. A
part of the training prompts is held back (`held back`): methods are chosen on the training prompts only. The other sets
are only reported. The tables have accuracies with 95 % intervals, differences from the first method paired by prompt,
accuracies in which pairs whose better response is longer weigh as much as those whose is shorter, and accuracies
without the prompt, of the run with seed 0.

Where only the head differs, `generalize_heads.py` and `generalize_mismatched.py` keep the states of the backbone, so
that hundreds of heads are fitted after one pass.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from paths import existing_path

MEAN = {"pooling": "mean", "num_hidden_layers": 20} # of SmolLM2's 30 layers
TRAINED = {"head_start": "fitted", "model": MEAN}
# What a method adds to `COMMON`. "side" is ours unless given; "model" has arguments of `RewardModel`, "lora" of
# `peft.LoraConfig`; with "calibrated" the rewards of the training rows are regressed on length afterwards. "average" is
# of the seeds of another method that were trained with `--keep`.
METHODS = {
    "trl": {"side": "trl"}, # its learning rate, 1e-4
    "trl 3e-5": {"side": "trl", "learning_rate": 3e-5},
    "fitted head": {"head_start": "fitted"},
    "fitted head, 20 layers": {"head_start": "fitted", "model": {"num_hidden_layers": 20}},
    "mean, 20 layers": TRAINED,
    "mean, 20 layers, balanced": {**TRAINED, "balance_lengths": True, "learning_rate": 1e-5},
    "mean, 20 layers, balanced, head only": { # fitted; the one step changes nothing
        **TRAINED,
        "balance_lengths": True,
        "learning_rate": 0.0,
        "max_steps": 1,
    },
    "mean, 20 layers, balanced, mismatched, head only": {
        **TRAINED,
        "balance_lengths": True,
        "mismatched_share": 0.15,
        "learning_rate": 0.0,
        "max_steps": 1,
    },
    # one thing other than in "mean, 20 layers"
    "BSR": {**TRAINED, "sum_to_zero_coefficient": 0.05},
    "GRM": {**TRAINED, "lm_coefficient": 0.1},
    "R-drop": {**TRAINED, "rdrop_coefficient": 1.0, "model": {**MEAN, "dropout": 0.1}},
    "label smoothing": {**TRAINED, "label_smoothing_factor": 0.1},
    "frozen layers": {**TRAINED, "freeze_layers": 15},
    "random head": {**TRAINED, "head_start": "random"},
    "zero head": {**TRAINED, "head_start": "zero"},
    "small head": {**TRAINED, "head_start": "small"},
    "LoRA": {**TRAINED, "learning_rate": 1e-3, "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}},
    "attention": {**TRAINED, "model": {**MEAN, "pooling": "attention"}},
    "length residual": {**TRAINED, "length_loss": "residual"},
    "ODIN": {**TRAINED, "length_loss": "odin", "model": {
        **MEAN, "attributes": ["quality", "length"],
    }},
    "calibrated": {**TRAINED, "calibrated": True},
    "moving average": {**TRAINED, "ema_decay": 0.9},
    "average": {"side": "average", "of": "mean, 20 layers"},
}
COMMON = {"per_device_train_batch_size": 8, "learning_rate": 1e-4}


class Clock:
    "A budget of CPU seconds of this process, or of steps, and the learning rate that goes down to 0 over it."

    def __init__(self, seconds, steps=None, warmup=0.05):
        self.seconds = seconds
        self.steps = steps # in place of the seconds
        self.warmup = warmup # share of the budget
        self.rates = None
        self.steps_done = 0

    def start(self):
        self.begin = time.process_time()

    def minutes(self):
        return (time.process_time() - self.begin) / 60

    def callback(self):
        import transformers

        clock = self

        class Callback(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
                clock.set_rates(optimizer)

            def on_step_end(self, args, state, control, **kwargs):
                clock.steps_done += 1
                if clock.spent() >= 1:
                    control.should_training_stop = True

        return Callback()

    def spent(self):
        "Return the share of the budget that is spent."
        return self.steps_done / self.steps if self.steps else 60 * self.minutes() / self.seconds

    def set_rates(self, optimizer):
        groups = optimizer.param_groups
        if self.rates is None:
            self.rates = [group["lr"] for group in groups]
        factor = min(1, (self.spent() + 0.01) / self.warmup) * max(0, 1 - self.spent())
        for group, rate in zip(groups, self.rates):
            group["lr"] = rate * factor


def train_ours(model_name, rows, options, seed, clock, folder):
    "Train with this library. Return the trainer; its model is the trained one."
    import peft
    import transformers
    from datasets import Dataset

    from rlhf_reward import RewardConfig, RewardModel, RewardTrainer

    transformers.set_seed(seed)
    options = dict(options)
    model = RewardModel(model_name, device="cpu", **{"dropout": 0.0, **options.pop("model", {})})
    lora = options.pop("lora", None)
    args = RewardConfig(folder, seed=seed, **{**trainer_options(), **options})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_name)
    trainer = RewardTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(without_keys(rows)),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**lora) if lora else None,
        callbacks=[clock.callback()],
    )
    clock.start()
    trainer.train()
    return trainer


def train_trl(model_name, rows, options, seed, clock, folder):
    "Train with TRL, without gradient checkpointing, on the same pairs."
    import transformers
    import trl
    from datasets import Dataset

    transformers.set_seed(seed)
    args = trl.RewardConfig(folder, seed=seed, gradient_checkpointing=False, **{**trainer_options(), **options})
    pairs = []
    for row in rows:
        best, worst = np.argsort(row["ranks"])[[0, -1]]
        pairs.append({"prompt": row["prompt"], "chosen": row["responses"][best], "rejected": row["responses"][worst]})
    trainer = trl.RewardTrainer(model_name, args, train_dataset=Dataset.from_list(pairs))
    trainer.add_callback(clock.callback())
    clock.start()
    trainer.train()
    return trainer


def trainer_options():
    return {
        "max_steps": 100_000,
        "use_cpu": True,
        "bf16": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 4,
        "lr_scheduler_type": "constant", # the clock sets the rate
    }


def run_one(arguments, method, seed):
    "Train or average one method with one seed, evaluate it, and write its figures and the pairs of all sets."
    import torch

    torch.set_num_threads(1)
    train, sets = read_data(arguments)
    options = {**COMMON, **METHODS[method]}
    target = run_file(arguments.output, method, seed)
    if options.get("side") == "average":
        scorer, figures = average_seeds(arguments.output, options["of"])
    else:
        clock = Clock(60 * arguments.minutes, arguments.steps)
        scorer, figures = train_one(arguments.model, train, options, seed, clock)
        if arguments.keep:
            scorer.model.save_pretrained(model_folder(target), scorer.tokenizer)
    tables = []
    for name, rows in sets.items():
        tables.append(pairs_of(scorer, without_keys(rows), blind=seed == 0).assign(set=name))
    pd.concat(tables).to_json(target.with_suffix(".pairs.json"), orient="records")
    figures = {"method": method, "seed": seed, "options": options, **figures}
    target.write_text(json.dumps(figures, indent=1))


def train_one(model_name, train, options, seed, clock):
    "Train for the time of the clock. Return a scorer, and what the training took."
    import torch

    from rlhf_reward import RewardModel
    from rlhf_reward.length_calibration import calibrate_length

    options = dict(options)
    side = options.pop("side", "ours")
    calibrated = options.pop("calibrated", False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"ours": train_ours, "trl": train_trl}[side](model_name, train, options, seed, clock, folder)
        steps = trainer.state.global_step
        figures = {
            "minutes": clock.minutes(),
            "steps": steps,
            "comparisons": steps * options["per_device_train_batch_size"],
            "gigabytes": peak_gigabytes(),
            "losses": [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log],
        }
        if side == "trl":
            trainer.save_model(folder)
            trainer.processing_class.save_pretrained(folder)
            model = RewardModel.from_pretrained(folder, device="cpu", dtype=torch.float32)
        else:
            model = trainer.model
    tokenizer = trainer.processing_class
    del trainer # with the optimizer's states
    scorer = scorer_of(model, tokenizer)
    if calibrated:
        calibrate_length(scorer, without_keys(train)).apply_to(scorer)
    return scorer, figures


def average_seeds(output, method):
    "Average the models of all seeds of a method that were kept. Return a scorer, and what the average took."
    import transformers

    from rlhf_reward import RewardModel
    from rlhf_reward.averaging import average_checkpoints

    runs = sorted(output.glob(f"{file_stem(method)}-*-model"))
    with tempfile.TemporaryDirectory() as folder:
        average = Path(folder) / "average"
        average_checkpoints(runs, average, align=False) # all heads begin at the same fit
        model = RewardModel.from_pretrained(average, device="cpu")
        tokenizer = transformers.AutoTokenizer.from_pretrained(average)
    nothing = {"minutes": 0, "steps": 0, "comparisons": 0, "losses": []}
    return scorer_of(model, tokenizer), {**nothing, "gigabytes": peak_gigabytes(), "parts": len(runs)}


def scorer_of(model, tokenizer):
    "Return a scorer with the backbone in bfloat16; the head stays in float32."
    import torch

    from rlhf_reward.scoring import Scorer

    model.backbone.to(torch.bfloat16)
    return Scorer(model, tokenizer)


def peak_gigabytes():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def pairs_of(scorer, rows, blind):
    "Return one line for each pair: margin, longer_by, prompt, and with `blind` the margin without the prompt."
    from rlhf_reward.data import to_comparison
    from rlhf_reward.evaluation import evaluate
    from rlhf_reward.tables import pair_table, response_table

    if blind:
        return evaluate(scorer, rows).pairs
    comparisons = [to_comparison(row) for row in rows]
    lengths = []
    for comparison in comparisons:
        texts = [response[0]["content"] for response in comparison.responses]
        lengths.append([len(ids) for ids in scorer.tokenizer(texts)["input_ids"]])
    nothing = [[float("nan")] * len(own) for own in lengths]
    return pair_table(response_table(comparisons, scorer.score_comparisons(comparisons), nothing, lengths))


def without_keys(rows):
    columns = ("prompt", "responses", "ranks", "source")
    return [dict(zip(columns, map(row.get, columns))) for row in rows]


def run_file(folder, method, seed):
    return Path(folder) / f"{file_stem(method)}-{seed}.json"


def file_stem(method):
    return method.replace(" ", "_")


def model_folder(file):
    return file.with_name(f"{file.stem}-model")


def read_data(arguments):
    "Return the training rows, and the rows of each held-out set by name."
    from generalize_data import first_responses, read_rows, split_by_prompt

    rows = read_rows(arguments.train, arguments.max_characters)
    train, held_back = split_by_prompt(rows, 0.2)
    sets = {"held back": first_responses(held_back, arguments.most)}
    for file in arguments.eval:
        sets[file.stem] = first_responses(read_rows(file, arguments.max_characters), arguments.most)
    return train, sets


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained decoder with a chat template")
    parser.add_argument("--train", type=existing_path, help="JSON Lines of comparisons to train on")
    parser.add_argument("--eval", type=existing_path, nargs="+", default=[], help="held-out JSON Lines, only reported")
    parser.add_argument("--output", type=Path, required=True, help="folder of what is done")
    parser.add_argument("--methods", nargs="+", default=["trl", "fitted head"], choices=METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=8, help="of training, of one thread")
    parser.add_argument("--steps", type=int, help="of training, in place of the minutes")
    parser.add_argument("--max_characters", type=int, default=1000, help="of a prompt with its longest response")
    parser.add_argument("--most", type=int, default=300, help="responses of a held-out set")
    parser.add_argument("--keep", action="store_true", help="the trained models, for `average`")
    parser.add_argument("--table", action="store_true", help="print what is done and train nothing")
    parser.add_argument("--minus", default="trl", help="method that the differences in the tables are from")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS) # a method and a seed, in this process
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        run_one(arguments, arguments.one[0], int(arguments.one[1]))
        return
    if not arguments.table:
        for seed in arguments.seeds:
            for method in arguments.methods:
                if not run_file(arguments.output, method, seed).exists():
                    subprocess.run([sys.executable, *sys.argv, "--one", method, str(seed)], check=True, env={
                        **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
                    })
    from generalize_table import print_tables

    print_tables(arguments.output, arguments.minus)


if __name__ == "__main__":
    main()
