"""Runs that are stopped, killed or fed with failing data: nothing is lost, and what happened is said."""

import fcntl
import gc
import json
import os
import pickle
import signal
import subprocess
import sys

import blosc2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_topomae.nnunet.training import checkpointing
from nnunet_topomae.nnunet.training.skipping import NotFiniteError
from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint
from workspace import truncate

STAGES = ["TopoMAEPretrainer", "FusedFinetuneTrainer"]


def _train(workspace, name, plans, stop_at=None, by=signal.SIGTERM):
    """Train from the start, and ask to stop in a step of a given number."""
    trainer = workspace.trainer(name, plans)
    steps, step = [], trainer.step

    def counted(batch):
        steps.append(batch)
        if len(steps) == stop_at:
            os.kill(os.getpid(), by)
        return step(batch)

    trainer.step = counted
    if stop_at is None:
        trainer.run_training()
    else:
        with pytest.raises(SystemExit) as ended:
            trainer.run_training()
        assert ended.value.code == os.EX_TEMPFAIL
        assert len(steps) == stop_at, "the step is finished and no other is begun"
    return trainer


def _go_on(workspace, name, plans):
    trainer = workspace.trainer(name, plans, continue_training=True)
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    return trainer


@pytest.fixture(scope="module", autouse=True)
def plans_of_all(workspace):
    """Plans that all others here are copies of."""

    def scratch(configuration):
        configuration["finetuning"]["from_scratch"] = True
        for block in ("pretraining", "finetuning"):
            configuration[block]["save_every"] = 1

    return workspace.write_plans("Uninterrupted", scratch)


@pytest.fixture(scope="module")
def uninterrupted(workspace, plans_of_all):
    """Final weights of both stages."""
    return {name: _train(workspace, name, plans_of_all).module.state_dict() for name in STAGES}


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_was_asked_to_stop_within_an_epoch_ends_as_one_that_was_not(workspace, uninterrupted, name, by):
    plans = workspace.write_plans(f"Stopped{by}", like="Uninterrupted")
    _train(workspace, name, plans, stop_at=3, by=by)
    trainer = _go_on(workspace, name, plans)
    assert trainer.current_epoch == 1
    trainer.run_training()
    for key, tensor in trainer.module.state_dict().items():
        assert torch.equal(tensor, uninterrupted[name][key]), key
    losses = trainer.logger.get_value("train_losses", step=None)
    assert len(losses) == 3
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", STAGES)
def test_the_most_trained_checkpoint_that_is_whole_is_gone_on_from(workspace, uninterrupted, name, capsys):
    plans = workspace.write_plans("Newest", like="Uninterrupted")
    _train(workspace, name, plans, stop_at=5)
    latest = workspace.checkpoint(name, plans, name="latest")
    previous, best = latest.with_name("checkpoint_previous.pth"), latest.with_name("checkpoint_best.pth")
    assert read_checkpoint(previous)["current_epoch"] == 2
    for file, seconds in ((best, 1), (previous, 2), (latest, 3)):
        os.utime(file, (seconds, seconds))
    truncate(latest)
    trainer = _go_on(workspace, name, plans)
    said = capsys.readouterr().out
    assert f"WARNING: {latest} is damaged, truncated or no checkpoint" in said
    assert f"Going on from {previous}" in said
    trainer.run_training()
    for key, tensor in trainer.module.state_dict().items():
        assert torch.equal(tensor, uninterrupted[name][key]), key
    assert not previous.exists()


def test_a_copy_without_time_stamps_is_gone_on_from_where_the_run_was(workspace, capsys):
    name, plans = "TopoMAEPretrainer", workspace.write_plans("Copied", like="Uninterrupted")
    _train(workspace, name, plans, stop_at=5)
    latest = workspace.checkpoint(name, plans, name="latest")
    for file in latest.parent.glob("*.pth"):
        os.utime(file, (2, 2))
    os.utime(latest, (1, 1))
    assert len(_go_on(workspace, name, plans)._steps_done) == 1
    assert f"Going on from {latest}" in capsys.readouterr().out


def _failing(trainer, numbers):
    """Let steps of some numbers have a loss that is NaN."""
    step, made = trainer.step, []

    def failing(batch):
        made.append(batch)
        if len(made) in numbers:
            raise NotFiniteError("the loss is nan", {"total": float("nan")})
        return step(batch)

    trainer.step = failing


@pytest.mark.parametrize("name", STAGES)
def test_a_step_whose_loss_is_nan_is_not_made_but_noted(workspace, name):
    plans = workspace.write_plans("NaNStep", like="Uninterrupted")
    trainer = workspace.trainer(name, plans)
    _failing(trainer, {3, 4})
    trainer.run_training()
    file = workspace.checkpoint(name, plans).with_name("skipped_steps.jsonl")
    noted = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(each["epoch"], each["step"]) for each in noted] == [(1, 0), (1, 1)]
    assert all(len(each["cases"]) == 2 for each in noted)
    losses = trainer.logger.get_value("train_losses", step=None)
    assert np.isfinite(losses).tolist() == [True, False, True]


