"The tiny decoder and its comparisons as most tests of the trainer use them: opened and tokenized once."
import copy
import functools

import torch
from transformers import AutoTokenizer

from rlhf_reward import RewardModel, tokenize_rows
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
