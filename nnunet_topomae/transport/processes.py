"""Processes that match persistence diagrams while the training goes on.

Python runs one of its threads at a time. Matching is half numpy calls that take microseconds each, so in threads it
would keep the training from telling the GPU what to do next. Other processes do not.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from io import BufferedReader, FileIO
from queue import SimpleQueue
from typing import Any, TypeVar, cast

Answer = TypeVar("Answer")

_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # a process that sees a GPU may take memory of it
    "OMP_NUM_THREADS": "1",
    **{f"POT_BACKEND_DISABLE_{name}": "1" for name in ("CUPY", "JAX", "PYTORCH", "TENSORFLOW")},  # memory and seconds
}
_SERVE = """
import signal, sys
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # schedulers send them to all processes; the program decides when to end
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
sys.path[:] = {path!r}
from {module} import serve
serve()
"""
_PATIENCE = 10  # seconds that a process whose pipe has broken is given to end


class Processes:
    """Processes that are started at once and end with the program, even when it is killed.

    Unlike those of ``multiprocessing`` they do not import the main script, so that scripts need no guard around it.

    Args:
        number: of processes.
    """

    def __init__(self, number: int):
        self._number = number
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in [_Process() for _ in range(number)]:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes, after the calls that are being answered."""
        for _ in range(self._number):
            self._idle.get().end()

    def run(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """Call a function in a process that has nothing to do, and wait for its answer.

        Args:
            function: of a module that a process can import. What it warns of is printed, not raised.
            arguments: of the function; they and the answer are copied by pickle.

        Raises:
            RuntimeError: if the function raises an exception, or the process ends. Another one takes its place.
        """
        call = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        process = self._idle.get()
        try:
            error, answer = process.ask(call)
        except BaseException:
            process.end()  # whoever asks it next would read the answer to this call
            process = _Process()
            raise
        finally:
            self._idle.put(process)
        if error is not None:
            raise RuntimeError(f"a process that matches persistence diagrams failed:\n{error}")
        return cast(Answer, answer)


class _Process:
    """One process, and the pipes to it and from it."""

    def __init__(self) -> None:
        code = _SERVE.format(path=[str(each) for each in sys.path], module=__name__)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # else Ctrl+C could end it before it has come to ignore that
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._calls, self._answers = self._process.stdin, BufferedReader(cast(FileIO, self._process.stdout))
        _ALIVE.add(self)

    def ask(self, call: bytes) -> tuple[str | None, Any]:
        """Send a call; the traceback of its exception, if it raises one, and its answer."""
        try:
            rest = memoryview(call)
            while rest:
                rest = rest[self._calls.write(rest) :]
            return cast(tuple[str | None, Any], pickle.load(self._answers))
        except (EOFError, BrokenPipeError) as error:
            try:
                status: int | None = self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                status = None
            raise RuntimeError(
                f"a process that matches persistence diagrams has ended (exit status {status}). Messages above may say "
                "why; if there are none, the machine may have run out of memory"
            ) from error

    def end(self) -> None:
        """Kill it; it has nothing to lose."""
        _ALIVE.discard(self)
        self._process.kill()
        self._process.wait()
        self._calls.close()
        self._answers.close()

    def forget(self) -> None:
        """In a fork of the program: close its copy of the pipe, which would keep the process waiting for calls."""
        self._calls.close()


_ALIVE: set[_Process] = set()


def _forget_all() -> None:
    for process in _ALIVE:
        process.forget()
    _ALIVE.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_forget_all)


def usable_cores() -> int:
    """How many cores the program may use: a scheduler may give it only some of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # not on Windows and macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve() -> None:
    """What a process does: answer calls that come by its standard input until that is closed."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # else whatever a library prints would end up among the answers
    while True:
        try:
            function, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            answer = pickle.dumps((None, function(*arguments)), pickle.HIGHEST_PROTOCOL)
        except Exception:
            answer = pickle.dumps((traceback.format_exc(), None), pickle.HIGHEST_PROTOCOL)
        try:
            answers.write(answer)
            answers.flush()
        except BrokenPipeError:  # the program was killed meanwhile
            os._exit(1)
