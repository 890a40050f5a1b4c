"""
Score a file in processes that are killed at random moments, 20 times in all, and compare with an undisturbed run.

`score_killed.py MODEL DATA FOLDER SEED` prints how often a run was killed and resumed, and in what state its file was.
"""
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
    "Score in a process of its own. Return whether it was killed."
    child = os.fork()  # while there is no thread of torch
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
        os.kill(child, signal.SIGKILL)  # nothing happens to one that has ended
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def state_of(part):
    "Describe what a killed run left."
    lines = part.read_bytes().split(b"\n") if part.exists() else []
    if len(lines) < 2:
        return "nothing yet"
    return "a torn line" if lines[-1] else "whole lines"


if __name__ == "__main__":
    model, data, folder, seed = sys.argv[1:]
    files.ROWS_AT_ONCE = 20
    draw = random.Random(int(seed))
    undisturbed = Path(folder, "undisturbed.jsonl")
    started = time.perf_counter()
    run(model, data, str(undisturbed))
    seconds = time.perf_counter() - started
    kills = 0
    finished = 0
    states = set()
    while kills < KILLS:
        output = Path(folder, f"killed-{finished}.jsonl")
        while kills < KILLS and run(model, data, str(output), draw.uniform(0, seconds)):
            kills += 1
            states.add(state_of(Path(f"{output}.part")))
        if not output.exists():
            run(model, data, str(output))
        assert output.read_bytes() == undisturbed.read_bytes(), output
        finished += 1
    print(f"{kills} kills, {finished} files equal; seen: {', '.join(sorted(states))}")
