"""
The trainers that `gpu.py` compares: this library's, TRL's and OpenRLHF's model, on the same pairs and weights.
"""
import importlib.util
import statistics
import tempfile
import time
from functools import partial

import torch
import transformers
from gpu_others import openrlhf_steps, toy_tokenizer
from gpu_sides import flash_name, free, short

from rlhf_reward.tokens import whole_sequences


def trainers_table(bench, lengths):
    "Print the seconds a step of the trainers of this library, TRL and OpenRLHF on HH lengths."
    bench.print(
        "\n### Trainers, 0.6B, HH lengths, bf16\n",
        "| trainer | pairs a step | seconds a step | times as long as rlhf_reward | losses |",
        "|---|---|---|---|---|",
    )
    for pairs in (2,) if bench.smoke else (16, 64):
        base = None
        for side, steps_of in trainers().items():
            if isinstance(steps_of, str) or bench.time_left() < 20:
                reason = steps_of if isinstance(steps_of, str) else "no time left"
                bench.print(f"| {side} | {pairs} | {reason} | | |")
                continue
            try:
                spent, losses = steps_of(bench, bench.comparisons(lengths[:pairs]))
            except Exception as error: # a side that fails is a row of the table
                bench.print(f"| {side} | {pairs} | {short(error)} | | |")
            else:
                median = statistics.median(spent)
                base = base or median
                shown = " ".join(f"{loss:.4f}" for loss in losses[:4])
                bench.print(f"| {side} | {pairs} | {median:.4f} | {median / base:.2f} | {shown} |")
            free(bench)


def trainers():
    "Return for each side the function of bench and examples that returns seconds and losses, or why there is none."
    flash = flash_name()
    trl = partial(run_trainer, trl_trainer)
    has_openrlhf = importlib.util.find_spec("openrlhf") is not None
    return {
        "rlhf_reward": partial(run_trainer, our_trainer),
        "TRL, no checkpointing": trl,
        "TRL, flash, no checkpointing": partial(trl, attention=flash) if flash else "flash-attn is not installed",
        "TRL as it comes": partial(trl, checkpointing=True),
        "OpenRLHF, packing": openrlhf_steps if has_openrlhf else "not installed: see the rows 'unpadded', its layout",
    }


class StepTimes(transformers.TrainerCallback):
    "Notes when each step ends."

    def __init__(self, wait):
        self.wait = wait
        self.times = []

    def on_train_begin(self, *args, **kwargs):
        self.on_step_end()

    def on_step_end(self, *args, **kwargs):
        self.wait()
        self.times.append(time.perf_counter())


def run_trainer(make, bench, examples, **side):
    "Return the seconds of the steps without the first ones, and all losses, of the trainer that `make` returns."
    callback = StepTimes(bench.wait)
    steps = bench.warmup + bench.steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(
            bench,
            examples * steps,
            output_dir=folder,
            per_device_train_batch_size=len(examples),
            max_steps=steps,
            bf16=False, # the weights are
            use_cpu=bench.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            **side,
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.add_callback(callback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [after - before for before, after in zip(callback.times, callback.times[1:])]
    return seconds[bench.warmup :], losses


def our_trainer(bench, examples, **options):
    from datasets import Dataset

    from rlhf_reward import RewardConfig, RewardTrainer
    from rlhf_reward.tokens import FEATURES

    model = bench.model(bench.config("0.6B"))
    dataset = Dataset.from_list(examples, features=FEATURES)
    return RewardTrainer(model, RewardConfig(**options), train_dataset=dataset, processing_class=toy_tokenizer())


def trl_trainer(bench, examples, checkpointing=False, attention="sdpa", **options):
    import trl
    from datasets import Dataset

    config = bench.config("0.6B", num_labels=1)
    with bench.device:
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    ours = bench.model(config) # for the same weights
    model.model.load_state_dict(ours.backbone.state_dict())
    model.score.weight.data.copy_(ours.score.weight)
    rows = []
    for example in examples:
        chosen, rejected = whole_sequences(example)
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    args = trl.RewardConfig(max_length=None, gradient_checkpointing=checkpointing, **options)
    return trl.RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=toy_tokenizer())
