"Types of arguments that are files: a file that does not exist is an error of the arguments, not a traceback."
import argparse
from pathlib import Path


def existing(text):
    "Return the name of a file or folder that exists."
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} does not exist; expected a file of rows.")
    return text


def existing_path(text):
    "Return the path of a file or folder that exists."
    return Path(existing(text))


def existing_or_synthetic(text):
    "Return the name of a file that exists, or synthetic."
    return text if text == "synthetic" else existing(text)


def kind_and_file(text):
    "Return the kind of a file of `against_trl.py`, and its name."
    kind, _, file = text.partition("=")
    if kind not in ("hh", "pairs", "ranked"):
        raise argparse.ArgumentTypeError(f"{text!r} has no kind; expected hh=FILE, pairs=FILE or ranked=FILE.")
    return kind, existing(file)