@pytest.mark.parametrize("name", STAGES)
def test_ten_such_steps_in_a_row_end_the_run(workspace, name):
    def longer(configuration):
        for block in ("pretraining", "finetuning"):
            configuration[block]["num_iterations_per_epoch"] = 12

    trainer = workspace.trainer(name, workspace.write_plans("TenNaN", longer, like="Uninterrupted"))
    _failing(trainer, set(range(2, 99)))
    with pytest.raises(ValueError, match=r"10 steps in a row could not be made, see .*skipped_steps\.jsonl"):
        trainer.run_training()


def _failing_validation(trainer, numbers):
    """Let batches of validation of some numbers have a loss that is NaN."""
    validate, made = trainer.validate_batch, []

    def failing(batch):
        made.append(batch)
        if len(made) in numbers:
            raise NotFiniteError("the loss is nan", {"total": float("nan"), "mse": 0.5})
        return validate(batch)

    trainer.validate_batch = failing


def _two_batches(configuration):
    for block in ("pretraining", "finetuning"):
        configuration[block]["num_val_iterations_per_epoch"] = 2


@pytest.mark.parametrize("name", STAGES)
def test_a_batch_of_validation_whose_loss_is_nan_is_left_out_and_noted(workspace, name):
    plans = workspace.write_plans("NaNBatch", _two_batches, like="Uninterrupted")
    trainer = workspace.trainer(name, plans)
    _failing_validation(trainer, {1, 4})
    trainer.run_training()
    text = workspace.checkpoint(name, plans).with_name("skipped_steps.jsonl").read_text()
    assert "NaN" not in text  # which is no JSON
    noted = [json.loads(line) for line in text.splitlines()]
    assert [(each["epoch"], each["validation_batch"]) for each in noted] == [(0, 0), (1, 1)]
    assert all(len(each["cases"]) == 2 and each["terms"] == {"total": None, "mse": 0.5} for each in noted)
    assert np.isfinite(trainer.logger.get_value("val_losses", step=None)).all()


@pytest.mark.parametrize("name", STAGES)
def test_validation_that_gives_nothing_but_nan_ends_the_run(workspace, name):
    trainer = workspace.trainer(name, workspace.write_plans("AllNaN", _two_batches, like="Uninterrupted"))
    _failing_validation(trainer, {1, 2})
    said = r"^epoch 0: the loss of every batch of validation is NaN or inf, see .*\.jsonl; if .* lower \w+ing.base_lr$"
    with pytest.raises(ValueError, match=said):
        trainer.run_training()


def test_the_loss_of_fine_tuning_is_looked_at_before_the_step(workspace):
    trainer = workspace.trainer("FusedFinetuneTrainer", workspace.write_plans("NaNLoss", like="Uninterrupted"))
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    before = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
    batch["data"][:] = torch.nan
    assert trainer.train_step(batch) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.module.state_dict().items())


