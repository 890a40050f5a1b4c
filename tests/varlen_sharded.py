"""
Packed rows by varlen in a model that DDP or FSDP2 has wrapped, in one process on a CPU.

Prints the largest difference of the rewards from those of single sequences, and how many weights have a gradient.
"""
import sys
import tempfile

import torch
from torch.distributed.fsdp import fully_shard

from one_at_a_time import alone
from rlhf_reward import varlen
from rlhf_reward.packing import model_inputs
from rlhf_reward.varlen import VARLEN
from test_varlen import documented, few_examples, open_model, packed

if __name__ == "__main__":
    varlen.varlen_attn = documented
    varlen.HALF = (torch.float32,)
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    examples = few_examples()
    for wrapped in ("DDP", "FSDP2"):
        with tempfile.TemporaryDirectory() as folder:
            model = open_model("qwen3", folder)
        plain = torch.cat([model(**model_inputs(batch, model)) for batch in alone(examples)]).detach()
        model.backbone.set_attn_implementation(VARLEN)
        inputs = model_inputs(packed(examples, model), model)
        if wrapped == "DDP":
            wrapper = torch.nn.parallel.DistributedDataParallel(model)
        else:
            for layer in model.backbone.layers:
                fully_shard(layer)
            wrapper = fully_shard(model)
        rewards = wrapper(**inputs)
        rewards.sum().backward()
        count = sum(parameter.grad is not None for parameter in model.parameters())
        print(wrapped, f"{(rewards.detach() - plain).abs().max():.1e}", count == len(list(model.parameters())))
    torch.distributed.destroy_process_group()
