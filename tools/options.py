"""
Write rlhf_reward/cli/train_options.json, from which `rlhf_reward train --help` is printed without transformers.

`python tools/options.py` in the root of the project, after a change of the options or of the version of transformers.
"""
import json
from importlib.metadata import version

from rlhf_reward.cli.train_help import TABLE, options_of_train


def table_text():
    "Return the file: one line an option."
    lines = [json.dumps(option, ensure_ascii=False) for option in options_of_train()]
    options = ",\n".join(lines)
    return f'{{"transformers": "{version("transformers")}", "options": [\n{options}\n]}}\n'


if __name__ == "__main__":
    TABLE.write_text(table_text(), encoding="utf-8")
