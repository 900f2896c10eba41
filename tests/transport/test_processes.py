import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nnunet_topomae.transport.matching import match
from nnunet_topomae.transport.metric import Metric
from nnunet_topomae.transport.processes import Processes


def _diagrams(seed=0):
    rng = np.random.default_rng(seed)
    return [np.sort(rng.random((size, 2)))[:, ::-1].copy() for size in (40, 50)]


def _is_alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_are_those_of_this_process():
    processes = Processes(2)
    pairs = [_diagrams(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as threads:  # more threads than processes
        answers = list(threads.map(lambda pair: processes.run(match, *pair, Metric(), 0.0), pairs))
    for (x, y), answer in zip(pairs, answers, strict=True):
        expected = match(x, y, Metric(), 0.0)
        assert (answer.lower_bound, answer.upper_bound) == (expected.lower_bound, expected.upper_bound)
        assert np.array_equal(answer.x_indices, expected.x_indices)
        assert np.array_equal(answer.y_indices, expected.y_indices)


def test_work_is_done_elsewhere_without_pytorch():
    processes = Processes(1)
    processes.run(match, *_diagrams(), Metric(), 0.0)
    assert processes.run(os.getpid) != os.getpid()
    assert "scipy" in processes.run(eval, "list(__import__('sys').modules)")
    assert "torch" not in processes.run(eval, "list(__import__('sys').modules)")


def test_errors_and_warnings_come_back(capfd):
    processes = Processes(1)
    with pytest.raises(ValueError, match="order must be a finite number"):
        processes.run(Metric, 0.5)
    processes.run(warnings.warn, "the distance is uncertain")
    processes.run(print, "printed")  # not among the answers
    assert processes.run(abs, -1) == 1
    assert "the distance is uncertain" in capfd.readouterr().err


def test_a_process_that_was_killed_is_one_sentence():
    processes = Processes(1)
    os.kill(processes.run(os.getpid), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a process that matches persistence diagrams has ended .*out of memory"):
        processes.run(abs, -1)


@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_processes_end_with_the_program(end):
    script = f"""
import os
from nnunet_topomae.transport.processes import Processes
print(Processes(1).run(os.getpid), flush=True)
{end}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    process_id = int(ended.stdout)
    deadline = time.monotonic() + 30
    while _is_alive(process_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(process_id)


def test_scripts_need_no_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
from nnunet_topomae.transport.processes import Processes
print("once", Processes(2).run(abs, -1))
""")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert ended.stdout == "once 1\n"
