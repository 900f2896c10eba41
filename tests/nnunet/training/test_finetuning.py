import json

import pytest
import torch
from batchgeneratorsv2.transforms.noise import gaussian_blur
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.weights.checkpoints import UNTRAINED, read_checkpoint
from workspace import truncate

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
    log.clear()
    trainer.initialize()
    trainer.load_pretrained_weights()
    (warning,) = (line for line in log if "WARNING" in line)
    assert "no pre-training of fold 2; starting from fold all, which has seen the images (not the labels)" in warning


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


def _found(trainer, file):
    trainer.initialize()
    trainer.load_pretrained_weights()
    return file


def _named(trainer, file):
    maybe_load_checkpoint(trainer, False, False, str(file))
    return file


def _adapted(trainer, file):
    plans, output = trainer.plans_manager.plans_name, file.with_name("adapted.pth")
    output.unlink(missing_ok=True)
    assert cli.main(["adapt", str(file), "-d", "998", "-p", plans, "-o", str(output)]) == 0
    return _named(trainer, output)


@pytest.mark.parametrize("start", [_found, _named, _adapted])
def test_a_pretraining_that_saw_what_is_held_out_now_is_warned_of(workspace, nested, no_split, log, start):
    pretraining = workspace.checkpoint("TopoMAEPretrainer", nested)
    start(workspace.trainer(FUSED, nested), pretraining)
    assert not any("WARNING" in line for line in log)
    no_split.write_text(json.dumps([{"train": ["phantom_000"], "val": ["phantom_003"], "test": ["phantom_002"]}]))
    file = start(workspace.trainer(FUSED, nested), pretraining)
    assert log[-1] == (
        f"WARNING: {file} has seen images (not labels) of cases that this fold holds out, such as phantom_002, so "
        f"their Dice may be a little too good; pre-train this fold to avoid that"
    )


def test_weights_are_not_loaded_into_a_training_from_scratch(workspace, pretrained):
    plans = workspace.write_plans("ScratchOnly", lambda c: c["finetuning"].update(from_scratch=True))
    file = workspace.checkpoint("TopoMAEPretrainer")
    with pytest.raises(ValueError, match=rf"from_scratch is true in {plans}\.json, so {file} is not to be loaded; set"):
        _named(workspace.trainer(FUSED, plans), file)


def test_from_scratch_must_be_asked_for(workspace, log):
    plans = workspace.write_plans("Scratch", lambda c: c["finetuning"].update(from_scratch=True))
    trainer = workspace.trainer(FUSED, plans)
    trainer.initialize()
    trainer.load_pretrained_weights()
    assert log[-1] == "Training from scratch, as finetuning.from_scratch in the plans asks for"


def test_from_scratch_a_rate_of_the_encoder_is_said_to_be_unused(workspace, log):
    plans = workspace.write_plans("SlowScratch", lambda c: c["finetuning"].update(from_scratch=True, encoder_lr=0.1))
    trainer = workspace.trainer(FUSED, plans)
    trainer.initialize()
    trainer.load_pretrained_weights()
    assert log[-1] == (
        "finetuning.encoder_lr of 0.1 is not used from scratch: the encoder learns at the rate of all other parts"
    )


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


def test_a_damaged_checkpoint_of_a_trainer_that_does_not_pretrain_is_passed_over(workspace, pretrained, log):
    plans = workspace.write_plans("DamagedOther", lambda configuration: None)
    other, own = (workspace.checkpoint(name, plans) for name in ("nnUNetTrainer", "TopoMAEPretrainer"))
    for file in (other, own):
        file.parent.mkdir(parents=True)
        file.write_bytes(workspace.checkpoint("TopoMAEPretrainer").read_bytes())
    truncate(other)
    assert workspace.trainer("PretrainedFinetuneTrainer", plans).find_pretrained_checkpoint() == own
    (warning,) = (line for line in log if line.startswith(f"WARNING: {other} is damaged, truncated or no checkpoint"))
    assert warning.endswith("; passed over, as nnUNetTrainer is no pre-training trainer")


