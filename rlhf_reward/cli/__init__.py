"The command `rlhf_reward`: each of its commands has a module, which is imported without torch."
import argparse
import difflib
import logging
import sys
from typing import Callable, NamedTuple, Optional

from rlhf_reward.cli.arguments import leave_process_group, parse_columns, write_any_text
from rlhf_reward.cli.audit_command import audit, audit_parser
from rlhf_reward.cli.average_command import average, average_parser
from rlhf_reward.cli.calibrate_command import calibrate, calibrate_parser
from rlhf_reward.cli.completion_command import completion, completion_parser
from rlhf_reward.cli.config import as_options, options_by_name
from rlhf_reward.cli.convert_command import convert, convert_parser
from rlhf_reward.cli.env_command import env, env_parser
from rlhf_reward.cli.evaluate_command import evaluate, evaluate_parser
from rlhf_reward.cli.laplace_command import laplace, laplace_parser
from rlhf_reward.cli.parser import CommandParser, HelpFormatter
from rlhf_reward.cli.score_command import score, score_parser
from rlhf_reward.cli.serve_command import serve, serve_parser
from rlhf_reward.cli.train_command import SYNTHETIC, TrainArguments, parse_train, train
from rlhf_reward.cli.train_help import train_parser
from rlhf_reward.cli.verify_command import verify, verify_parser

__all__ = [
    "SYNTHETIC",
    "Command",
    "TrainArguments",
    "audit",
    "average",
    "calibrate",
    "completion",
    "convert",
    "env",
    "evaluate",
    "laplace",
    "main",
    "parse_columns",
    "parse_train",
    "score",
    "serve",
    "train",
    "verify",
]


class Command(NamedTuple):
    "One command: it is complete with a line in `COMMANDS`."

    run: Callable[[list[str]], object]  # with the arguments of the command
    parser: Callable[[], CommandParser]  # of its arguments, for help and completion
    summary: str  # of one line


COMMANDS = {
    "audit": Command(
        audit, audit_parser, "report what a file of preferences contains and what would spoil a training run"
    ),
    "train": Command(train, train_parser, "train a reward model on comparisons, evaluate it and save it"),
    "evaluate": Command(
        evaluate, evaluate_parser, "report how often models agree with people, with confidence intervals"
    ),
    "score": Command(score, score_parser, "write the rows of a file with their rewards"),
    "serve": Command(serve, serve_parser, "serve rewards over HTTP, also in the formats of vLLM and OpenRLHF"),
    "verify": Command(
        verify, verify_parser, "compare rewards with those of a server or another library, and name why they differ"
    ),
    "convert": Command(
        convert, convert_parser, "write a reward model of another library as a checkpoint that every tool opens"
    ),
    "average": Command(average, average_parser, "write one reward model from several, the mean of their weights"),
    "calibrate": Command(
        calibrate, calibrate_parser, "measure the mean reward by length, to subtract it with --calibrated"
    ),
    "laplace": Command(laplace, laplace_parser, "add to a model how sure its rewards are, for --uncertainty"),
    "env": Command(env, env_parser, "print the versions that a bug report needs"),
    "completion": Command(completion, completion_parser, "print a script with which the shell completes the command"),
}


def main(
    argv: Optional[list[str]] = None,  # by default the arguments of the process
) -> None:
    "Run the command `rlhf_reward`; without arguments print its help."
    write_any_text()
    argv = sys.argv[1:] if argv is None else argv
    name, rest = _chosen(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at every start it warns of what a CPU does not have
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings; the root logger would once more
    try:
        COMMANDS[name].run(rest)
    except KeyboardInterrupt as stop:  # such as while it imports torch; some commands end in a line of their own
        print(f"\nrlhf_reward {name}: stopped by SIGINT.", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))
    except SystemExit as stop:
        if isinstance(stop.code, str):  # a message of the library
            stop.code = as_options(stop.code, options_by_name(COMMANDS[name].parser()))
        raise
    finally:
        leave_process_group()


def _chosen(argv):
    "Return the name of the command and its arguments. Exit with help, the version, or a message."
    from rlhf_reward import __version__

    parser = argparse.ArgumentParser(
        "rlhf_reward",
        description="Reward models for RLHF, from rows of human preference.",
        epilog="`rlhf_reward COMMAND --help` lists the options of a command that are used most, --help-all lists all. "
        "`rlhf_reward COMMAND --print_config` writes their values as a YAML file, which the command reads.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rlhf_reward {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=command.summary)
    if not argv:
        parser.print_help()
        parser.exit()
    if argv[0] in COMMANDS:
        return argv[0], argv[1:]
    if not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(COMMANDS)}."
        parser.error(f"unknown command {argv[0]!r}{hint}")
    if argv[0] not in ("-h", "--help", "--version"):
        parser.error(f"{argv[0]!r} comes before the command; expected one of {', '.join(COMMANDS)} first.")
    parser.parse_args(argv[:1])  # which exits
