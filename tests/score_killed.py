"Score a file in processes that are killed at random moments, 20 times in all, and print how often a run was undisturbed or resumed."
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from rlhf_reward import files
from rlhf_reward.scoring import Scorer

KILLS = 20


def run(model, data, output, kill_after=None):
    "Score in a process of its own. Whether it was killed."
    child = os.fork() # before any thread of torch is there
    if child == 0:
        try:
            torch.set_num_threads(1)
            files.score_file(Scorer.from_pretrained(model, device="cpu"), data, output)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL) # nothing happens to one that has ended
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


model, data, folder, seed = *sys.argv[1:4], int(sys.argv[4])
files.ROWS_AT_ONCE = 20
draw, undisturbed = random.Random(seed), Path(folder, "undisturbed.jsonl")
started = time.perf_counter()
run(model, data, str(undisturbed))
took, kills, finished, states = time.perf_counter() - started, 0, 0, set()
while kills < KILLS:
    output = Path(folder, f"killed-{finished}.jsonl")
    while kills < KILLS and run(model, data, str(output), draw.uniform(0, took)):
        kills += 1
        part = Path(f"{output}.part")
        lines = part.read_bytes().split(b"\n") if part.exists() else []
        states.add("nothing yet" if len(lines) < 2 else "a torn line" if lines[-1] else "whole lines")
    if not output.exists():
        run(model, data, str(output))
    assert output.read_bytes() == undisturbed.read_bytes(), output
    finished += 1
print(f"{kills} kills, {finished} files equal; seen: {', '.join(sorted(states))}")
