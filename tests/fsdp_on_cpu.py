"The command `rlhf_reward` under FSDP2 on CPUs, where accelerate would quietly take DDP instead. Says whether the model was sharded."
import os

import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from rlhf_reward.cli import main
from rlhf_reward.training import RewardTrainer

plain_init, plain_prepare = accelerate.state.AcceleratorState.__init__, RewardTrainer._prepare_for_training


def init(self, *args, fsdp_plugin=None, **options):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type = accelerate.state.PartialState().distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def prepare(self, *args):
    prepared = plain_prepare(self, *args)
    sharded = all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
    os.write(1, f"sharded: {sharded}\n".encode()) # at once: lines of two processes that are printed in pieces may mix
    return prepared


if __name__ == "__main__":
    accelerate.state.AcceleratorState.__init__, RewardTrainer._prepare_for_training = init, prepare
    main()
