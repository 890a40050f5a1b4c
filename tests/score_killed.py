"""
Score a file in processes that are killed at random moments, 20 times in all.

Prints how many kills there were, how many files are equal to the undisturbed one, and what the kills left.
"""
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rlhf_reward import files
from rlhf_reward.scoring import Scorer

KILLS = 20


def run(scorer, data, output, kill_after=None):
    "Score in a process of its own, and return whether it was killed."
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # its own lock is shared with forks, and one that was killed may have it
        try:
            files.score_file(scorer, data, output)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # has no effect on one that has ended
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def state_of(part):
    "Return what a killed run left in its file."
    lines = part.read_bytes().split(b"\n") if part.exists() else []
    if len(lines) < 2:
        return "nothing yet"
    return "a torn line" if lines[-1] else "whole lines"


def main(model, data, folder, seed):
    files.ROWS_AT_ONCE = 20
    torch.set_num_threads(1)  # a fork would lose the others
    scorer = Scorer.from_pretrained(model, device="cpu")  # once, so that all kills are while it scores
    draw = random.Random(seed)
    undisturbed = Path(folder, "undisturbed.jsonl")
    started = time.perf_counter()
    run(scorer, data, str(undisturbed))
    duration = time.perf_counter() - started
    kills = 0
    finished = 0
    states = set()
    while kills < KILLS:
        output = Path(folder, f"killed-{finished}.jsonl")
        while kills < KILLS and run(scorer, data, str(output), draw.uniform(0, duration)):
            kills += 1
            states.add(state_of(Path(f"{output}.part")))
        if not output.exists():
            run(scorer, data, str(output))
        assert output.read_bytes() == undisturbed.read_bytes(), output
        finished += 1
    print(f"{kills} kills, {finished} files equal; seen: {', '.join(sorted(states))}")


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
