"The tiny decoder and its comparisons as most tests of the trainer use them: opened and tokenized once."
import copy
import functools

import torch
from transformers import AutoTokenizer

from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, tokenize_rows
from rlhf_reward.synthetic import synthetic_comparisons


@functools.cache
def _opened(base):
    torch.manual_seed(0)
    return RewardModel(base, 0.0, "cpu")


def open_tiny(base, dropout=0.0):
    "A new model, with the head of seed 0. Copying one takes a tenth of the time of opening it."
    model = copy.deepcopy(_opened(base))
    model.dropout.p = dropout
    return model


@functools.cache
def tokenized(base, number, seed=0):
    "Synthetic comparisons as the trainer tokenizes them for every loss without margins."
    rows = synthetic_comparisons(number, seed=seed)
    return tokenize_rows(rows, AutoTokenizer.from_pretrained(base), 512)


QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def tiny_trainer(base, folder, options, **given):
    """
    A trainer of the tiny decoder on 40 synthetic comparisons, in batches of 8, that saves nothing. The options are
    those of `RewardConfig`, what is given is of `RewardTrainer`, None for the default.
    """
    torch.manual_seed(0)
    defaults = {**QUIET, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no"}
    given = {name: value for name, value in given.items() if value is not None}
    made = {
        "model": lambda: open_tiny(base),
        "train_dataset": lambda: tokenized(base, 40),
        "processing_class": lambda: AutoTokenizer.from_pretrained(base),
    }
    for name, make in made.items():
        if name not in given:
            given[name] = make()
    return RewardTrainer(args=RewardConfig(str(folder), **{**defaults, **options}), **given)
