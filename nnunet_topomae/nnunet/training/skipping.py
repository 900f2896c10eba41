"""Steps and batches of validation whose loss is NaN or inf: they are noted and do not count; too many end a run."""

import json
import math
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
    """Makes the steps of a training whose loss is finite, and writes down the others; of validation, too.

    Args:
        network: what is trained.
        folder: of the run, in which ``skipped_steps.jsonl`` is written.
        log: prints a sentence.

    Attributes:
        file: in which they are written down.
    """

    def __init__(self, network: nn.Module, folder: Path, log: Callable[[str], None]):
        self.file, self._log = folder / _FILE, log
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
            self._note(error, {"epoch": epoch, "step": step, "cases": list(cases)})
            self._log(f"WARNING: a step was not made: {error}")
            self._count(error)
            return {}
        self._in_row = 0
        return output

    def validate(self, attempt: Callable[[], dict], *, epoch: int, batch: int, cases: Sequence[str]) -> dict:
        """Validate on a batch, which leaves the network as it is.

        Args:
            attempt: computes the loss; raises a :class:`NotFiniteError`.
            epoch: of the batch.
            batch: its number within the epoch.
            cases: in it.

        Returns:
            What ``attempt`` returns; nothing if the loss is NaN or inf.
        """
        try:
            return attempt()
        except NotFiniteError as error:
            self._note(error, {"epoch": epoch, "validation_batch": batch, "cases": list(cases)})
            self._log(f"WARNING: a batch of validation does not count: {error}")
            return {}

    def _buffers(self) -> Iterator[Tensor]:
        """All buffers; to ask the few modules that have any takes a tenth of the time of asking the network."""
        return (buffer for module in self._modules for buffer in module.buffers(recurse=False))

    def _note(self, error: NotFiniteError, where: dict) -> None:
        """Write down where a loss was NaN or inf, and its terms; JSON knows no NaN, so these are null."""
        terms = {name: value if math.isfinite(value) else None for name, value in error.terms.items()}
        with self.file.open("a") as stream:
            stream.write(json.dumps({**where, "terms": terms}, allow_nan=False) + "\n")

    def _count(self, error: NotFiniteError) -> None:
        """Count a step that was not made."""
        self._in_row += 1
        if self._in_row == _MAX_IN_ROW:
            raise ValueError(f"{_MAX_IN_ROW} steps in a row could not be made, see {self.file}; the last one: {error}")
