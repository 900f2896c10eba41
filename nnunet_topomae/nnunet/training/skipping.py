"""Steps whose loss is NaN or inf: they are not made but noted, and too many in a row end a run."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_topomae.nnunet.training.distribution import in_any_process

_FILE = "skipped_steps.jsonl"
_MAX_IN_ROW = 10


class NotFiniteError(ValueError):
    """The loss of a step is NaN or inf.

    Args:
        said: a sentence that names the cases.
        terms: of the loss, by name.
    """

    def __init__(self, said: str, terms: dict[str, float] | None = None):
        super().__init__(said)
        self.terms = terms or {}


def agree(error: NotFiniteError | None, device: torch.device) -> None:
    """Raise an error that this process has, or another one, as either all processes make a step or none.

    Raises:
        NotFiniteError: this process's own if it has one.
    """
    if in_any_process(error is not None, device):
        raise error or NotFiniteError("the loss is NaN or inf in another process")


class FiniteSteps:
    """Makes the steps of a training whose loss is finite, and writes down the others.

    Args:
        network: what is trained.
        folder: of the run, in which ``skipped_steps.jsonl`` is written.
        log: prints a sentence.
    """

    def __init__(self, network: nn.Module, folder: Path, log: Callable[[str], None]):
        self._file, self._log = folder / _FILE, log
        self._modules = [module for module in network.modules() if any(True for _ in module.buffers(recurse=False))]
        self._in_row = 0

    def make(self, attempt: Callable[[], dict], *, epoch: int, step: int, cases: Sequence[str]) -> dict:
        """Make a step; what it has changed is put back if its loss is NaN or inf.

        Args:
            attempt: makes the step; raises a :class:`NotFiniteError` before parameters are changed.
            epoch: of the step.
            step: its number within the epoch.
            cases: in its batch.

        Returns:
            What ``attempt`` returns; nothing for a step that was not made.

        Raises:
            ValueError: after ten such steps in a row.
        """
        before = [buffer.clone() for buffer in self._buffers()]  # such as the running means of BatchNorm
        try:
            output = attempt()
        except NotFiniteError as error:
            for buffer, values in zip(self._buffers(), before, strict=True):
                buffer.data.copy_(values)
            self._note(error, {"epoch": epoch, "step": step, "cases": list(cases), "terms": error.terms})
            return {}
        self._in_row = 0
        return output

    def _buffers(self) -> Iterator[Tensor]:
        """All buffers; to ask the few modules that have any takes a tenth of the time of asking the network."""
        return (buffer for module in self._modules for buffer in module.buffers(recurse=False))

    def _note(self, error: NotFiniteError, said: dict) -> None:
        """Write down the cases and the terms of the loss of a step that was not made."""
        self._in_row += 1
        with self._file.open("a") as stream:
            stream.write(json.dumps(said) + "\n")
        self._log(f"WARNING: a step was not made: {error}")
        if self._in_row == _MAX_IN_ROW:
            raise ValueError(f"{_MAX_IN_ROW} steps in a row could not be made, see {self._file}; the last one: {error}")
