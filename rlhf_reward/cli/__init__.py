"The command `rlhf_reward`: each of its commands has a module, which is imported without torch."
import argparse
import logging
import sys
from typing import Optional

from rlhf_reward.cli.arguments import leave_process_group, parse_columns, write_any_text
from rlhf_reward.cli.audit_command import audit
from rlhf_reward.cli.calibrate_command import calibrate
from rlhf_reward.cli.convert_command import convert
from rlhf_reward.cli.evaluate_command import evaluate
from rlhf_reward.cli.laplace_command import laplace
from rlhf_reward.cli.score_command import score
from rlhf_reward.cli.serve_command import serve
from rlhf_reward.cli.train_command import SYNTHETIC, TrainArguments, parse_train, train
from rlhf_reward.cli.verify_command import verify

__all__ = [
    "SYNTHETIC",
    "TrainArguments",
    "audit",
    "calibrate",
    "convert",
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

COMMANDS = {
    "train": (train, "train a reward model on comparisons, evaluate it and save it"),
    "score": (score, "write the rows of a file with their rewards"),
    "evaluate": (evaluate, "report how often models agree with people, with confidence intervals"),
    "serve": (serve, "serve rewards over HTTP, also in the formats of vLLM and OpenRLHF"),
    "verify": (verify, "compare rewards with those of a server or another library, and name why they differ"),
    "audit": (audit, "report what a file of preferences contains and what would spoil a training run"),
    "calibrate": (calibrate, "measure the mean reward by length, to subtract it with --calibrated"),
    "laplace": (laplace, "add to a trained model how sure its rewards are, from one pass over comparisons"),
    "convert": (convert, "write a reward model of another library as a checkpoint that every tool opens"),
}


def main(
    argv: Optional[list[str]] = None,  # by default the arguments of the process
) -> None:
    "Run the command `rlhf_reward`."
    from rlhf_reward import __version__

    write_any_text()
    parser = argparse.ArgumentParser(
        "rlhf_reward",
        description="Reward models for RLHF, from rows of human preference.",
        epilog="`rlhf_reward COMMAND --help` lists the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"rlhf_reward {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=summary)
    chosen, rest = parser.parse_known_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at every start it warns of what a CPU does not have
    command, _ = COMMANDS[chosen.command]
    try:
        command(rest)
    except KeyboardInterrupt as stop:  # such as while it imports torch; some commands end in a line of their own
        print(f"\nrlhf_reward {chosen.command}: stopped by SIGINT.", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))
    finally:
        leave_process_group()
