"""
Peak memory of reading and tokenizing synthetic pairs, for several numbers of them.

    python benchmarks/tokenize_memory.py 10000 1000000

Each size runs in its own process, from a JSONL file to token ids in the cache of `datasets`. Two peaks are reported:
the memory that the process holds (anonymous; this must not grow with the data), and its resident set, which also counts
the pages of the cache files that the system keeps mapped while there is room. Linux only, since it reads /proc.
"""
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def write_pairs(path, number, seed=0, of_prompt=30, longest=40):
    "Write as many pairs of random words as JSON lines, with so many words in a prompt and in the longest response."
    draw = random.Random(seed)
    words = [f"word{n}" for n in range(1000)]

    def text(length):
        return " ".join(draw.choices(words, k=length))

    with path.open("w") as file:
        for _ in range(number):
            row = {
                "prompt": text(of_prompt),
                "chosen": text(draw.randint(5, longest)),
                "rejected": text(draw.randint(5, longest)),
            }
            file.write(json.dumps(row) + "\n")


def memory(field):
    "Return a field of this process's status, in MiB."
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


class PeakMemory:
    "Watch the anonymous memory of this process in a thread, as a context manager."

    def __enter__(self):
        self.peak = 0.0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.02):
            self.peak = max(self.peak, memory("RssAnon"))

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()


def tokenize(folder):
    "Print the seconds and the peaks of tokenizing the folder's pairs. Runs in its own process."
    from transformers import AutoTokenizer

    from rlhf_reward import load_rows, tokenize_rows
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder(folder / "model", synthetic_texts()))
    before = memory("RssAnon")
    with PeakMemory() as watched:
        start = time.perf_counter()
        tokenized = tokenize_rows(load_rows(str(folder / "pairs.jsonl")), tokenizer, 2048)
        seconds = time.perf_counter() - start
    result = {
        "pairs": len(tokenized),
        "seconds": seconds,
        "before": before,
        "anonymous": watched.peak,
        "resident": memory("VmHWM"),
    }
    print(json.dumps(result))


def measure(size):
    "Return what `tokenize` prints, for so many pairs."
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "pairs.jsonl", size)
        child = subprocess.run(
            [sys.executable, __file__, "--in", folder],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HOME": folder},
        )
    return json.loads(child.stdout.splitlines()[-1])


def main(sizes):
    print(f"{'pairs':>9} {'seconds':>8} {'before':>8} {'peak, held':>11} {'peak, resident':>15}   (MiB)")
    peaks = []
    for size in sizes:
        result = measure(size)
        peaks.append(result["anonymous"])
        print(
            f"{result['pairs']:>9} {result['seconds']:>8.1f} {result['before']:>8.0f} "
            f"{result['anonymous']:>11.0f} {result['resident']:>15.0f}",
            flush=True,
        )
    print(f"largest difference of what is held: {max(peaks) - min(peaks):.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1] == "--in":
        tokenize(Path(sys.argv[2]))
    else:
        main([int(size) for size in sys.argv[1:]])
