"""
The data of `generalize.py`: messages under a number of characters, split by prompt, drawn with a seed.
"""
import random
from pathlib import Path

from rlhf_reward import load_rows
from rlhf_reward.data import to_comparison


def messages(role, text):
    "Return a text as a conversation of one message."
    return [{"role": role, "content": text}]


def read_rows(
    file: Path, # pairs or ranked responses, prompt and responses as strings
    max_characters: int, # of the prompt with its longest response
) -> list[dict]: # rows of messages, with the prompt's text as `key`
    "Read the comparisons with a right and a wrong response that are short enough."
    rows = []
    for row in load_rows(str(file)):
        comparison = to_comparison(row)
        longest = max(len(response) for response in comparison.responses)
        is_short = len(comparison.prompt) + longest < max_characters
        if not is_short or max(comparison.ranks) == 1:
            continue
        rows.append({
            "prompt": messages("user", comparison.prompt),
            "responses": [messages("assistant", response) for response in comparison.responses],
            "ranks": list(comparison.ranks),
            "source": str(comparison.source or file.stem),
            "key": comparison.prompt,
        })
    random.Random(0).shuffle(rows)
    return rows


def first_responses(
    rows: list[dict], # from `read_rows`, in an order that was drawn with a seed
    most: int, # responses
) -> list[dict]:
    "Return the first rows that have at most so many responses together."
    kept = []
    for row in rows:
        most -= len(row["responses"])
        if most < 0:
            break
        kept.append(row)
    return kept


def split_by_prompt(
    rows: list[dict], # from `read_rows`
    share: float, # of the prompts in the second part
) -> tuple[list[dict], list[dict]]: # no prompt is in both
    "Split rows so that all comparisons of a prompt are on one side."
    prompts = sorted({row["key"] for row in rows})
    random.Random(1).shuffle(prompts)
    second = set(prompts[: round(share * len(prompts))])
    return [row for row in rows if row["key"] not in second], [row for row in rows if row["key"] in second]
