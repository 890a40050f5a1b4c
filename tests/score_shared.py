"""
Score a file in several processes, of which the second may be short of memory.

Each process prints how many batches it computed. Arguments: model, data, output, and the tokens that the second
process has room for.
"""
import os
import sys

from accelerate import PartialState

from rlhf_reward.files import score_file
from rlhf_reward.scoring import Scorer

model, data, output, room = sys.argv[1:]
processes = PartialState(cpu=True)
computed = []  # tokens of each batch
forward = Scorer._forward


def counted(self, batch):
    tokens = sum(piece.num_tokens() for piece in batch)
    if processes.process_index == 1 and tokens > int(room):
        raise MemoryError
    computed.append(tokens)
    return forward(self, batch)


Scorer._forward = counted
scorer = Scorer.from_pretrained(model, device="cpu", tokens_per_batch=200)
score_file(scorer, data, output, processes=processes)
line = f"process {processes.process_index} of {processes.num_processes}: {len(computed)} batches\n"
os.write(1, line.encode())  # at once: lines of two processes may mix
processes.destroy_process_group()  # else a process can abort while it ends