def test_file_on_the_command_line_is_checked_before_anything_is_loaded(workspace, pretrained, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(workspace.checkpoint("TopoMAEPretrainer").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"weights.pth is damaged, truncated or no checkpoint"):
        maybe_load_checkpoint(workspace.trainer(FUSED), False, False, str(file))


def test_file_on_the_command_line_overrides(workspace, pretrained):
    file = workspace.checkpoint("TopoMAEPretrainer", name="best")
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
    assert min(trainer.lr_scheduler.base_lrs) == pytest.approx(trainer.initial_lr * 0.75**5)  # four blocks, embedding
    assert trainer.network.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert [round(w * 1.75, 3) for w in trainer.loss.weight_factors] == [1, 0.5, 0.25, 0]
    assert len(trainer.network(torch.rand(1, 1, *trainer.configuration_manager.patch_size))) == 4


def test_augmentation_does_not_depend_on_what_is_faster(workspace, monkeypatch):
    plans = workspace.write_plans("Blurred", lambda c: c["finetuning"].update(from_scratch=True))
    blurs, drawn = [], []
    blur = gaussian_blur.blur_dimension
    for fft_is_faster in (True, False):
        now = [0.0]

        def timed(*arguments, force_use_fft=None, now=now, fft_is_faster=fft_is_faster):
            blurs.append(force_use_fft)
            now[0] += 1 if bool(force_use_fft) == fft_is_faster else 2
            return blur(*arguments, force_use_fft=force_use_fft)

        monkeypatch.setattr(gaussian_blur, "blur_dimension", timed)
        monkeypatch.setattr(gaussian_blur, "time", lambda now=now: now[0])
        trainer = workspace.trainer("FusedFinetuneTrainer", plans)
        trainer.initialize()
        loader, _ = trainer.get_dataloaders()
        drawn.append(torch.stack([next(loader)["data"] for _ in range(24)]))
    assert blurs
    assert torch.equal(*drawn)


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


def test_parts_that_were_not_pretrained_start_as_the_plans_say(workspace, pretrained, log):
    plans = workspace.write_plans("Gain", lambda c: c["architecture"]["arch_kwargs"].update(fusion_gain=0.7))
    trainer = workspace.trainer(FUSED, plans)
    trainer.find_pretrained_checkpoint = lambda: workspace.checkpoint("TopoMAEPretrainer")
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.network.pyramid.state_dict().items()}
    trainer.load_pretrained_weights()
    assert all(gain.unique().tolist() == pytest.approx([0.7]) for gain in trainer.network.pyramid.gains)
    for name, tensor in trainer.network.pyramid.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(trainer.network.vit.norm.weight, pretrained.task.vit.norm.weight)


def _rates(trainer):
    """The learning rate of every epoch's first iteration, and whether all groups have the same."""
    return [max(f(i * trainer.num_iterations_per_epoch) for f in trainer.lr_scheduler.lr_lambdas) for i in range(20)]


def test_nnssls_recipe_is_trained_with(workspace, log):
    """Its schedule: linear in the warm-up, then nnU-Net's poly over what is left; a new rate every epoch."""
    block = {"recipe": "nnssl", "num_epochs": 20, "num_iterations_per_epoch": 3, "from_scratch": True}
    plans = workspace.write_plans("Nnssl", lambda c: c.update(finetuning=block))
    trainer = workspace.trainer(FUSED, plans)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.defaults["nesterov"]
    assert trainer.optimizer.defaults["momentum"] == 0.99
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0, 3e-5}
    assert _rates(trainer) == pytest.approx([0.5, 1.0, *((1 - epoch / 18) ** 0.9 for epoch in range(18))])
    assert len({trainer.lr_scheduler.lr_lambdas[0](iteration) for iteration in (6, 7, 8)}) == 1
    assert "Fine-tuning recipe: nnssl" in log


def test_the_log_names_keys_that_overrule_the_recipe(workspace, log):
    block = {"recipe": "anatomask", "num_epochs": 20, "base_lr": 0.5}
    workspace.trainer(FUSED, workspace.write_plans("Overruled", lambda c: c.update(finetuning=block))).initialize()
    assert "Fine-tuning recipe: anatomask, except for what the plans say themselves: base_lr" in log


STAGED = {
    "recipe": "staged",
    "num_epochs": 4,
    "freeze_epochs": 2,
    "warmup_epochs": 1,
    "num_iterations_per_epoch": 2,
    "num_val_iterations_per_epoch": 1,
}


def _changed(trainer, before):
    """Names of parameters that have changed."""
    return {n for n, p in trainer.network.named_parameters() if not torch.equal(p, before[n])}


def test_fresh_parts_learn_first(workspace, pretrained):
    plans = workspace.write_plans("Staged", lambda c: c.update(finetuning=STAGED))
    link_pretraining(workspace, plans)
    trainer = workspace.trainer(FUSED, plans)
    trainer.num_epochs = 2
    states = []
    trainer.on_epoch_end = lambda: states.append({n: p.detach().clone() for n, p in trainer.network.named_parameters()})
    trainer.perform_actual_validation = lambda *args, **kwargs: None
    trainer.on_train_start()
    states.append({n: p.detach().clone() for n, p in trainer.network.named_parameters()})
    learning = set()
    for epoch in range(3):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
        learning = _changed(trainer, states[0])
        if epoch < 2:
            assert {name.split(".")[0] for name in learning} == {"pyramid", "decoder"}
            assert {name for name in learning if name.startswith("decoder")} <= {
                name for name in states[0] if ".seg_layers." in name
            }
    trainer.on_train_end()
    assert {"vit", "encoder", "decoder", "pyramid"} <= {name.split(".")[0] for name in learning}


def test_fresh_parts_rise_and_fall_before_all_parts_do(workspace, log):
    block = {**STAGED, "num_epochs": 20, "freeze_epochs": 4, "warmup_epochs": 2, "from_scratch": True}
    trainer = workspace.trainer(FUSED, workspace.write_plans("Saw", lambda c: c.update(finetuning=block)))
    trainer.initialize()
    rates = _rates(trainer)
    assert rates[0] < rates[1] < rates[2] == 1.0 > rates[3] > rates[4]
    assert rates[4] < rates[5] < rates[6] == 1.0 > rates[7] > rates[19] > 0


