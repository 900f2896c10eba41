"""Runs that are killed, in the middle of writing a checkpoint too, end with the weights of one that was not."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from processes import environment, make_trainer, pipe, process

from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint

EVENTS_PER_EPOCH = 4  # two steps, then checkpoint_best.pth at times, and checkpoint_latest.pth


def train(variables, arguments, events, cut_write, workers):
    """Train as ``nnUNetv2_train ... --c`` does, and tell of every step and every checkpoint that begins.

    With a step, the IDs of the processes are sent that prepare batches.

    Args:
        variables: of nnU-Net's environment.
        arguments: dataset, trainer and plans.
        events: where to send the events to.
        cut_write: number of the checkpoint, counted from 0, in the middle of which the process kills itself.
        workers: number of processes that prepare batches.
    """
    multiprocessing.set_start_method("fork", force=True)  # as in a training; here it would be that of this process
    os.environ.update({**variables, "nnUNet_n_proc_DA": str(workers)})
    torch.set_num_threads(1)
    trainer = make_trainer(torch.device("cpu"), *arguments, go_on=True)
    step, save, written = trainer.step, torch.save, []

    def telling(batch):
        events.send([child.pid for child in multiprocessing.active_children()])
        return step(batch)

    def cutting(content, stream):
        events.send(None)
        if len(written) == cut_write:
            save(content, stream)
            stream.truncate(stream.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(stream)
        save(content, stream)

    trainer.step, torch.save = telling, cutting
    trainer.run_training()


class Runs:
    """Runs in processes of their own, forked from one that has imported everything."""

    def __init__(self, workspace):
        self.dataset = workspace.dataset
        self.workers = []

    def run(self, name, plans, kill_after=None, delay=0.0, cut_write=None, by=signal.SIGKILL, workers=0):
        """Train; send a signal a while after an event, if the process is still there. Returns its exit code."""
        events, sender = pipe()
        arguments = environment(), (self.dataset, name, plans), sender, cut_write, workers
        training = process(train, *arguments)
        training.start()
        sender.close()
        try:
            for number in range(10**6):
                self.workers = events.recv() or self.workers
                if number == kill_after:
                    time.sleep(delay)
                    with suppress(ProcessLookupError):  # it has ended by itself
                        os.kill(training.pid, by)
        except EOFError:
            training.join()
            return training.exitcode
        finally:
            training.kill()


@pytest.fixture(scope="module")
def runs(workspace):
    return Runs(workspace)


def _scratch(epochs):
    def edit(configuration):
        configuration["finetuning"]["from_scratch"] = True
        for block in ("pretraining", "finetuning"):
            configuration[block] |= {"save_every": 1, "num_epochs": epochs}

    return edit


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("TopoMAEPretrainer", 3),
        ("FusedFinetuneTrainer", 1),
        pytest.param("TopoMAEPretrainer", 30, marks=pytest.mark.slow),
        pytest.param("FusedFinetuneTrainer", 30, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(workspace, runs, name, kills):
    epochs = kills + 2  # which no killed run reaches
    whole = workspace.write_plans(f"Whole{kills}", _scratch(epochs))
    killed = workspace.write_plans(f"Killed{kills}", like=whole)
    assert runs.run(name, whole) == 0
    final = workspace.checkpoint(name, killed)
    moments = random.Random(kills)
    for number in range(kills):
        if number % 3 == 0:
            assert runs.run(name, killed, cut_write=moments.randrange(2)) == -signal.SIGKILL
            assert list(final.parent.glob(".checkpoint_*")), "the kill was in the middle of a checkpoint"
        else:
            when = {"kill_after": moments.randrange(EVENTS_PER_EPOCH), "delay": moments.uniform(0, 0.1)}
            assert runs.run(name, killed, **when) == -signal.SIGKILL
    assert runs.run(name, killed) == 0
    _assert_equal(workspace, name, whole, killed)
    assert not list(final.parent.glob(".checkpoint_*"))


def _assert_equal(workspace, name, whole, interrupted):
    expected, found = (read_checkpoint(workspace.checkpoint(name, plans)) for plans in (whole, interrupted))
    assert found["current_epoch"] == expected["current_epoch"]
    for key, tensor in expected["network_weights"].items():
        assert torch.equal(found["network_weights"][key], tensor), key
    assert found["logging"]["train_losses"] == expected["logging"]["train_losses"]


def _is_gone(pid):
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.parametrize("name", ["TopoMAEPretrainer", "FusedFinetuneTrainer"])
def test_a_run_that_is_asked_to_stop_leaves_no_process_and_goes_on_with_other_numbers_of_them(workspace, runs, name):
    whole = workspace.write_plans("WholeStop", _scratch(3))
    stopped = workspace.write_plans("Stop", like=whole)
    assert runs.run(name, whole) == 0
    assert runs.run(name, stopped, kill_after=3, by=signal.SIGTERM, workers=2) == os.EX_TEMPFAIL
    assert len(runs.workers) >= 2
    deadline = time.monotonic() + 300
    while not all(map(_is_gone, runs.workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(_is_gone, runs.workers))
    assert runs.run(name, stopped, workers=1) == 0
    _assert_equal(workspace, name, whole, stopped)
