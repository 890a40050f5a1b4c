"""
Train with and without torch.compile, and print the losses as JSON: `python tests/compiled.py BASE FOLDER`.

What dynamo compiles, and how often it may do so again, holds for a whole process: so this has one of its own.
"""
import json
import math
import sys

import torch

from rlhf_reward import packing, varlen
from rlhf_reward.kernels import Kernel, add_sequences
from rlhf_reward.varlen import VARLEN
from test_runs import logged, make
from test_varlen import documented

base, folder = sys.argv[1:]
WAYS = {
    "plain": {},
    "eager": {"torch_compile": True, "torch_compile_backend": "eager"},
    "aot_eager, padded": {"torch_compile": True, "torch_compile_backend": "aot_eager", "layout": "padded"},
    "eager, varlen": {"torch_compile": True, "torch_compile_backend": "eager"},
}


def only_varlen(model, attention):
    return [Kernel("varlen", VARLEN, math.inf, add_sequences)]


def compute_by_varlen():
    "Let packed rows be computed by varlen in float32, with what its kernel documents in its place."
    varlen.varlen_attn = torch.compiler.disable(documented)
    varlen.HALF = (torch.float32,)
    varlen.KERNEL_OPTIONS = {"enable_gqa": True}
    packing.packed_kernels = only_varlen


losses = {}
for name, options in WAYS.items():
    if "varlen" in name:
        compute_by_varlen()
    trainer = make(base, folder, max_steps=2, **options)
    trainer.train()
    losses[name] = logged(trainer, "loss")
    assert ("varlen" in name) == (trainer.model.config._attn_implementation == VARLEN)
print("losses:", json.dumps(losses))
