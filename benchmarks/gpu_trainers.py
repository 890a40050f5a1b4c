"""
The trainers that `gpu.py` compares: this library's and TRL's, on the same comparisons from the same weights.
"""
import importlib.util
import statistics
import tempfile
import time
from functools import partial

import torch
import transformers
from gpu_sides import free, short

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
        sides = {"rlhf_reward": our_trainer, "TRL, no checkpointing": trl_trainer}
        for side, make in {**sides, "TRL as it comes": partial(trl_trainer, checkpointing=True)}.items():
            if bench.time_left() < 20:
                bench.print(f"| {side} | {pairs} | no time left | | |")
                continue
            try:
                spent, losses = run_trainer(bench, make, bench.comparisons(lengths[:pairs]))
            except Exception as error: # as above
                bench.print(f"| {side} | {pairs} | {short(error)} | | |")
            else:
                median = statistics.median(spent)
                base = base or median
                shown = " ".join(f"{loss:.4f}" for loss in losses[:4])
                bench.print(f"| {side} | {pairs} | {median:.4f} | {median / base:.2f} | {shown} |")
            free(bench)
    if importlib.util.find_spec("openrlhf") is None:
        bench.print("| OpenRLHF | | not installed: see the rows 'unpadded', which is its layout | | |")


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


def run_trainer(bench, make, examples):
    "Return the seconds of the steps without the first ones, and all losses."
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
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.add_callback(callback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [after - before for before, after in zip(callback.times, callback.times[1:])]
    return seconds[bench.warmup :], losses


def toy_tokenizer():
    "Return a tokenizer that both trainers accept; the data is tokenized already."
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1, "word": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def our_trainer(bench, examples, **options):
    from datasets import Dataset

    from rlhf_reward import RewardConfig, RewardTrainer
    from rlhf_reward.tokens import FEATURES

    model = bench.model(bench.config("0.6B"))
    dataset = Dataset.from_list(examples, features=FEATURES)
    return RewardTrainer(model, RewardConfig(**options), train_dataset=dataset, processing_class=toy_tokenizer())


def trl_trainer(bench, examples, checkpointing=False, **options):
    import trl
    from datasets import Dataset

    config = bench.config("0.6B", num_labels=1)
    with bench.device:
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    ours = bench.model(config) # for the same weights
    model.model.load_state_dict(ours.backbone.state_dict())
    model.score.weight.data.copy_(ours.score.weight)
    rows = []
    for example in examples:
        chosen, rejected = whole_sequences(example)
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    args = trl.RewardConfig(max_length=None, gradient_checkpointing=checkpointing, **options)
    return trl.RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=toy_tokenizer())
