"""What every pre-training trainer must do, on plans of its kind; a new one joins TRAINERS."""

import json
import re

import pytest
import torch
from matplotlib.image import imread
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint, write_checkpoint
from tiny import PLANNED_CROP, PLANNED_NETWORK, SCHEDULE, TINY_HYBRID

TRAINERS = {  # by name: trainer, plans
    "TopoMAE": ("TopoMAEPretrainer", "nnUNetTopoMAEPlans"),
    "TopoMAE, AnatoMask's masks": ("TopoMAEPretrainer", "AnatoMaskMasks"),
    "MAE": ("MAEPretrainer", "TinyUNETR"),
    "Alice": ("AlicePretrainer", "TinyAlice"),
    "Alice, hybrid network": ("AlicePretrainer", "TinyHybridAlice"),
    "SparK, default plans": ("SparKPretrainer", "nnUNetPlans"),
    "AnatoMask, default plans": ("AnatoMaskPretrainer", "nnUNetPlans"),
    "AnatoMask, ResEnc M": ("AnatoMaskPretrainer", "nnUNetResEncUNetMPlans"),
    "MiM": ("MiMPretrainer", "TinyUNETR"),
    "MiM, hybrid network": ("MiMPretrainer", "TinyHybrid"),
    "MiM, ResEnc M": ("MiMPretrainer", "ResEncMiM"),
    "CropContrast, the worked example": ("CropContrastPretrainer", "CropContrastPlans"),
}


@pytest.fixture(scope="module")
def plans(workspace):
    """nnU-Net's own plans with few features, and ours for every method."""
    for name in ("nnUNetPlans", "nnUNetResEncUNetMPlans"):
        file = workspace.preprocessed / f"{name}.json"
        content = json.loads(file.read_text())
        for configuration in content["configurations"].values():
            if "architecture" in configuration:
                arguments = configuration["architecture"]["arch_kwargs"]
                arguments["features_per_stage"] = [4 * 2**n for n in range(arguments["n_stages"])]
        full = content["configurations"]["3d_fullres"]
        full["batch_size"] = 2
        full["pretraining"] = {**SCHEDULE, "decoder_width": 16}
        full["finetuning"] = SCHEDULE
        file.write_text(json.dumps(content))
    workspace.write_plans("AnatoMaskMasks", lambda c: c["pretraining"].update(mask_source="anatomask"))

    def unetr(configuration):
        arguments = {
            "crop_size": PLANNED_CROP,
            "strides": [[1] * 3, *[[2] * 3] * 3],
            "vit": PLANNED_NETWORK["vit"],
            "features": 4,
        }
        name = "nnunet_topomae.networks.unetr.UNETR"
        configuration["architecture"].update(network_class_name=name, arch_kwargs=arguments)
        configuration["pretraining"] = SCHEDULE

    workspace.write_plans("TinyUNETR", unetr)
    landmarks = {"iterations": 2, "batch_size": 1, "spacing": 4.0, "min_similarity": -1.0}
    alice = {"head_width": 32, "landmarks": landmarks}
    workspace.write_plans("TinyAlice", lambda c: c["pretraining"].update(alice), like="TinyUNETR")

    def hybrid(configuration):
        arguments = {**TINY_HYBRID, "crop_size": PLANNED_CROP, "strides": [[1] * 3, *[[2] * 3] * 3, *[[1] * 3] * 2]}
        name = "nnunet_topomae.networks.hybrid.HybridUNETR"
        configuration["architecture"].update(network_class_name=name, arch_kwargs=arguments)
        configuration["pretraining"] = {**SCHEDULE, "gamma": 2, "beta": 2, "projection_width": 32}

    workspace.write_plans("TinyHybrid", hybrid)
    workspace.write_plans("TinyHybridAlice", lambda c: c.update(pretraining={**SCHEDULE, **alice}), like="TinyHybrid")
    few = {"gamma": 2, "beta": 2, "projection_width": 32}
    workspace.write_plans("ResEncMiM", lambda c: c["pretraining"].update(few), like="nnUNetResEncUNetMPlans")

    content = json.loads((workspace.preprocessed / "nnUNetPlans.json").read_text())
    content["configurations"]["3d_fullres"]["pretraining"] = {**SCHEDULE, "temperature": 0.2}
    content["plans_name"] = "CropContrastPlans"
    (workspace.preprocessed / "CropContrastPlans.json").write_text(json.dumps(content))


