"""
Peak memory of reading and tokenizing synthetic pairs, for several numbers of them.

    python benchmarks/tokenize_memory.py 10000 1000000

Each size runs in a process of its own, from a JSONL file to token ids in the cache of `datasets`. Two peaks are given: of the
memory that the process holds (anonymous; this must not grow with the data), and of its resident set, which also counts the
pages of the cache files that the system keeps mapped while there is room. Linux only, since it reads /proc.
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


def write_pairs(path, number, seed=0):
    draw = random.Random(seed)
    words = [f"word{n}" for n in range(1000)]
    text = lambda length: " ".join(draw.choices(words, k=length))
    with path.open("w") as file:
        for _ in range(number):
            file.write(json.dumps({"prompt": text(30), "chosen": text(draw.randint(5, 40)), "rejected": text(draw.randint(5, 40))}) + "\n")


def memory(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def tokenize(folder):
    "In a process of its own: print the seconds and the peaks."
    from transformers import AutoTokenizer

    from rlhf_reward import load_rows, tokenize_rows
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder(folder / "model", synthetic_texts()))
    before, peak, done = memory("RssAnon"), 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    tokenized = tokenize_rows(load_rows(str(folder / "pairs.jsonl")), tokenizer, 2048)
    seconds = time.perf_counter() - start
    done.set(), watcher.join()
    print(json.dumps({"pairs": len(tokenized), "seconds": seconds, "before": before, "anonymous": peak, "resident": memory("VmHWM")}))


def main(sizes):
    print(f"{'pairs':>9} {'seconds':>8} {'before':>8} {'peak, held':>11} {'peak, resident':>15}   (MiB)")
    peaks = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder) / "pairs.jsonl", size)
            child = subprocess.run([sys.executable, __file__, "--in", folder], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True, env={**os.environ, "HF_HOME": folder})
            result = json.loads(child.stdout.splitlines()[-1])
            peaks.append(result["anonymous"])
            print(f"{result['pairs']:>9} {result['seconds']:>8.1f} {result['before']:>8.0f} {result['anonymous']:>11.0f} {result['resident']:>15.0f}", flush=True)
    print(f"largest difference of what is held: {max(peaks) - min(peaks):.0f} MiB")


if __name__ == "__main__":
    tokenize(Path(sys.argv[2])) if sys.argv[1] == "--in" else main(list(map(int, sys.argv[1:])))
