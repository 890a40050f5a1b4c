"""
Peak memory of mixing and tokenizing synthetic pairs of three sets, for several numbers of them.

    python benchmarks/mixture_memory.py 10000 1000000

The sets are strings in JSONL, verdicts in CSV and messages in Parquet, with the shares 0.6, 0.3 and 0.1. Each size runs
in its own process, from the files to token ids in the cache of `datasets`. The table is that of tokenize_memory.py:
memory that the process holds (anonymous; this must not grow with the data), and its resident set. Linux only.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenize_memory import PeakMemory, memory, write_pairs

SHARES = {"strings": 0.6, "verdicts": 0.3, "messages": 0.1}
FILES = {"strings": "strings.jsonl", "verdicts": "verdicts.csv", "messages": "messages.parquet"}
WORDS = {"of_prompt": 6, "longest": 8}
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def rows_of(folder, name, number):
    "Yield as many pairs as dicts of random words."
    path = folder / f"{name}.pairs"
    write_pairs(path, number, **WORDS)
    with path.open() as lines:
        yield from map(json.loads, lines)
    path.unlink()


def write_sets(folder, number):
    "Write three sets, of which the first has half again as many rows as are drawn from it."
    write_pairs(folder / FILES["strings"], round(1.5 * SHARES["strings"] * number), **WORDS)
    with (folder / FILES["verdicts"]).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "response_a", "response_b", "winner"))
        for row in rows_of(folder, "verdicts", round(SHARES["verdicts"] * number)):
            writer.writerow((row["prompt"], row["chosen"], row["rejected"], "model_a"))
    write_messages(folder, round(SHARES["messages"] * number))


def write_messages(folder, number):
    "Write messages as Parquet, a thousand rows at a time."
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    part = []
    for index, row in enumerate(rows_of(folder, "messages", number), start=1):
        texts = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        part.append({name: [{"role": role, "content": row[name]}] for name, role in texts.items()})
        if len(part) == 1_000 or index == number:
            table = pa.Table.from_pylist(part)
            writer = writer or parquet.ParquetWriter(folder / FILES["messages"], table.schema)
            writer.write_table(table)
            part = []
    writer.close()


def mix_and_tokenize(folder):
    "Print the seconds and the peaks of mixing the folder's sets, then of tokenizing them. Runs in its own process."
    from transformers import AutoTokenizer

    from rlhf_reward import load_rows, tokenize_rows
    from rlhf_reward.mixtures import mix_rows
    from rlhf_reward.synthetic import synthetic_texts, tiny_decoder

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder(folder / "model", synthetic_texts()))
    tokenizer.chat_template = TEMPLATE
    before = memory("RssAnon")
    with PeakMemory() as watched:
        start = time.perf_counter()

        def show(stage, rows):
            seconds = time.perf_counter() - start
            memories = {"before": before, "anonymous": watched.peak, "resident": memory("VmHWM")}
            print(json.dumps({"stage": stage, "pairs": len(rows), "seconds": seconds, **memories}), flush=True)

        mixture = mix_rows({name: load_rows(str(folder / file)) for name, file in FILES.items()}, SHARES)
        show("loaded and mixed", mixture)
        show("tokenized", tokenize_rows(mixture, tokenizer, 2048))


def measure(size):
    "Yield what `mix_and_tokenize` prints, for so many pairs."
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder), size)
        child = subprocess.Popen(
            [sys.executable, __file__, "--in", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HOME": folder},
        )
        with child:
            yield from map(json.loads, child.stdout)
        if child.returncode:
            raise SystemExit(f"{size} pairs: the process ended with {child.returncode}")


def main(sizes):
    print(f"{'pairs':>9} {'until':>16} {'seconds':>8} {'before':>8} {'peak, held':>11} {'peak, resident':>15}   (MiB)")
    peaks = []
    for size in sizes:
        for result in measure(size):
            print(
                f"{result['pairs']:>9} {result['stage']:>16} {result['seconds']:>8.1f} {result['before']:>8.0f} "
                f"{result['anonymous']:>11.0f} {result['resident']:>15.0f}",
                flush=True,
            )
        peaks.append(result["anonymous"])
    print(f"largest difference of what is held: {max(peaks) - min(peaks):.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, metavar="SIZE", help="numbers of pairs, such as 10000 1000000")
    parser.add_argument("--in", dest="folder", type=Path, help="measure the sets of this folder only, in this process")
    arguments = parser.parse_args()
    if arguments.folder:
        mix_and_tokenize(arguments.folder)
    else:
        main(arguments.sizes)