@pytest.mark.parametrize("name", STAGES)
def test_a_fold_is_trained_by_one_process_at_a_time(workspace, name):
    plans = workspace.write_plans("Locked", like="Uninterrupted")
    trainer = workspace.trainer(name, plans)
    file = workspace.checkpoint(name, plans).with_name(".lock")
    code = (
        f"import sys\nfrom pathlib import Path\nfrom nnunet_topomae.files import lock\n"
        f"kept = lock(Path({str(file)!r}), print)\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=rf"fold_0 is in use by process {other.pid} on "):
            trainer.on_train_start()
        other.kill()
    with file.open("ab") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _overwrite(file):
    """Leave nothing whole but the header, which says what comes and how long the file is."""
    content = file.read_bytes()
    file.write_bytes(content[:200] + b"\xff" * (len(content) - 200))


def _nan(file):
    image = blosc2.open(urlpath=str(file), mode="a")
    image[:] = np.full(image.shape, np.nan, np.float32)


FAULTS = {
    "vanished": (".b2nd", lambda file: file.unlink(), "cannot be read"),
    "cut off": (".b2nd", truncate, "cannot be read"),
    "overwritten": (".b2nd", _overwrite, "cannot be read"),
    "NaN": (".b2nd", _nan, "now holds NaN or inf"),
    "empty properties": (".pkl", lambda file: file.write_bytes(b""), "cannot be read"),
}


@pytest.mark.parametrize(("ending", "spoil", "what"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("name", STAGES)
def test_a_case_that_fails_during_a_run_is_named_and_can_be_left_out(
    workspace, no_split, name, ending, spoil, what, request
):
    if (name, ending) == ("TopoMAEPretrainer", ".pkl"):
        pytest.skip("pre-training reads no properties, see the test below")
    plans = workspace.write_plans(f"Failing{request.node.callspec.id}", like="Uninterrupted")
    folder = workspace.preprocessed / workspace.plans()["configurations"]["3d_fullres"]["data_identifier"]
    files = {file: file.read_bytes() for file in folder.iterdir()}
    trainer = workspace.trainer(name, plans)
    step, steps = trainer.step, []

    def spoiling(batch):
        steps.append(batch)
        if len(steps) == 3:
            for case in json.loads(no_split.read_text())[0]["train"]:
                spoil(folder / f"{case}{ending}")
        return step(batch)

    trainer.step = spoiling
    try:
        with pytest.raises(ValueError, match=rf"^case (\w+) in {folder} {what}") as ended:
            trainer.run_training()
        failed = str(ended.value).split()[1]
        for file, content in files.items():
            if file.name.startswith(f"{failed}.") or file.name.startswith(f"{failed}_seg."):
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(content)
        trainer = _go_on(workspace, name, plans)
        assert trainer.current_epoch == 1
        trainer.run_training()
        assert failed not in trainer.get_tr_and_val_datasets()[0].identifiers
        trainer = workspace.trainer(name, plans)
        maybe_load_checkpoint(trainer, continue_training=False, validation_only=True)
        assert failed not in trainer.get_tr_and_val_datasets()[0].identifiers
        with pytest.raises(ValueError, match="holds 4 preprocessed cases, but the dataset has 5; preprocess it"):
            workspace.trainer(name, plans).initialize()
    finally:
        for file, content in files.items():
            file.write_bytes(content)


class _Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pretraining_does_not_open_the_properties_of_cases(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = workspace.preprocessed / workspace.plans()["configurations"]["3d_fullres"]["data_identifier"]
    files = {file: file.read_bytes() for file in folder.glob("*.pkl")}
    try:
        for file in files:
            file.write_bytes(pickle.dumps(_Code()))
        trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("NoProperties", like="Uninterrupted"))
        trainer.run_training()
        trainer.perform_actual_validation()
    finally:
        for file, content in files.items():
            file.write_bytes(content)
    assert not (tmp_path / "executed").exists()


def test_left_over_temporary_files_are_removed(workspace):
    plans = workspace.write_plans("LeftOver", like="Uninterrupted")
    trainer = workspace.trainer("TopoMAEPretrainer", plans)
    leftover = workspace.checkpoint("TopoMAEPretrainer", plans).with_name(".checkpoint_latest.pth.4711-0f4a77c1")
    leftover.write_bytes(b"half")
    trainer.on_train_start()
    assert not leftover.exists()


def test_the_progress_that_cannot_be_drawn_does_not_end_a_training(workspace, capsys):
    plans = workspace.write_plans("NoPicture", like="Uninterrupted")
    trainer = workspace.trainer("TopoMAEPretrainer", plans, pictures=1)
    workspace.checkpoint("TopoMAEPretrainer", plans).with_name("progress.png").mkdir()
    trainer.run_training()
    assert "WARNING" in capsys.readouterr().out


def test_pictures_of_past_epochs_take_no_memory(workspace):
    plans = workspace.write_plans("NoFigures", like="Uninterrupted")
    trainer = workspace.trainer("TopoMAEPretrainer", plans, pictures=3)
    end_epoch, kept = trainer.on_epoch_end, []

    def counting():
        end_epoch()
        kept.append(sum(issubclass(type(each), Figure) for each in gc.get_objects()))

    trainer.on_epoch_end = counting
    gc.disable()  # which looks for circles of references at moments that nobody can tell
    try:
        trainer.run_training()
    finally:
        gc.enable()
    assert kept == kept[:1] * trainer.num_epochs


def test_checkpoints_are_written_as_often_as_2_percent_of_the_time_allow(workspace, monkeypatch):
    def edit(configuration):
        configuration["pretraining"] |= {"num_epochs": 8}

    now, epochs = [0.0], []
    monkeypatch.setattr(checkpointing, "monotonic", lambda: now[0])
    trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("SaveSeldom", edit))
    step = trainer.step

    def ten_seconds(batch):
        now[0] += 10
        return step(batch)

    def writing(checkpoint, file):
        now[0] += 0.9  # 4.5 % of an epoch, 1.5 % of three
        file.touch()
        if file.name == "checkpoint_latest.pth":
            epochs.append(trainer.current_epoch)

    trainer.step = ten_seconds
    monkeypatch.setattr(checkpointing, "write_checkpoint", writing)
    trainer.run_training()
    assert epochs == [0, 3, 6]
