import json
import multiprocessing

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch.utils.data import default_collate

from nnunet_topomae.commands import cli
from nnunet_topomae.methods.inpainting import harmonic_inpainting
from nnunet_topomae.methods.masking import mask_to_voxels
from nnunet_topomae.methods.topomae.views import KeypointViews
from nnunet_topomae.nnunet.training.pretraining import external_folders, find_pretrainer, named_pretrainers
from nnunet_topomae.nnunet.training.stage import StepDone
from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint


def test_run_leaves_checkpoints_curves_pictures_and_summary(workspace, pretrained):
    folder = workspace.checkpoint("TopoMAEPretrainer").parent
    names = {file.name for file in folder.iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "validation"} <= names
    assert "checkpoint_latest.pth" not in names
    assert imread(folder / "progress.png").std() > 0
    assert imread(folder / "validation" / "reconstructions.png").std() > 0
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    (record,) = summary["metric_per_case"]
    split = json.loads((workspace.preprocessed / "splits_final.json").read_text())[0]
    assert [record["case"]] == split["val"]
    for branch in ("vit", "unetrpp"):
        assert set(record["metrics"][branch]) == {
            "skill",
            "MSE",
            "PSNR",
            "SSIM",
            "topological_distance",
            "keypoint_error_mm",
        }
        assert all(np.isfinite(value) for value in record["metrics"][branch].values())
    assert record["metrics"]["crop in the middle"]["keypoint_error_mm"] >= 0


def test_learning_rate_is_scaled_by_the_batch(pretrained):
    assert pretrained.initial_lr == pytest.approx(6.4e-3 * 2 / 256)


def test_only_training_cases_of_the_fold_are_drawn(workspace, pretrained):
    split = json.loads((workspace.preprocessed / "splits_final.json").read_text())[0]
    training, validation = pretrained.get_tr_and_val_datasets()
    assert sorted(training.identifiers) == sorted(split["train"])
    drawn = {pretrained.stream(training, 0, mirror=True)[i]["case"] for i in range(30)}
    assert drawn == set(split["train"])
    assert not drawn & set(validation.identifiers)


def test_labels_are_not_used(workspace, pretrained, monkeypatch):
    training, _ = pretrained.get_tr_and_val_datasets()
    monkeypatch.setattr(training, "load_case", None)  # which reads labels, and unpickles properties
    assert pretrained.stream(training, 0, mirror=True)[0]["crop"].isfinite().all()


def test_every_term_is_logged_once_an_epoch(pretrained):
    log = pretrained.logger.local_logger.my_fantastic_logging
    assert {"train_losses", "val_losses", "train_vit_topological", "val_spatial_consistency", "lrs"} <= set(log)
    assert {len(values) for values in log.values()} == {3}


def test_skill_compares_the_error_of_all_validation_crops_with_that_of_inpainting(pretrained):
    """Recomputed from the crops of a validation epoch."""
    loader = pretrained.get_dataloaders()[1]
    batches = [next(loader) for _ in range(pretrained.num_val_iterations_per_epoch)]
    pretrained.network.eval()
    errors, inpainted = [], []
    for batch in batches:
        crop, hidden = batch["crop"], mask_to_voxels(batch["mask"], pretrained.task.patch_size)
        where = hidden.expand_as(crop)
        with torch.no_grad():
            reconstruction = pretrained.task(batch).reconstructions["vit"]
        errors.append((reconstruction - crop)[where].square().mean().item())
        inpainted.append((harmonic_inpainting(crop, hidden) - crop)[where].square().mean().item())
    skill = pretrained.logger.local_logger.skills()["vit"][-1]
    assert skill == pytest.approx(1 - sum(errors) / sum(inpainted), rel=1e-4)


def test_a_run_that_has_learned_nothing_says_so(workspace, pretrained):
    assert pretrained.logger.local_logger.skills()["vit"][-1] < 0, "three epochs of two steps cannot teach anything"
    logs = workspace.checkpoint("TopoMAEPretrainer").parent.glob("training_log*.txt")
    said = "".join(log.read_text() for log in logs)  # other tests make trainers there, too
    assert "WARNING: ViT does worse than harmonic inpainting, which learns nothing (skill -" in said


