"""
Lengths of HH-RLHF, as `against_trl.py` reads them: [prompt, chosen, rejected] in tokens of a byte-level BPE of 8,192 entries, trained on its own texts.

    python benchmarks/hh_lengths.py hh_lengths.json [test.jsonl.gz]

The comparisons are those of harmless-base, test: from the hub (Anthropic/hh-rlhf), or from a local copy of its file.
"""
import argparse
import json
from pathlib import Path

from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer

from rlhf_reward.data import load_rows, to_comparison


def lengths(rows):
    "Tokens of the prompt and of the two responses of each row."
    comparisons, tokenizer = list(map(to_comparison, rows)), ByteLevelBPETokenizer()
    tokenizer.train_from_iterator((comparison.prompt + response for comparison in comparisons for response in comparison.responses), vocab_size=8192, show_progress=False)
    return [[len(tokenizer.encode(text).ids) for text in (comparison.prompt, *comparison.responses)] for comparison in comparisons]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="where the JSON list goes")
    parser.add_argument("file", nargs="?", help="a local test.jsonl.gz of harmless-base (default: from the hub)")
    options = parser.parse_args()
    rows = load_rows(options.file) if options.file else load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="test")
    Path(options.output).write_text(json.dumps(lengths(rows)))