@pytest.fixture(scope="module", params=TRAINERS)
def trained(request, workspace, plans):
    """A finished pre-training and where it came from."""
    name, plans_name = TRAINERS[request.param]
    trainer = workspace.trainer(name, plans_name, fold=1, pictures=1)
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer, name, plans_name


def test_report_pictures_and_figures_exist(workspace, trained):
    _, name, plans_name = trained
    folder = workspace.checkpoint(name, plans_name, fold=1).parent
    for picture in ("progress.png", "validation/reconstructions.png"):
        assert imread(folder / picture).std() > 0
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert all(value is not None for branch in summary["mean"].values() for value in branch.values())


def test_validation_is_the_same_in_every_epoch(trained):
    trainer = trained[0]
    _, loader = trainer.get_dataloaders()
    period = trainer.num_val_iterations_per_epoch
    batches = [next(loader) for _ in range(2 * period)]
    first, again = (
        {name: value for name, value in batches[n].items() if isinstance(value, torch.Tensor)} for n in (0, period)
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


class Interrupted(Exception):
    pass


def test_interrupted_and_resumed_run_ends_with_the_same_weights(workspace, trained, monkeypatch):
    _, name, plans_name = trained
    resumable = f"{plans_name}Resumed{name}"
    content = json.loads((workspace.preprocessed / f"{plans_name}.json").read_text())
    content["configurations"]["3d_fullres"].setdefault("pretraining", {})["save_every"] = 1
    (workspace.preprocessed / f"{resumable}.json").write_text(json.dumps({**content, "plans_name": resumable}))
    trainer = workspace.trainer(name, resumable, fold=1)
    trainer.initialize()
    step = trainer.train_step

    def interrupted_step(batch):
        if trainer.current_epoch == 2:
            raise Interrupted  # in the middle of an epoch
        return step(batch)

    monkeypatch.setattr(trainer, "train_step", interrupted_step)
    with pytest.raises(Interrupted):
        trainer.run_training()
    torch.manual_seed(99)  # another process would not have this one's random state either
    resumed = workspace.trainer(name, resumable, fold=1, continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    assert resumed.current_epoch == 2
    resumed.run_training()
    expected, got = (read_checkpoint(workspace.checkpoint(name, p, fold=1)) for p in (plans_name, resumable))
    assert any("teacher" in key for key in got["network_weights"]) == (
        getattr(trainer.config, "mask_source", None) == "anatomask"
    )
    for key, tensor in expected["network_weights"].items():
        assert torch.equal(got["network_weights"][key], tensor), key
    for key, state in expected["optimizer_state"]["state"].items():
        assert torch.equal(got["optimizer_state"]["state"][key]["exp_avg_sq"], state["exp_avg_sq"])
    assert got["logging"]["train_losses"] == expected["logging"]["train_losses"]
    assert got["logging"]["lrs"] == expected["logging"]["lrs"]


def test_stock_trainer_starts_from_the_checkpoint(workspace, trained):
    pretrainer, name, plans_name = trained
    stock = workspace.trainer("nnUNetTrainer", plans_name, fold=1)
    stock.initialize()
    load_pretrained_weights(stock.network, str(workspace.checkpoint(name, plans_name, fold=1)))
    learned = dict(pretrainer.task.named_parameters())
    trained_names = {key for key, parameter in learned.items() if parameter.requires_grad}
    shared = [key for key in stock.network.state_dict() if key in trained_names and ".seg_layers." not in key]
    assert shared
    assert all(torch.equal(stock.network.state_dict()[key], learned[key]) for key in shared)


def test_fine_tuning_finds_the_checkpoint_itself(workspace, trained):
    _, name, plans_name = trained
    file = workspace.preprocessed / f"{plans_name}.json"
    content = json.loads(file.read_text())
    content["configurations"]["3d_fullres"]["finetuning"] = {**SCHEDULE, "num_epochs": 1, "pretrainer": name}
    chosen = f"{plans_name}With{name}"
    (workspace.preprocessed / f"{chosen}.json").write_text(json.dumps({**content, "plans_name": chosen}))
    link = workspace.checkpoint(name, chosen, fold=1).parents[1]
    link.symlink_to(workspace.checkpoint(name, plans_name, fold=1).parents[1])
    trainer = workspace.trainer("PretrainedFinetuneTrainer", chosen, fold=1)
    assert trainer.find_pretrained_checkpoint() == workspace.checkpoint(name, chosen, fold=1)
    trainer.run_training()
    checkpoint = read_checkpoint(workspace.checkpoint("PretrainedFinetuneTrainer", chosen, fold=1))
    assert checkpoint["trainer_name"] == "nnUNetTrainer"


def test_two_pretrainings_are_no_choice_of_ours(workspace, plans):
    for name in ("SparKPretrainer", "AnatoMaskPretrainer"):
        file = workspace.checkpoint(name, "nnUNetPlans", fold=2)
        file.parent.mkdir(parents=True)
        write_checkpoint({"network_weights": {}, "untrained_parameters": []}, file)
    trainer = workspace.trainer("PretrainedFinetuneTrainer", "nnUNetPlans", fold=2)
    with pytest.raises(ValueError, match=r"checkpoints of AnatoMaskPretrainer and SparKPretrainer; set finetuning\."):
        trainer.find_pretrained_checkpoint()


def test_without_any_pretraining_all_commands_are_named_that_take_the_plans(workspace, plans):
    trainer = workspace.trainer("PretrainedFinetuneTrainer", "nnUNetPlans", fold=3)
    with pytest.raises(ValueError, match="no pre-trained checkpoint of fold 3") as error:
        trainer.find_pretrained_checkpoint()
    command = r"nnUNetv2_train Dataset998_Phantom 3d_fullres 3 -p nnUNetPlans -tr (\w+)"
    assert re.findall(command, str(error.value)) == ["AnatoMaskPretrainer", "MiMPretrainer", "SparKPretrainer"]


@pytest.mark.parametrize(
    ("trainer", "plans_name", "message"),
    [
        ("TopoMAEPretrainer", "nnUNetPlans", "TopoMAE pre-trains a FusedViTUNETRPP, but the plans name PlainConvUNet"),
        (
            "AlicePretrainer",
            "nnUNetPlans",
            "Alice pre-trains a ViT or a hybrid encoder, but the plans name Plain",
        ),
        ("MAEPretrainer", "nnUNetPlans", "MAE pre-trains the ViT of a network, but the plans name PlainConvUNet"),
        ("AnatoMaskPretrainer", "TinyUNETR", "AnatoMask pre-trains a PlainConvUNet or ResidualEncoderUNet, but"),
        ("SparKPretrainer", "nnUNetTopoMAEPlans", "SparK pre-trains a PlainConvUNet or ResidualEncoderUNet, but"),
    ],
)
def test_plans_of_another_kind_are_refused(workspace, plans, trainer, plans_name, message):
    def without_block(configuration):
        configuration.pop("pretraining", None)

    content = json.loads((workspace.preprocessed / f"{plans_name}.json").read_text())
    without_block(content["configurations"]["3d_fullres"])
    other = f"{plans_name}Bare"
    (workspace.preprocessed / f"{other}.json").write_text(json.dumps({**content, "plans_name": other}))
    with pytest.raises(ValueError, match=message):
        workspace.trainer(trainer, other)


def test_a_wrong_network_is_named_before_keys_of_another_method(workspace, plans):
    with pytest.raises(ValueError, match="but the plans name FusedViTUNETRPP"):
        workspace.trainer("SparKPretrainer", "nnUNetTopoMAEPlans")