def test_the_yardstick_is_measured_once_a_run_for_every_validation_batch(pretrained, monkeypatch):
    stream = pretrained.stream(pretrained.get_tr_and_val_datasets()[1], 1, mirror=False)
    batches = [default_collate([stream[i], stream[i + 1]]) for i in (0, 2)]
    monkeypatch.setattr(pretrained, "_baseline_errors", {})
    epochs = []
    for _ in range(2):
        pretrained.on_validation_epoch_start()
        epochs.append([pretrained.validation_step(batch)["error of the yardstick"] for batch in batches])
        monkeypatch.setattr(pretrained.task, "baseline_error", None)  # to call it again would fail
    assert epochs[0] == epochs[1]
    assert epochs[0][0] != epochs[0][1]


def test_the_skill_of_an_epoch_compares_mean_errors(pretrained, monkeypatch):
    """Errors 1 and 3 against 6 and 2: 1 - 4 / 8 = 0.5, while the mean of the batches' skills is 0.17."""
    monkeypatch.setattr(pretrained.logger.local_logger, "my_fantastic_logging", {})
    outputs = [
        {"total": np.float32(0), "error of vit": np.float32(error), "error of the yardstick": np.float32(baseline)}
        for error, baseline in ((1, 6), (3, 2))
    ]
    monkeypatch.setattr(pretrained, "current_epoch", 2)
    pretrained.log_terms(outputs, "val")
    *before, skill = pretrained.logger.local_logger.skills()["vit"]
    assert skill == 0.5
    assert len(before) == 2, "a key that is new in the third epoch has no value in the first two"
    assert np.isnan(before).all()


def _other_intensities(plans):
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (
            lambda plans: _configuration(plans).update(normalization_schemes=["RescaleTo01Normalization"]),
            r"normalization_schemes was \['CTNorm",
        ),
        (lambda plans: _configuration(plans).update(spacing=[3, 1, 1]), r"spacing was \["),
        (lambda plans: _configuration(plans)["resampling_fn_data_kwargs"].update(order=1), "resampling_fn_data_kwargs"),
        (lambda plans: plans.update(transpose_forward=[1, 0, 2]), r"transpose_forward was \[0, 1, 2\]"),
        (_other_intensities, "foreground_intensity_properties_per_channel was"),
    ],
)
def test_a_run_cannot_go_on_with_images_that_were_preprocessed_otherwise(workspace, pretrained, edit, key):
    plans = {**workspace.plans(), "plans_name": "Otherwise"}
    edit(plans)
    (workspace.preprocessed / "Otherwise.json").write_text(json.dumps(plans))
    trainer = workspace.trainer("TopoMAEPretrainer", "Otherwise")
    file = workspace.checkpoint("TopoMAEPretrainer")
    with pytest.raises(ValueError, match=rf"with other plans .* delete the folder: {key}"):
        trainer.load_checkpoint(str(file))


def test_a_run_that_goes_on_with_edited_plans_writes_these_into_its_checkpoints(workspace, pretrained):
    plans = workspace.write_plans("Longer", lambda c: c["pretraining"].update(num_epochs=9))
    trainer = workspace.trainer("TopoMAEPretrainer", plans)
    trainer.load_checkpoint(str(workspace.checkpoint("TopoMAEPretrainer")))
    assert trainer.checkpoint()["init_args"]["plans"] == workspace.plans(plans)


def test_a_run_goes_on_with_the_settings_of_the_present_plans(workspace, pretrained):
    settings = {"weight_decay": 0.3, "base_lr": 0.1}
    plans = workspace.write_plans("Decayed", lambda c: c["pretraining"].update(settings))
    trainer = workspace.trainer("TopoMAEPretrainer", plans)
    trainer.load_checkpoint(str(workspace.checkpoint("TopoMAEPretrainer")))
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0, 0.3}
    assert all(state["exp_avg"].any() for state in trainer.optimizer.state.values())


