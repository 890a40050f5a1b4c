"""
Run the command `rlhf_reward` under FSDP2 on CPUs, where accelerate would use DDP instead without a message.

Each process prints whether its model is sharded.
"""
import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from rlhf_reward.cli import main
from rlhf_reward.training import RewardTrainer

plain_init = AcceleratorState.__init__
plain_prepare = RewardTrainer._prepare_for_training


def init_with_fsdp(self, *args, fsdp_plugin=None, **options):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def prepare_and_report(self, *args):
    prepared = plain_prepare(self, *args)
    sharded = all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
    # in one write: lines of two processes that are printed in pieces may mix
    os.write(1, f"sharded: {sharded}\n".encode())
    return prepared


if __name__ == "__main__":
    AcceleratorState.__init__ = init_with_fsdp
    RewardTrainer._prepare_for_training = prepare_and_report
    main()
