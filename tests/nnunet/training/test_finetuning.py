import json
import sys

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint

FUSED = "FusedFinetuneTrainer"


@pytest.fixture
def log(monkeypatch):
    """Everything a trainer prints."""
    from nnunet_topomae.nnunet.training.finetuning import FinetuneTrainer

    lines = []
    monkeypatch.setattr(
        FinetuneTrainer, "print_to_log_file", lambda self, *args, **_: lines.append(" ".join(map(str, args)))
    )
    return lines


def test_starts_from_the_checkpoint_of_its_fold(workspace, pretrained, log):
    trainer = workspace.trainer(FUSED)
    trainer.initialize()
    trainer.load_pretrained_weights()
    for name, tensor in trainer.network.state_dict().items():
        if name.startswith(("vit.", "encoder.", "decoder.stages.")):
            assert torch.equal(tensor, pretrained.task.state_dict()[name]), name
    report = "\n".join(log)
    assert "TopoMAEPretrainer__nnUNetTopoMAEPlans__3d_fullres/fold_0/checkpoint_final.pth" in report
    assert "tensors of pyramid, which pre-training does not train" in report


def test_without_a_checkpoint_the_command_is_printed(workspace, pretrained):
    trainer = workspace.trainer(FUSED, fold=3)
    with pytest.raises(
        ValueError,
        match=r"nnUNetv2_train Dataset998_Phantom 3d_fullres 3 -p nnUNetTopoMAEPlans -tr TopoMAEPretrainer",
    ):
        trainer.on_train_start()


def test_fold_all_is_taken_with_a_warning(workspace, pretrained, log):
    plans = workspace.write_plans("OnlyAll", lambda configuration: None)
    of_all = workspace.checkpoint("TopoMAEPretrainer", plans, "all")
    of_all.parent.mkdir(parents=True)
    of_all.write_bytes(workspace.checkpoint("TopoMAEPretrainer").read_bytes())
    trainer = workspace.trainer(FUSED, plans, fold=2)
    assert trainer.find_pretrained_checkpoint() == of_all
    assert any("WARNING" in line and "fold all" in line for line in log)


@pytest.fixture
def nested(workspace, no_split):
    """Two folds with the same images, and one with others; fold 0 is pre-trained."""
    val, test = ["phantom_003"], ["phantom_004"]
    folds = [
        {"train": ["phantom_000"], "val": val, "test": test, "unlabelled": ["phantom_001", "phantom_002"]},
        {"train": ["phantom_000", "phantom_001"], "val": val, "test": test, "unlabelled": ["phantom_002"]},
        {"train": ["phantom_000", "phantom_001"], "val": val, "test": test, "unlabelled": []},
    ]
    no_split.write_text(json.dumps(folds))
    plans = workspace.write_plans("Nested", lambda c: c["pretraining"].update(num_epochs=1, warmup_epochs=0))
    if not workspace.checkpoint("TopoMAEPretrainer", plans).exists():
        workspace.trainer("TopoMAEPretrainer", plans).run_training()
    return plans


def test_one_pretraining_serves_all_folds_with_the_same_images(workspace, nested, log):
    file = workspace.checkpoint("TopoMAEPretrainer", nested)
    assert read_checkpoint(file)["drawn_from"] == ["phantom_000", "phantom_001", "phantom_002"]
    for trainer in (FUSED, "PretrainedFinetuneTrainer"):
        assert workspace.trainer(trainer, nested, fold=1).find_pretrained_checkpoint() == file
    assert log[-1] == (
        "There is no pre-training of fold 1; starting from that of another fold, which drew from the same images"
    )
    with pytest.raises(ValueError, match="no pre-trained checkpoint of fold 2, of a fold with the same images, or of"):
        workspace.trainer(FUSED, nested, fold=2).find_pretrained_checkpoint()


def test_images_that_were_added_later_are_others(workspace, nested, monkeypatch):
    monkeypatch.setattr(PlannedDataset, "unlabelled_cases", lambda self, configuration: ["extra"])
    assert workspace.trainer(FUSED, nested, fold=0).find_pretrained_checkpoint().is_file()
    with pytest.raises(ValueError, match="no pre-trained checkpoint of fold 1"):
        workspace.trainer(FUSED, nested, fold=1).find_pretrained_checkpoint()


