"""Stopping a training from outside, so that nothing is lost: the signals that schedulers send before they kill."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nnunet_topomae.nnunet.data.stream import end_children

STOPPED = os.EX_TEMPFAIL  # exit status 75: a training that was asked to stop, and can go on with --c
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of kill, and what SLURM sends with --signal=USR1@60


class StopRequest:
    """Whether this process was asked to stop, by SIGTERM or SIGUSR1.

    Attributes:
        training: whether steps are being made, after each of which someone looks at ``name``. Otherwise nothing is
            lost if it ends, and a signal ends the process at once, with the exit status ``STOPPED``.
        name: of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.training = False
        self.name: str | None = None
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for a while; in the main thread only, as Python has it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            self.training = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked since, such as by a pool, which ends its processes with SIGTERM
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name = signal.Signals(number).name
        if not self.training:
            _end_now()


def _end_now() -> None:
    """End this process and those that it has started; Python's way would wait for any that was ended by the signal."""
    end_children()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STOPPED)