def test_nothing_goes_on_with_another_optimiser(workspace, pretrained):
    trainer = workspace.trainer("TopoMAEPretrainer")
    trainer.initialize()
    trainer.optimizer = torch.optim.SGD(trainer.module.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"with other plans .* delete the folder: the optimiser was another one"):
        trainer.load_checkpoint(str(workspace.checkpoint("TopoMAEPretrainer")))


def test_a_method_is_told_how_far_the_training_is(workspace):
    """AnatoMask hides more and more of what its teacher finds hard, and its teacher follows ever more slowly."""
    trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("Told", lambda c: None))
    trainer.initialize()
    trainer.num_epochs, told = 4, []
    trainer.task.choose = lambda batch, progress: told.append(("choose", progress)) or batch
    trainer.task.after_step = lambda output, batch, progress: told.append(("after_step", progress))
    batch = {**trainer.task.views().example(trainer.batch_size, trainer.num_input_channels), "case": ["a"] * 2}
    for trainer.current_epoch in (0, 3):
        trainer.step(batch)
    assert told == [("choose", 0), ("after_step", 0), ("choose", 0.75), ("after_step", 0.75)]


def test_no_process_prepares_batches_after_the_training(workspace, monkeypatch):
    """The validation of whole cases that follows needs the memory for itself."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    others = set(multiprocessing.active_children())
    trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("Ended", lambda c: None))
    trainer.on_train_start()
    next(trainer.dataloader_train), next(trainer.dataloader_val)
    assert len(set(multiprocessing.active_children()) - others) == 2
    trainer.on_train_end()
    assert not set(multiprocessing.active_children()) - others


def test_the_optimiser_is_that_of_mae(workspace):
    """He et al., Table 8: betas 0.9 and 0.95; no weight decay of biases and norms."""
    trainer = workspace.trainer("TopoMAEPretrainer")
    trainer.initialize()
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    by_decay = {name: id(p) in decayed for name, p in trainer.task.named_parameters() if p.requires_grad}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.95)}
    assert by_decay["vit.blocks.0.attn.qkv.weight"]
    assert not any(by_decay[name] for name in ("vit.blocks.0.attn.qkv.bias", "vit.norm.weight", "vit.norm.bias"))


def _configuration(plans):
    return plans["configurations"]["3d_fullres"]


def test_checkpoint_can_be_read_without_running_code(workspace, pretrained):
    checkpoint = read_checkpoint(workspace.checkpoint("TopoMAEPretrainer"))
    assert checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["pretraining"]["seed"] == 12345
    assert "pyramid.gains.0" in checkpoint["untrained_parameters"]
    assert "vit.blocks.0.mlp.fc1.weight" not in checkpoint["untrained_parameters"]


def test_best_checkpoint_has_the_lowest_validation_loss(workspace, pretrained):
    losses = pretrained.logger.get_value("val_losses", step=None)
    best = read_checkpoint(workspace.checkpoint("TopoMAEPretrainer", name="best"))
    assert best["current_epoch"] == int(np.argmin(losses)) + 1


def test_checkpoint_of_other_plans_cannot_be_continued(workspace, pretrained):
    def narrower(configuration):
        configuration["architecture"]["arch_kwargs"]["vit"]["width"] = 16

    other = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("Narrow", narrower))
    file = workspace.checkpoint("TopoMAEPretrainer")
    with pytest.raises(
        ValueError, match=r"checkpoint_final.pth was written with other plans.*delete the folder: architecture was"
    ):
        other.load_checkpoint(str(file))


def test_reconstruction_that_is_not_finite_names_the_cases(pretrained):
    batch = next(pretrained.get_dataloaders()[0])
    batch["crop"][:] = torch.nan
    with pytest.raises(ValueError, match=r"epoch \d, cases phantom_.*NaN or inf.*lower pretraining.base_lr"):
        pretrained.validate_batch(batch)


def test_a_loss_that_is_not_finite_names_the_cases_whatever_the_method(pretrained):
    terms = {"total": torch.tensor(torch.nan), "mse": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"^epoch \d, cases a, b: the loss is nan; if the images are sound"):
        pretrained._to_numpy(terms, ["a", "b"])


def test_an_error_of_a_method_is_not_taken_for_divergence(pretrained, monkeypatch):
    def fail(output, batch):
        raise ValueError("expected 3 crops")

    batch = next(pretrained.get_dataloaders()[0])
    monkeypatch.setattr(pretrained.task, "loss_terms", fail)
    with pytest.raises(ValueError, match=r"^epoch \d, cases phantom_\w+, phantom_\w+: expected 3 crops$"):
        pretrained.validation_step(batch)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"mse": torch.tensor(1.0)}, r'^TopoMAE\.loss_terms must give scalars and a "total", got mse \(\)$'),
        ({"total": torch.ones(2)}, r'^TopoMAE\.loss_terms must give scalars and a "total", got total \(2,\)$'),
    ],
)
def test_loss_terms_are_scalars_with_a_total(pretrained, monkeypatch, terms, message):
    monkeypatch.setattr(pretrained.task, "loss_terms", lambda output, batch: terms)
    with pytest.raises(ValueError, match=message):
        pretrained.loss_terms(None, {}, ["a"])


def test_a_report_that_cannot_be_drawn_stops_a_training_before_it_starts(workspace, monkeypatch):
    trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("NoReport", lambda configuration: None))
    trainer.initialize()

    def fail(output, batch):
        raise KeyError("unetrpp")

    monkeypatch.setattr(trainer.task, "shown", fail)
    with pytest.raises(KeyError):
        trainer.on_train_start()


class Prepared(KeypointViews):
    """Draws what preparation has left in a buffer."""

    def __init__(self, views, value):
        super().__init__(views.crop_size, views.mask_grid, views.mask_ratio)
        self.value = value

    def draw(self, images, case, rng, mirror):
        item = super().draw(images, case, rng, mirror)
        return {**item, "crop": torch.full_like(item["crop"], self.value)}


@pytest.mark.parametrize("stopped_after", ["step", "epoch"])
def test_a_method_prepares_itself_before_anything_is_drawn_and_only_once(workspace, stopped_after):
    plans, caught_up = workspace.write_plans(f"PreparedAfter{stopped_after}", lambda configuration: None), []

    def make(continue_training=False):
        trainer = workspace.trainer("TopoMAEPretrainer", plans, continue_training=continue_training)
        trainer.initialize()
        task = trainer.task
        task.register_buffer("prepared", torch.zeros(()))
        task.prepare = lambda images, device, log: task.prepared.add_(len(images.identifiers))
        task.catch_up = lambda images, device, log: caught_up.append(len(images.identifiers))
        task.views = lambda: Prepared(KeypointViews(task.crop_size, task.mask_grid, 0.5), float(task.prepared))
        return trainer

    trainer = make()
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    assert batch["crop"].unique().tolist() == [4]
    trainer.on_train_epoch_start()
    if stopped_after == "step":
        trainer.train_step(batch)
    trainer.task.prepared.fill_(7)  # as training may change it
    trainer.save_checkpoint(str(workspace.checkpoint("TopoMAEPretrainer", plans, name="latest")))
    resumed = make(continue_training=True)
    resumed.load_checkpoint(str(workspace.checkpoint("TopoMAEPretrainer", plans, name="latest")))
    assert resumed.current_epoch == (0 if stopped_after == "step" else 1)
    assert caught_up == []
    resumed.on_train_start()
    assert caught_up == [4]
    batches = (batch for batch in resumed.dataloader_train if not isinstance(batch, StepDone))
    assert next(batches)["crop"].unique().tolist() == [7]


@pytest.mark.parametrize("of_pretraining", [True, False])
def test_a_further_pretraining_starts_from_the_head_that_reconstructs(workspace, pretrained, of_pretraining):
    file = workspace.checkpoint("TopoMAEPretrainer")
    checkpoint = read_checkpoint(file)
    if not of_pretraining:  # but of a fine-tuning, whose head segments
        del checkpoint["untrained_parameters"]
    trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("Further"))
    trainer.initialize()
    trainer.take_over(checkpoint, file)
    head = "decoder.seg_layers.0.weight"
    assert torch.equal(trainer.module.state_dict()[head], checkpoint["network_weights"][head]) == of_pretraining


def _goes_on(trainer, file):
    trainer.load_checkpoint(str(file))


def _starts(trainer, file):
    maybe_load_checkpoint(trainer, False, False, str(file))


@pytest.mark.parametrize("begin", [_goes_on, _starts])
def test_cases_that_were_drawn_from_before_are_not_forgotten(workspace, pretrained, no_split, begin):
    file = workspace.checkpoint("TopoMAEPretrainer")
    drawn = read_checkpoint(file)["drawn_from"]
    (held_out,) = {f"phantom_{number:03d}" for number in range(5)}.difference(drawn)
    no_split.write_text(json.dumps([{"train": [held_out], "val": [drawn[0]]}]))
    trainer = workspace.trainer("TopoMAEPretrainer")
    begin(trainer, file)
    trainer.get_dataloaders()
    assert trainer.checkpoint()["drawn_from"] == sorted([*drawn, held_out])


OWN_TRAINER = """
from nnunet_topomae.methods.topomae import TopoMAE
from nnunet_topomae.nnunet.training.pretraining import Pretrainer

