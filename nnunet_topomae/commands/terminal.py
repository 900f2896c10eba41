"""What the commands share: writing to the terminal, types of options, and options of several commands."""

import argparse
import sys
from collections.abc import Callable
from typing import TextIO

NUM_VAL = 5  # validation cases, unless asked for otherwise
SPLIT_SEED = 12345  # nnU-Net's, unless asked for otherwise


def say(text: object, file: TextIO | None = None) -> None:
    """Write a line; what a command prints is its result, not a log."""
    stream = file or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def positive(kind: type) -> Callable[[str], float]:
    """A type for options that must be numbers above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {'whole number' if kind is int else 'number'}"  # argparse names it in its message
    return parse


def add_held_out_options(parser: argparse.ArgumentParser, usual_test: str, seed: str) -> None:
    """Add the options that say which cases a random split holds out.

    Args:
        parser: of a sub-command.
        usual_test: how many test cases there are without ``--test``, for the help.
        seed: name of the option with the seed of the split.
    """
    count = positive(int)
    parser.add_argument("--val", type=count, metavar="N", help=f"validation cases (default: {NUM_VAL})")
    parser.add_argument("--test", type=count, metavar="N", help=f"test cases (default: {usual_test})")
    parser.add_argument(
        "--patient",
        metavar="PATTERN",
        help="regular expression that finds the patient in the name of a case; validation and test patients are kept "
        "whole (default: every case is another patient)",
    )
    parser.add_argument(seed, type=int, metavar="N", help=f"seed of the random split (default: {SPLIT_SEED})")
