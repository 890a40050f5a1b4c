"""
Train a small decoder from scratch on real pairs and evaluate it on others.

    python benchmarks/train_pairs.py TRAIN.jsonl EVAL.jsonl OUTPUT_DIR [arguments of `rlhf_reward train`]

Both files hold `prompt`, `chosen` and `rejected`. A byte-level BPE tokenizer is trained on the texts of TRAIN; the
decoder is a Llama with random weights, so it learns from these pairs alone. Prints the held-out accuracy, and the share
of pairs in which the longer response wins: overall, and by `source`. The trainer reports the pairs a second.
"""
import sys
from pathlib import Path

from rlhf_reward.audit import audit, audit_table
from rlhf_reward.cli import train
from rlhf_reward.data import load_rows
from rlhf_reward.synthetic import tiny_decoder


def main():
    if len(sys.argv) < 4:
        sys.exit(f"train_pairs.py has {len(sys.argv) - 1} arguments; expected TRAIN.jsonl, EVAL.jsonl and OUTPUT_DIR.")
    train_file, eval_file, output_dir, *arguments = sys.argv[1:]
    for file in (train_file, eval_file):
        if not Path(file).exists():
            sys.exit(f"train_pairs.py: {file!r} does not exist; expected a file of rows.")
    texts = []
    for row in load_rows(train_file):
        texts += [row["prompt"], row["chosen"], row["rejected"]]
    base = tiny_decoder(
        Path(output_dir) / "base",
        texts,
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.08,
    )
    files = ["--dataset", train_file, "--eval_dataset", eval_file, "--output_dir", output_dir]
    train(["--model", base, *files, *arguments])
    print("\n" + audit_table(audit(load_rows(eval_file), name=eval_file)))


if __name__ == "__main__":
    main()