def _resumed_after_an_epoch(workspace, name, block):
    """A trainer that has made one epoch from the session's pre-training, and another one that goes on from there."""
    plans = workspace.write_plans(name, lambda c: c.update(finetuning=block))
    link_pretraining(workspace, plans)
    trainer = workspace.trainer(FUSED, plans)
    trainer.num_epochs = 1
    trainer.run_training()
    resumed = workspace.trainer(FUSED, plans, continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    return trainer, resumed


def test_a_staged_training_resumes(workspace, pretrained):
    trainer, resumed = _resumed_after_an_epoch(workspace, "StagedResumed", {**STAGED, "from_scratch": False})
    assert resumed.fresh == trainer.fresh
    assert [len(g["params"]) for g in resumed.optimizer.param_groups] == [
        len(g["params"]) for g in trainer.optimizer.param_groups
    ]
    assert resumed.lr_scheduler.get_last_lr() == pytest.approx(trainer.lr_scheduler.get_last_lr())
    assert min(resumed.lr_scheduler.get_last_lr()) == 0.0  # the second frozen epoch comes next


def link_pretraining(workspace, plans):
    """Let plans of another name have the checkpoint of the session's pre-training."""
    file = workspace.checkpoint("TopoMAEPretrainer", plans)
    file.parent.mkdir(parents=True)
    file.write_bytes(workspace.checkpoint("TopoMAEPretrainer").read_bytes())


FROZEN = {"recipe": "frozen", "num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}


def _started(workspace, name, **block):
    """A trainer before its first step, and its parameters by name."""
    plans = workspace.write_plans(name, lambda c: c.update(finetuning={**FROZEN, **block}))
    link_pretraining(workspace, plans)
    trainer = workspace.trainer(FUSED, plans)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer, {n: p.detach().clone() for n, p in trainer.network.named_parameters()}


def test_a_frozen_encoder_stays_as_it_was_pretrained(workspace, pretrained):
    trainer, before = _started(workspace, "Frozen")
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    learned, task = _changed(trainer, before), pretrained.task.state_dict()
    assert {name.split(".")[0] for name in learned} == {"decoder", "pyramid"}
    assert any(name.startswith("decoder.stages") for name in learned)
    for name, parameter in trainer.network.named_parameters():
        if name.split(".")[0] in ("vit", "encoder", "full_resolution_skip"):
            assert torch.equal(parameter, task[name]), name


def test_from_scratch_the_encoder_learns(workspace, pretrained):
    trainer, before = _started(workspace, "FrozenScratch", from_scratch=True)
    trainer.train_step(next(trainer.dataloader_train))
    assert {"encoder", "full_resolution_skip", "decoder"} <= {n.split(".")[0] for n in _changed(trainer, before)}


def test_an_encoder_can_learn_more_slowly(workspace, pretrained):
    trainer, _ = _started(workspace, "Slower", encoder_lr=0.25, layer_decay=1.0)
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    for group in trainer.optimizer.param_groups:
        parts = {names[id(parameter)].split(".")[0] for parameter in group["params"]}
        is_encoder = parts <= {"vit", "encoder", "full_resolution_skip"}
        assert is_encoder or parts <= {"decoder", "pyramid"}
        assert group["initial_lr"] == pytest.approx(trainer.initial_lr * (0.25 if is_encoder else 1))


def test_an_encoder_that_was_not_pretrained_is_not_frozen(workspace, pretrained, tmp_path):
    trainer = workspace.trainer(FUSED, workspace.write_plans("FrozenFresh", lambda c: c.update(finetuning=FROZEN)))
    trainer.initialize()
    checkpoint = read_checkpoint(workspace.checkpoint("TopoMAEPretrainer"))
    checkpoint[UNTRAINED] = [*checkpoint[UNTRAINED], "vit.patch_embed.weight"]
    with pytest.raises(ValueError, match=r"not vit\.patch_embed\.weight, but finetuning\.encoder_lr is 0 in Froz"):
        trainer.take_over(checkpoint, tmp_path / "some.pth")


def test_a_frozen_training_resumes(workspace, pretrained):
    _, resumed = _resumed_after_an_epoch(workspace, "FrozenResumed", FROZEN)
    assert resumed.current_epoch == 1
    frozen = {name for name, parameter in resumed.network.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"vit", "encoder", "full_resolution_skip"}
    assert all(torch.equal(resumed.network.get_parameter(n), pretrained.task.state_dict()[n]) for n in frozen)


def test_a_network_that_names_no_encoder_cannot_be_frozen(workspace, monkeypatch):
    monkeypatch.setattr("nnunet_topomae.networks.fused.FusedViTUNETRPP.encoder_parts", lambda _: ["trunk"])
    plans = workspace.write_plans("NoEncoder", lambda c: c.update(finetuning=FROZEN))
    with pytest.raises(
        ValueError, match=r'"NoEncoder", .*finetuning\.encoder_lr is 0, but FusedViTUNETRPP has no part'
    ):
        workspace.trainer(FUSED, plans)
