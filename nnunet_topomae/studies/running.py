"""``nnUNetv2_topomae study run``: nnU-Net's own commands, one after another, until all is done or the time is up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_topomae import trainers
from nnunet_topomae.files import take_lock
from nnunet_topomae.studies.results import measure_study
from nnunet_topomae.studies.steps import Step, Steps

_LOCK = ".lock"
_TAIL = 15  # lines of a log
_GRACE = 30  # seconds that a command has to stop
_POLL = 1  # second


class TimeIsUpError(RuntimeError):
    """The time limit has been reached."""


@dataclass
class Runner:
    """Runs what is missing in a study.

    Attributes:
        steps: of the study.
        say: told what is done.
        show: called whenever a command begins, with what is done now, and when all has ended.
        deadline: when to stop, as ``time.monotonic()`` counts; None for never.
        failed: the step that failed, by row.
    """

    steps: Steps
    say: Callable[[str], None]
    show: Callable[["Runner", str], None]
    deadline: float | None = None
    failed: dict[str, Step] = field(default_factory=dict)

    def run(self) -> None:
        """Run all commands in order of information; measure each run when it has been predicted.

        A failed command ends its row, the others go on.

        Raises:
            TimeIsUpError: at the deadline; the command that was running has been stopped, and is continued next time.
            FileNotFoundError, ValueError: see :meth:`Steps.check`; nothing has been run then.
        """
        self.steps.check()
        with self._alone() as lock:
            self.steps.link_test_images()
            measure_study(self.steps, self.say)
            for row, run in self.steps.study.runs():
                if row.name in self.failed:
                    continue
                ran = [self._execute(step, row.name, lock) for step in self.steps.of_run(row, run) if not step.is_done]
                if any(ran):
                    measure_study(self.steps, self.say)
        self.show(self, "")

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Wait until no other ``study run`` works on the study, nor a command that a killed one has left behind.

        Commands inherit the lock, so it is held until the last of them has ended.
        """
        with (self.steps.study.folder / _LOCK).open("ab") as stream:
            waiting = False
            while not take_lock(stream, lambda said: self.say(f"WARNING: {said}"), inherited=True):
                if not waiting:
                    self.say("Waiting for a command that another study run has started (see the newest log)")
                waiting = True
                self._check_time()
                time.sleep(_POLL)
            yield stream.fileno()

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise TimeIsUpError("the time is up; the same command goes on from here")

    def _execute(self, step: Step, row: str, lock: int) -> bool:
        """Run a step unless an earlier one of its row has failed; whether it succeeded."""
        if row in self.failed:
            return False
        if step.name in {other.name for other in self.failed.values()}:  # a pre-training that rows share
            self.failed[row] = step
            return False
        self._check_time()
        self.show(self, step.name)
        if step.partial:
            shutil.rmtree(step.partial, ignore_errors=True)
            step.partial.parent.mkdir(exist_ok=True)
        status = self._call(step, lock)
        if status:
            self.failed[row] = step
            self.say(f"{step.name} failed with exit status {status}; {self.log(step)} ends:\n{self._tail(step)}")
            return False
        if step.partial:
            step.partial.rename(step.folder)
        return True

    def log(self, step: Step) -> Path:
        """The file that the output of a step is appended to."""
        return self.steps.study.folder / "logs" / f"{step.name}.log"

    def _tail(self, step: Step) -> str:
        lines = self.log(step).read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-_TAIL:])

    def _call(self, step: Step, lock: int) -> int:
        """Exit status of a command; it is stopped with all of its processes if this one is, or at the deadline."""
        words = step.words
        self.log(step).parent.mkdir(exist_ok=True)
        with self.log(step).open("a") as output, _terminated_as_interrupted():
            output.write(f"$ {' '.join(words)}\n")
            output.flush()
            process = subprocess.Popen(
                [executable(words[0]), *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                pass_fds=[lock],
                start_new_session=True,
            )
            try:
                return process.wait(None if self.deadline is None else max(self.deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                self._check_time()
                raise
            finally:
                _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End a command that still runs, and the processes that it has started."""
    if process.poll() is not None:
        return
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, number)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, raises KeyboardInterrupt as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment() -> dict[str, str]:
    """The present one, in which nnU-Net finds the trainers of this package."""
    folders = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
    ours = [str(trainers.FOLDER)] if str(trainers.FOLDER) not in folders else []
    return {**os.environ, "nnUNet_extTrainer": os.pathsep.join(filter(None, [*folders, *ours]))}


def executable(command: str) -> str:
    """The console script beside this Python, else the one on the PATH."""
    beside = Path(sys.executable).parent / command
    return str(beside) if beside.is_file() else command