def test_a_pretraining_that_saw_what_is_held_out_now_is_warned_of(workspace, nested, no_split, log):
    trainer = workspace.trainer(FUSED, nested)
    trainer.find_pretrained_checkpoint()
    assert not any("WARNING" in line for line in log)
    no_split.write_text(json.dumps([{"train": ["phantom_000"], "val": ["phantom_003"], "test": ["phantom_002"]}]))
    file = workspace.trainer(FUSED, nested).find_pretrained_checkpoint()
    assert log[-1] == (
        f"WARNING: {file} has seen images (not labels) of cases that this fold now holds out, such as phantom_002; "
        f"pre-train again"
    )


def test_from_scratch_must_be_asked_for(workspace, log):
    plans = workspace.write_plans("Scratch", lambda c: c["finetuning"].update(from_scratch=True))
    trainer = workspace.trainer(FUSED, plans)
    trainer.initialize()
    trainer.load_pretrained_weights()
    assert any("from scratch" in line for line in log)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"rubbish", "checkpoint_final.pth"), (None, "damaged, truncated or no checkpoint")],
)
def test_damaged_checkpoint_is_named(workspace, pretrained, content, message):
    plans = workspace.write_plans(f"Damaged{content is None}", lambda configuration: None)
    file = workspace.checkpoint("TopoMAEPretrainer", plans)
    file.parent.mkdir(parents=True)
    file.write_bytes(content or workspace.checkpoint("TopoMAEPretrainer").read_bytes()[:5000])
    with pytest.raises(ValueError, match=message):
        workspace.trainer(FUSED, plans).on_train_start()


def test_file_on_the_command_line_is_checked_before_nnunet_loads_it(workspace, pretrained, monkeypatch, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(workspace.checkpoint("TopoMAEPretrainer").read_bytes()[:5000])
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "998", "-pretrained_weights", str(file)])
    with pytest.raises(ValueError, match=r"weights.pth is damaged, truncated or no checkpoint"):
        workspace.trainer(FUSED).initialize()


def test_file_on_the_command_line_overrides(workspace, pretrained, monkeypatch):
    file = workspace.checkpoint("TopoMAEPretrainer", name="best")
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "998", "-pretrained_weights", str(file)])
    trainer = workspace.trainer(FUSED, fold=3)  # of which there is no pre-training
    maybe_load_checkpoint(trainer, False, False, str(file))
    weights = read_checkpoint(file)["network_weights"]
    assert torch.equal(trainer.network.vit.norm.weight, weights["vit.norm.weight"])
    trainer.on_train_start()
    assert torch.equal(trainer.network.vit.norm.weight, weights["vit.norm.weight"])


def test_stock_trainer_accepts_our_checkpoint(workspace, pretrained):
    trainer = workspace.trainer("nnUNetTrainer")
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(workspace.checkpoint("TopoMAEPretrainer")))
    assert torch.equal(trainer.network.encoder.stages[0][0].gamma, pretrained.task.encoder.stages[0][0].gamma)


def test_optimiser_and_deep_supervision(workspace):
    trainer = workspace.trainer(FUSED)
    trainer.initialize()
    assert trainer.initial_lr == pytest.approx(0.1 * 2 / 256)
    assert max(trainer.lr_scheduler.base_lrs) == pytest.approx(trainer.initial_lr)
    assert min(trainer.lr_scheduler.base_lrs) == pytest.approx(trainer.initial_lr * 0.75**6)
    assert trainer.network.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert [round(w * 1.75, 3) for w in trainer.loss.weight_factors] == [1, 0.5, 0.25, 0]
    assert len(trainer.network(torch.rand(1, 1, *trainer.configuration_manager.patch_size))) == 4


def test_training_resumes_and_writes_nnunets_checkpoints(workspace, pretrained):
    trainer = workspace.trainer(FUSED)
    trainer.num_epochs = 1
    trainer.run_training()
    checkpoint = read_checkpoint(workspace.checkpoint(FUSED))
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["finetuned_by"] == FUSED
    resumed = workspace.trainer(FUSED, continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    assert resumed.current_epoch == 1
    assert torch.equal(resumed.network.vit.norm.weight, trainer.network.vit.norm.weight)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(trainer.optimizer.param_groups[0]["lr"])