class OwnPretrainer(Pretrainer):
    task_class = TopoMAE
"""


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A user's folder with a trainer of theirs, the only one that ``nnUNet_extTrainer`` names."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_pretrainer.py").write_text(OWN_TRAINER)
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    return folder


def test_trainers_in_a_folder_of_the_user_are_found(own_folder, tmp_path):
    found = find_pretrainer("OwnPretrainer", [tmp_path / "empty", *external_folders()])
    assert found.__name__ == "OwnPretrainer"
    assert found.config_class is found.task_class.config_class
    assert find_pretrainer("TopoMAE", external_folders()) is None  # in the file, but no trainer
    assert find_pretrainer("Other", external_folders()) is None


def test_trainers_are_named_without_running_their_files(own_folder):
    (own_folder / "broken.py").write_bytes(b'raise RuntimeError("\xe9")\nclass BrokenPretrainer(Pretrainer):\n')
    assert named_pretrainers([own_folder]) == ["BrokenPretrainer", "OwnPretrainer"]


def test_the_checkpoint_of_a_users_trainer_is_adapted(workspace, own_folder, tmp_path, capsys, monkeypatch):
    def larger(configuration):
        configuration["patch_size"] = configuration["architecture"]["arch_kwargs"]["crop_size"] = [32, 32, 48]
        configuration["pretraining"]["topology"]["grid"] = None

    trainer = workspace.trainer("OwnPretrainer")
    trainer.num_epochs = 1
    trainer.run_training()
    checkpoint = workspace.checkpoint("OwnPretrainer")
    plans = workspace.write_plans("LargerThanOwn", larger)
    arguments = ["adapt", str(checkpoint), "-d", "998", "-p", plans, "-o", str(tmp_path / "adapted.pth")]
    assert cli.main(arguments) == 0
    adapted = read_checkpoint(tmp_path / "adapted.pth")
    assert adapted["trainer_name"] == "OwnPretrainer"
    assert adapted["init_args"]["plans"]["plans_name"] == plans

    monkeypatch.setenv("nnUNet_extTrainer", "")
    assert cli.main([*arguments[:-1], str(tmp_path / "again.pth")]) == 2
    assert f"{checkpoint} was written by OwnPretrainer, which is none of the trainers in" in capsys.readouterr().err
