import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nnunet_topomae.transport.matching import match
from nnunet_topomae.transport.metric import Metric
from nnunet_topomae.transport.processes import Processes

FORKS = "import os, time\nif os.fork() == 0: os.close(1), os.close(2), time.sleep(60), os._exit(0)"
KILLS = "import signal; os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def processes():
    one = Processes(1)
    yield one
    one.close()


def _diagrams(seed=0):
    rng = np.random.default_rng(seed)
    return [np.sort(rng.random((size, 2)))[:, ::-1].copy() for size in (40, 50)]


def test_answers_are_those_of_this_process():
    processes = Processes(2)
    pairs = [_diagrams(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as threads:  # more threads than processes
        answers = list(threads.map(lambda pair: processes.run(match, *pair, Metric(), 0.0), pairs))
    processes.close()
    for (x, y), answer in zip(pairs, answers, strict=True):
        expected = match(x, y, Metric(), 0.0)
        assert (answer.lower_bound, answer.upper_bound) == (expected.lower_bound, expected.upper_bound)
        assert np.array_equal(answer.x_indices, expected.x_indices)
        assert np.array_equal(answer.y_indices, expected.y_indices)


def test_work_is_done_elsewhere_without_pytorch(processes):
    processes.run(match, *_diagrams(), Metric(), 0.0)
    assert processes.run(os.getpid) != os.getpid()
    assert "scipy" in processes.run(eval, "list(__import__('sys').modules)")
    assert "torch" not in processes.run(eval, "list(__import__('sys').modules)")


def test_modules_are_found_where_the_program_finds_them(processes, tmp_path, monkeypatch):
    assert processes.run(eval, "__import__('sys').path") == sys.path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ot.py").write_text("raise ImportError('not POT')")
    elsewhere = Processes(1)
    assert elsewhere.run(match, *_diagrams(), Metric(), 0.0).gap < 1e-6
    elsewhere.close()


def test_exceptions_come_back_as_text(processes):
    with pytest.raises(RuntimeError, match=r"(?s)failed:.*order must be a finite number"):
        processes.run(Metric, 0.5)
    with pytest.raises(RuntimeError, match=r"(?s)failed:.*pickle"):
        processes.run(eval, "lambda: 0")
    assert processes.run(abs, -1) == 1


def test_what_is_printed_is_not_among_the_answers(capfd):
    processes = Processes(1)
    processes.run(eval, "print('by Python', flush=True)")
    processes.run(os.system, "echo by C")
    processes.run(eval, "__import__('warnings').warn('uncertain')")
    assert processes.run(abs, -1) == 1
    processes.close()
    printed = capfd.readouterr().err
    assert [each for each in ("by Python", "by C", "uncertain") if each not in printed] == []


def test_nobody_gets_the_answer_to_a_call_that_was_interrupted(processes, monkeypatch):
    def interrupted(answers):
        raise KeyboardInterrupt

    monkeypatch.setattr(pickle, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.run(abs, -1)
    monkeypatch.undo()
    assert [processes.run(abs, -n) for n in (2, 3)] == [2, 3]


def test_a_process_that_was_killed_is_one_sentence_and_is_replaced(processes):
    first = processes.run(os.getpid)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"has ended \(exit status -9\)\. .*out of memory"):
        processes.run(abs, -1)
    assert processes.run(os.getpid) not in (first, os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_all_processes_of_a_job_end_nothing(processes, number):
    os.kill(processes.run(os.getpid), number)
    assert processes.run(abs, -1) == 1


@pytest.mark.parametrize("end", ["", KILLS, FORKS, f"{FORKS}\n{KILLS}"], ids=["ends", "killed", "fork", "fork, killed"])
def test_processes_end_with_the_program(end):
    reading, writing = os.pipe()  # closed at the other end when the last process that has it ends
    script = f"""
import os, subprocess
from nnunet_topomae.transport import processes
start = subprocess.Popen
subprocess.Popen = lambda *arguments, **options: start(*arguments, **options, pass_fds=[{writing}])
processes.Processes(1).run(abs, -1)
os.close({writing})
{end}
"""
    program = subprocess.run(
        [sys.executable, "-c", script], pass_fds=[writing], capture_output=True, text=True, timeout=50, check=False
    )
    os.close(writing)
    assert program.stderr == ""
    assert os.read(reading, 1) == b""  # waits for the process to end, and no longer than the fork sleeps
    os.close(reading)


def test_scripts_need_no_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
from nnunet_topomae.transport.processes import Processes
print("once", Processes(2).run(abs, -1))
""")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert ended.stdout == "once 1\n"
