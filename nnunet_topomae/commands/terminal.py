"""What the commands share: writing to the terminal, and types of options."""

import sys
from collections.abc import Callable
from typing import TextIO


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
