"Score a file in several processes, of which the second may be short of memory, and print how many batches each computed."
import os
import sys

from accelerate import PartialState

from rlhf_reward.files import score_file
from rlhf_reward.scoring import Scorer

model, data, output, room = sys.argv[1:]
processes, computed, forward = PartialState(cpu=True), [], Scorer._forward


def counted(self, batch):
    tokens = sum(len(prefix) + sum(len(sequence) - len(prefix) for sequence in group) for prefix, group in batch)
    if processes.process_index == 1 and tokens > int(room):
        raise MemoryError
    computed.append(tokens)
    return forward(self, batch)


Scorer._forward = counted
score_file(Scorer.from_pretrained(model, device="cpu", tokens_per_batch=200), data, output, processes=processes)
os.write(1, f"process {processes.process_index} of {processes.num_processes}: {len(computed)} batches\n".encode()) # at once: lines of two processes may mix
