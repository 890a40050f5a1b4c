"""
The cascade, for `gpu.py`: a prefix is not copied for each of its responses, which attend to it in a call of its own.

One call computes each segment of a packed row, a prefix or the rest of a response, by itself. A second one computes
what all rests see of their prefixes. Both return the logarithm of the sum of exponentials of their scores (LSE), by
which their outputs are merged. For scoring only: the kernels have no gradient of the LSE.
"""
import itertools
import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rlhf_reward import varlen
from rlhf_reward.attention import segment_table
from rlhf_reward.packing import pack_comparisons

try:
    from torch.nn.attention.varlen import AuxRequest
except ImportError: # before torch 2.10
    AuxRequest = None

CASCADE = "sdpa_varlen_cascade" # the name of this attention for transformers


def pack_cascade(examples):
    "Pack comparisons into one row, with the sequences of both calls: (lengths of queries, of keys, the longest two)."
    batch = pack_comparisons(examples, math.inf)
    table = segment_table(batch)[0, 0, :, :2].tolist() # length, line of the prefix or -1
    starts = [0, *itertools.accumulate(length for length, _ in table)]
    rests = {} # by the line of their prefix
    for line, (_, prefix) in enumerate(table):
        if prefix >= 0:
            rests.setdefault(prefix, []).append(line)
    tokens = torch.arange(starts[-1])
    queries = [tokens[starts[lines[0]] : starts[lines[-1] + 1]] for lines in rests.values()] # they are adjacent
    keys = [tokens[starts[prefix] : starts[prefix + 1]] for prefix in rests]
    lengths = [length for length, _ in table]
    sequences = {
        "own": call(lengths, lengths),
        "prefix": call([len(part) for part in queries], [len(part) for part in keys]),
        "queries": torch.cat(queries),
        "keys": torch.cat(keys),
    }
    return {**batch, "packed_sequences": {0: sequences}}


def call(num_queries, num_keys):
    "Return the arguments of the kernel for sequences of these lengths."
    return {
        "cu_seq_q": torch.tensor([0, *itertools.accumulate(num_queries)], dtype=torch.int32),
        "cu_seq_k": torch.tensor([0, *itertools.accumulate(num_keys)], dtype=torch.int32),
        "max_q": max(num_queries),
        "max_k": max(num_keys),
    }


def attention_cascade(module, query, key, value, attention_mask, packed_sequences=None, scaling=None, **kwargs):
    "Compute a packed row of `pack_cascade` without windows."
    sequences = packed_sequences[0]
    options = {"scale": scaling, "return_aux": AuxRequest(lse=True), **varlen.KERNEL_OPTIONS}
    query, key, value = (states.squeeze(0).transpose(0, 1).contiguous() for states in (query, key, value))
    own, own_lse = varlen.varlen_attn(query, key, value, **sequences["own"], window_size=(-1, 0), **options)
    rests, keys = sequences["queries"], sequences["keys"]
    of_prefix, prefix_lse = varlen.varlen_attn(
        query[rests], key[keys], value[keys], **sequences["prefix"], window_size=(-1, -1), **options
    )
    # the LSE is (num_heads, num_queries), as flash-attention returns it
    share = torch.sigmoid(prefix_lse.T - own_lse.T[rests])[..., None] # of the prefix in the sum of weights
    merged = share * of_prefix + (1 - share) * own[rests]
    return own.index_copy(0, rests, merged.to(own.dtype))[None], None


AttentionInterface.register(CASCADE, attention_cascade)
AttentionMaskInterface.register(CASCADE, sdpa_mask) # never made: batches are packed
