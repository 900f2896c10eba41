"""Processes that match persistence diagrams while the training goes on.

Python runs one of its threads at a time. Matching is half numpy calls that take microseconds each, so in threads it
would keep the training from telling the GPU what to do next. Other processes do not.
"""

import atexit
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_SERVE = f"from {__name__} import serve; serve()"
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # a process that sees a GPU may take memory of it
    "OMP_NUM_THREADS": "1",
    **{f"POT_BACKEND_DISABLE_{name}": "1" for name in ("CUPY", "JAX", "PYTORCH", "TENSORFLOW")},  # memory and seconds
}


class Processes:
    """Processes that are started at once and end with the program, even when it is killed.

    Unlike those of :mod:`multiprocessing` they do not import the main script, so that scripts need no guard around it.

    Args:
        number: of processes.
    """

    def __init__(self, number: int):
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in [_start() for _ in range(number)]:
            self._idle.put(process)

    def run(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """Call a function in a process that has nothing to do, and wait for its answer.

        Args:
            function: of a module of this package.
            arguments: of the function; they and the answer are copied by pickle.

        Raises:
            RuntimeError: if the process has ended.
            Exception: what the function raises.
        """
        process = self._idle.get()
        try:
            raised, answer = _ask(process, function, arguments)
        finally:
            self._idle.put(process)
        if raised:
            raise answer
        return answer


def _start() -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _SERVE]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    atexit.register(_stop, process)
    return process


def _stop(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended before
        process.stdin.close()
    process.wait()


def _ask(process: "subprocess.Popen[bytes]", function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump((function, arguments), process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise RuntimeError(
            f"a process that matches persistence diagrams has ended (exit status {process.poll()}), perhaps because "
            "the machine ran out of memory: see the messages above"
        ) from error


def serve() -> None:
    """What a process does: answer calls that come by its standard input until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches it, too; the program decides when it ends
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # else whatever a library prints would end up among the answers
    while True:
        try:
            function, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            answer = False, function(*arguments)
        except Exception as error:
            answer = True, error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
