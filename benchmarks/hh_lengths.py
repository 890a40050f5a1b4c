"""
Lengths of HH-RLHF, as `against_trl.py` reads them: [prompt, chosen, rejected] in tokens.

    python benchmarks/hh_lengths.py hh_lengths.json [test.jsonl.gz]

The comparisons are those of harmless-base, test: from the hub (Anthropic/hh-rlhf), or from a local copy of its file.
The tokens are those of a byte-level BPE of 8,192 entries, trained on the texts.
"""
import argparse
import json
from pathlib import Path

from datasets import load_dataset
from paths import existing
from tokenizers import ByteLevelBPETokenizer

from rlhf_reward.data import load_rows, to_comparison


def lengths(rows):
    "Count the tokens of the prompt and of the two responses of each row."
    comparisons = [to_comparison(row) for row in rows]
    texts = []
    for comparison in comparisons:
        texts += [comparison.prompt + response for response in comparison.responses]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=8192, show_progress=False)
    counts = []
    for comparison in comparisons:
        parts = (comparison.prompt, *comparison.responses)
        counts.append([len(tokenizer.encode(text).ids) for text in parts])
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", help="the JSON file to write")
    file_help = "a local test.jsonl.gz of harmless-base (default: from the hub)"
    parser.add_argument("file", nargs="?", type=existing, help=file_help)
    options = parser.parse_args()
    if options.file:
        rows = load_rows(options.file)
    else:
        rows = load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="test")
    Path(options.output).write_text(json.dumps(lengths(rows)))


if __name__ == "__main__":
    main()
