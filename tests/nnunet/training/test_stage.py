"""Files that a training is to start or to go on from, but cannot: one sentence that names the file."""

import os
import pickle
import shutil

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from workspace import ANYTHING, says, truncate


def _with(**changes):
    def edit(file):
        torch.save({**torch.load(file, weights_only=True), **changes}, file)

    return edit


def _without(key):
    def edit(file):
        content = torch.load(file, weights_only=True)
        del content[key]
        torch.save(content, file)

    return edit


def _longer(file):
    content = torch.load(file, weights_only=True)
    made_with = content["init_args"]
    made_with["plans"]["configurations"][made_with["configuration"]]["pretraining"]["num_iterations_per_epoch"] = 17
    torch.save(content, file)


class _Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


DAMAGED = f"is damaged, truncated or no checkpoint: {ANYTHING}"
EXECUTABLE = (
    "is no checkpoint, or holds more than tensors and plain Python types, which is not loaded because it could "
    f"execute code: {ANYTHING}"
)
CHECKPOINTS = {
    "missing": (lambda file: file.unlink(), "does not exist"),
    "empty": (lambda file: file.write_bytes(b""), DAMAGED),
    "cut off": (truncate, DAMAGED),
    "text": (lambda file: file.write_text("weights"), EXECUTABLE),
    "code": (lambda file: file.write_bytes(pickle.dumps(_Code(), protocol=2)), EXECUTABLE),
    "a list": (lambda file: torch.save([1, 2], file), 'is no nnU-Net checkpoint: it has no "network_weights"'),
    "of another network": (
        _with(network_weights={"a": torch.ones(1)}),
        f"is of another architecture than the plans: {ANYTHING}, 0 have another shape; use a checkpoint that was "
        "pre-trained with these plans, or carry one of a network of the same class over with nnUNetv2_topomae adapt",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
@pytest.mark.parametrize("trainer", ["TopoMAEPretrainer", "FusedFinetuneTrainer"])
def test_pretrained_weights(workspace, pretrained, tmp_path, monkeypatch, trainer, spoil, sentence):
    file = tmp_path / "weights.pth"
    shutil.copy(workspace.checkpoint("TopoMAEPretrainer"), file)
    spoil(file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"weights\.pth") as error:
        maybe_load_checkpoint(workspace.trainer(trainer, fold=4), False, False, str(file))
    assert says(str(error.value), f"{file} {sentence}"), str(error.value)
    assert not (tmp_path / "executed").exists()


RESUMED = {
    "cut off": (truncate, DAMAGED),
    "of nnU-Net's trainer": (
        _without("random_state"),
        "was not written by TopoMAEPretrainer; delete it to start a new training",
    ),
    "of longer epochs": (
        _longer,
        "was written with other plans than the present ones, so the run cannot be continued; restore the plans or "
        "delete the folder: pretraining.num_iterations_per_epoch was 17",
    ),
    "of other plans": (
        _with(network_weights={"a": torch.ones(1)}),
        "was written with other plans than the present ones, so the run cannot be continued; restore the plans or "
        f"delete the folder: {ANYTHING}",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_checkpoints_to_continue_from(workspace, pretrained, case):
    spoil, sentence = RESUMED[case]
    plans = workspace.write_plans(f"Continued{list(RESUMED).index(case)}")
    file = workspace.checkpoint("TopoMAEPretrainer", plans, name="latest")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(workspace.checkpoint("TopoMAEPretrainer"), file)
    spoil(file)
    trainer = workspace.trainer("TopoMAEPretrainer", plans, continue_training=True)
    with pytest.raises(ValueError, match="checkpoint_latest") as error:
        maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    assert says(str(error.value), f"{file} {sentence}"), str(error.value)
