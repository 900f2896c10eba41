"""Runs whose disk becomes full or read-only: one sentence, and the last checkpoint is there to go on from."""

import os
import shutil
import subprocess

import pytest
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunets_module

from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint

STAGES = ["TopoMAEPretrainer", "FusedFinetuneTrainer"]


def _mount(*arguments):
    """Mount something, or skip the test where that is not allowed."""
    if not shutil.which("mount") or os.geteuid():
        pytest.skip("mounting a disk needs mount and root")
    done = subprocess.run(["mount", *map(str, arguments)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")


def _unmount(folder):
    subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)  # lazy: the lock is still open


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk of 64 MB, on which results are written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", folder)
    monkeypatch.setenv("nnUNet_results", str(folder))
    monkeypatch.setattr(nnunets_module, "sleep", lambda _: None)  # before nnU-Net tries again to write its log
    yield folder
    _unmount(folder)


@pytest.fixture
def full(disk):
    """What fills the disk up to half a checkpoint, and what makes space again."""
    filler = disk / "filler"

    def fill(checkpoint):
        free = shutil.disk_usage(disk).free - checkpoint.stat().st_size // 2
        filler.write_bytes(bytes(free))

    return fill, filler.unlink


@pytest.fixture
def read_only(disk):
    """What makes the folder of a checkpoint read-only, and what makes it writable again."""
    folders = []

    def lock(checkpoint):
        folders.append(checkpoint.parent)
        _mount("--bind", *2 * [checkpoint.parent])
        _mount("-o", "remount,bind,ro", checkpoint.parent)

    def unlock():
        _unmount(folders.pop())

    yield lock, unlock
    while folders:
        unlock()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("full", r"No space left on device; free space on the disk .*/disk"),
        ("read_only", r"Read-only file system; see that the folder is there and may be written to"),
    ],
    ids=["full", "read-only"],
)
@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_cannot_write_a_checkpoint_says_so_and_can_go_on(workspace, disk, request, name, fault, said):
    def edit(configuration):
        configuration["finetuning"]["from_scratch"] = True
        for block in ("pretraining", "finetuning"):
            configuration[block]["save_every"] = 1

    break_disk, mend_disk = request.getfixturevalue(fault)
    plans = workspace.write_plans(f"Disk{fault}", edit)
    trainer = workspace.trainer(name, plans)
    latest = disk.joinpath(workspace.dataset, f"{name}__{plans}__3d_fullres", "fold_0", "checkpoint_latest.pth")
    step, steps = trainer.step, []

    def breaking(batch):
        steps.append(batch)
        if len(steps) == 3:
            break_disk(latest)
        return step(batch)

    trainer.step = breaking
    sentence = rf"checkpoint_(latest|best)\.pth cannot be written: {said}\. What was there before is unchanged$"
    with pytest.raises(OSError, match=sentence):
        trainer.run_training()
    assert not list(latest.parent.glob(".checkpoint_*"))
    assert read_checkpoint(latest)["current_epoch"] == 1
    mend_disk()
    trainer = workspace.trainer(name, plans, continue_training=True)
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    assert trainer.current_epoch == 1
    trainer.run_training()
    assert read_checkpoint(latest.with_name("checkpoint_final.pth"))["current_epoch"] == 3


def test_a_results_folder_that_is_read_only_from_the_start_is_named(workspace, disk):
    _mount("-o", "remount,ro", disk)
    with pytest.raises(OSError, match=rf"Read-only file system: '{disk}/"):
        workspace.trainer("TopoMAEPretrainer")
