"""What nnU-Net's command ``nnUNetv2_train`` does differently where it trains with a trainer of this package.

nnU-Net offers nothing to override at these two places, so a function of it, and one of Python, are replaced. All other
trainers get what they get without us.
"""

import dis
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol
from weakref import WeakSet

import torch
from nnunetv2.run import run_training
from torch import nn

FAILED = 2  # exit status
_MENDABLE = (ValueError, RuntimeError, OSError, AssertionError)  # what nnU-Net and this package say of wrong input
_SPEAKING = ("nnunet_topomae", "nnunetv2")  # packages whose RuntimeErrors are meant for the user
_OUT_OF_MEMORY = (
    "the GPU has too little memory: set a smaller batch_size or patch_size in a copy of the plans, or plan again with "
    "-gpu_memory_target and the GB that it has ({})"
)


class TakesWeights(Protocol):
    """A trainer that loads a file given with ``-pretrained_weights`` itself."""

    network: nn.Module
    log_file: str

    def start_from(self, file: Path) -> None:
        """Load the weights in a file."""


_trainers: WeakSet = WeakSet()
_load_as_nnunet = run_training.load_pretrained_weights
_show_traceback = sys.excepthook


def register(trainer: TakesWeights) -> None:
    """Let a trainer itself load what is given with ``-pretrained_weights``.

    nnU-Net's command makes the trainer, initialises it and then calls ``load_pretrained_weights(network, file)``, which
    first of all unpickles the file, and so would run code in it; between these calls there is no hook. That function is
    the narrowest place to come in: it is told the file as nnU-Net has parsed it, however it was written on the command
    line, and it is called in the same way in every process of ``-num_gpus``.
    """
    _trainers.add(trainer)
    run_training.load_pretrained_weights = _load


def _load(network: nn.Module, file: str, verbose: bool = False) -> None:
    for trainer in _trainers:
        if trainer.network is network:
            trainer.start_from(Path(file))
            return
    _load_as_nnunet(network, file, verbose)


def answer_in_one_sentence(parent: type) -> None:
    """Let errors that a user can mend end ``nnUNetv2_train -tr OURS`` with one sentence and the exit status 2.

    The traceback is written to the log of the training, if there is one by then, and the log is named. Errors that
    point to a mistake in code are shown as ever.

    Args:
        parent: what all trainers of this package are derived from.
    """

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if not _is_mendable(error, where) or not _named_on_command_line(parent):
            _show_traceback(kind, error, where)
            return
        sys.stderr.write(f"Error: {_sentence(error, where)}\n")
        for log in {Path(trainer.log_file) for trainer in _trainers}:
            if _append("".join(traceback.format_exception(kind, error, where)), log):
                sys.stderr.write(f"The traceback is in {log}\n")
        raise SystemExit(FAILED)

    sys.excepthook = hook


def _is_mendable(error: BaseException, where: TracebackType | None) -> bool:
    """Whether an error tells a user of wrong input; bare assertions and errors inside PyTorch are mistakes in code."""
    if isinstance(error, AssertionError):
        return bool(str(error))
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return _raised_on_purpose(where)
    return isinstance(error, _MENDABLE)


def _raised_on_purpose(where: TracebackType | None) -> bool:
    """Whether an error comes from a ``raise`` of nnU-Net or of this package, and not from what they call."""
    if where is None:
        return False
    while where.tb_next is not None:
        where = where.tb_next
    package = where.tb_frame.f_globals.get("__name__", "").split(".")[0]
    return package in _SPEAKING and where.tb_frame.f_code.co_code[where.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _named_on_command_line(parent: type) -> bool:
    names = {trainer.__name__ for trainer in _derived(parent)}
    return any(argument.removeprefix("-tr=") in names for argument in sys.argv[1:])


def _derived(parent: type) -> Iterator[type]:
    children: list[type] = parent.__subclasses__()
    for child in children:
        yield child
        yield from _derived(child)


def _sentence(error: BaseException, where: TracebackType | None) -> str:
    """What is said of an error; nnU-Net does not name a file that is no JSON, or no UTF-8."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        files = [frame.f_locals.get("file") for frame, _ in traceback.walk_tb(where)]
        return f"{next((file for file in reversed(files) if file), 'a file')} is no valid JSON: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return _OUT_OF_MEMORY.format(str(error).partition(". GPU")[0])
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist{_hint(str(error.filename))}"
    return str(error) or type(error).__name__


def _hint(file: str) -> str:
    """What may be wrong if plans are missing."""
    if not file.endswith(".json") or "nnUNet_preprocessed" not in os.environ:
        return ""
    there = sorted(path.stem for path in Path(file).parent.glob("*lans*.json"))
    return f"; -p takes {' or '.join(map(shlex.quote, there))} there" if there else "; plan the dataset first"


def _append(text: str, log: Path) -> bool:
    """Add a text to a log; whether that could be done, as on a full disk the sentence is shown all the same."""
    try:
        with log.open("a") as stream:
            stream.write(text)
    except OSError:
        return False
    return True
