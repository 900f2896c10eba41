"""Plans of the hybrid network and of UNETR, for MiM and for Alice."""

import json
from math import prod

import numpy as np
import pytest
import torch

from nnunet_topomae.commands.cli import find_planner
from nnunet_topomae.nnunet.planning.memory import GIB
from nnunet_topomae.trainers.alice_pretrainer import AlicePretrainer
from nnunet_topomae.trainers.mim_pretrainer import MiMPretrainer
from nnunet_topomae.trainers.pretrained_finetune_trainer import PretrainedFinetuneTrainer
from unplanned import DATASET, make_planner, trace_quickly

PLANNERS = {  # name of the plans, trainer of pre-training
    "MiMUNETRPlanner": ("nnUNetMiMUNETRPlans", MiMPretrainer),
    "TopoMAEHybridPlanner": ("nnUNetTopoMAEHybridPlans", MiMPretrainer),
    "AliceHybridPlanner": ("nnUNetAliceHybridPlans", AlicePretrainer),
    "AliceUNETRPlanner": ("nnUNetAliceUNETRPlans", AlicePretrainer),
}
ABDOMEN, HIPPOCAMPUS, HEART, PROSTATE = (  # images: voxels per axis and spacing in mm (z, y, x)
    ((96, 96, 96), (1.5, 1.5, 1.5)),
    ((36, 50, 35), (1.0, 1.0, 1.0)),
    ((16, 160, 160), (10.0, 1.5, 1.5)),
    ((9, 320, 320), (6.0, 0.5, 0.5)),
)


@pytest.fixture(autouse=True)
def _quick_traces(monkeypatch):
    trace_quickly(monkeypatch)


def plan(tmp_path, monkeypatch, planner, images=ABDOMEN, **kwargs):
    made = make_planner(tmp_path, monkeypatch, *images, planner_class=find_planner(planner), **kwargs)
    return made.plan_experiment()


def full(plans):
    return plans["configurations"]["3d_fullres"]


@pytest.mark.parametrize("images", [ABDOMEN, HIPPOCAMPUS, HEART, PROSTATE])
@pytest.mark.parametrize("planner", PLANNERS)
def test_both_stages_take_the_plans(tmp_path, monkeypatch, planner, images):
    name, pretrainer = PLANNERS[planner]
    plans = plan(tmp_path, monkeypatch, planner, images)
    assert plans["plans_name"] == name
    assert list(plans["configurations"]) == ["3d_fullres"]
    written = json.loads((tmp_path / "preprocessed" / DATASET / f"{name}.json").read_text())
    assert written["configurations"]["3d_fullres"]["architecture"] == full(plans)["architecture"]
    settings = pretrainer.check_plans(plans, "3d_fullres")["pretraining"]
    assert settings.num_epochs == full(plans)["pretraining"]["num_epochs"]
    PretrainedFinetuneTrainer.check_plans(plans, "3d_fullres")


@pytest.mark.parametrize(
    ("images", "crop", "strides", "patch"),
    [  # a stride of 4 becomes two of 2; what is left of five halvings is 1, at the end
        (ABDOMEN, [96, 96, 96], [[2, 2, 2]] * 5, (16, 16, 16)),
        (HIPPOCAMPUS, [40, 56, 40], [*[[2, 2, 2]] * 3, *[[1, 1, 1]] * 2], (8, 8, 8)),
        (HEART, [16, 160, 160], [*[[1, 2, 2]] * 2, *[[2, 2, 2]] * 2, [1, 2, 2]], (4, 16, 16)),
        (PROSTATE, [10, 320, 320], [*[[1, 2, 2]] * 3, [2, 2, 2], [1, 2, 2]], (2, 16, 16)),
    ],
)
@pytest.mark.parametrize("planner", ["TopoMAEHybridPlanner", "AliceHybridPlanner"])
def test_strides_of_the_hybrid_network(tmp_path, monkeypatch, planner, images, crop, strides, patch):
    plans = plan(tmp_path, monkeypatch, planner, images)
    arguments = full(plans)["architecture"]["arch_kwargs"]
    assert full(plans)["patch_size"] == arguments["crop_size"] == crop
    assert arguments["strides"] == [[1, 1, 1], *strides]
    assert np.prod(arguments["strides"][:-1], axis=0).tolist() == list(patch)


def test_the_hybrid_encoder_is_the_published_one_and_starts_local(tmp_path, monkeypatch):
    arguments = full(plan(tmp_path, monkeypatch, "TopoMAEHybridPlanner"))["architecture"]["arch_kwargs"]
    assert arguments["encoder"] == {
        "widths": [48, 96, 192, 384], "depths": [2, 2, 2, 11], "num_heads": 12, "local_start": True,
    }  # fmt: skip


@pytest.mark.parametrize("planner", ["MiMUNETRPlanner", "TopoMAEHybridPlanner"])
def test_settings_of_mim(tmp_path, monkeypatch, planner):
    """Table 3 of its paper."""
    configuration = full(plan(tmp_path, monkeypatch, planner))
    pretraining = configuration["pretraining"]
    assert (pretraining["base_lr"], pretraining["scale_lr"], pretraining["weight_decay"]) == (1e-4, False, 0.01)
    assert (pretraining["levels"], pretraining["gamma"], pretraining["beta"]) == (3, 4, 4)
    assert pretraining["alignment_weights"] == [0.1, 0.1]
    assert "mask_ratio" not in pretraining
    expected = 100 / 45_000 * pretraining["num_epochs"]  # 100 of 45 K steps
    assert pretraining["warmup_epochs"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("planner", ["AliceUNETRPlanner", "AliceHybridPlanner"])
def test_settings_of_alice(tmp_path, monkeypatch, planner):
    """Section 4.2 of its paper."""
    pretraining = full(plan(tmp_path, monkeypatch, planner))["pretraining"]
    assert (pretraining["base_lr"], pretraining["mask_ratio"], pretraining["matcher"]) == (5e-5, 0.75, "embedding")
    assert pretraining["warmup_epochs"] == pytest.approx(0.03 * pretraining["num_epochs"], abs=0.05)
    assert "levels" not in pretraining


def test_fine_tuning_of_the_hybrid_network_is_that_of_mim_and_of_a_unetr_that_of_a_vit(tmp_path, monkeypatch):
    hybrid, unetr = (
        PretrainedFinetuneTrainer.check_plans(plan(tmp_path, monkeypatch, planner), "3d_fullres")["finetuning"]
        for planner in ("TopoMAEHybridPlanner", "MiMUNETRPlanner")
    )
    assert (hybrid.drop_path, hybrid.layer_decay) == (0.2, 1)
    assert (unetr.base_lr, unetr.weight_decay, unetr.layer_decay) == (0.1, 0.005, 0.75)


@pytest.mark.parametrize("images", [ABDOMEN, HIPPOCAMPUS, HEART, PROSTATE])
@pytest.mark.parametrize("planner", ["MiMUNETRPlanner", "TopoMAEHybridPlanner"])
def test_the_crop_that_is_drawn_is_twice_as_large_and_its_units_are_whole_patches(
    tmp_path, monkeypatch, planner, images
):
    configuration = full(plan(tmp_path, monkeypatch, planner, images))
    planned = find_planner(planner)
    with torch.device("meta"):
        network = planned.network_class(1, 1, deep_supervision=False, **configuration["architecture"]["arch_kwargs"])
        task = planned.task_class.build(network, planned.task_class.config_class(), configuration["patch_size"])
    views = task.views()
    example = views.example(2, 1)
    assert list(example["crop"].shape[2:]) == [2 * size for size in configuration["patch_size"]]
    units = views.levels[0]
    assert all(patches % parts == 0 for patches, parts in zip(task.patch_grid, units.grid, strict=True))
    assert 4 <= units.num_hidden < prod(units.grid)


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_batch_fits_into_the_memory_of_both_stages(tmp_path, monkeypatch, planner):
    """The stage that takes more decides, whichever it is."""
    batches = []
    for pretraining in (0.5, 1, 3):
        trace_quickly(monkeypatch, pretraining)
        configuration = full(plan(tmp_path, monkeypatch, planner, num_cases=200))
        batches.append(configuration["batch_size"])
        a_crop = max(pretraining, 1) * 1100 * 96**3
        assert configuration["batch_size"] == (8 - 1.5) * GIB // a_crop
    assert batches[0] == batches[1] > batches[2] >= 2


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(
    ("images", "target", "message"),
    [
        (((1, 512, 512), (1.5, 1.0, 1.0)), 8, rf"^{DATASET} is a 2D dataset; (\w+)Planner plans 3D images only, use"),
        (ABDOMEN, 0.5, rf"^{DATASET}: no crop fits into 0\.5 GB; raise -gpu_memory_target$"),
    ],
)
def test_what_cannot_be_planned_is_refused_and_nothing_is_written(
    tmp_path, monkeypatch, planner, images, target, message
):
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, monkeypatch, planner, images, gpu_memory_target_in_gb=target)
    assert not (tmp_path / "preprocessed" / DATASET / f"{PLANNERS[planner][0]}.json").exists()


def _pretraining(**changes):
    return lambda configuration: configuration["pretraining"].update(changes)


def _crop(*size):
    def edit(configuration):
        configuration["patch_size"] = configuration["architecture"]["arch_kwargs"]["crop_size"] = list(size)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [  # of a crop of 6 x 6 x 6 patches
        (_pretraining(units=[4, 2, 2]), "pretraining.units [4, 2, 2] in the plans must divide the 6 x 6 x 6 patches "),
        (_pretraining(gamma=5), "pretraining.gamma in the plans must be at most 4, as many as there are masked units"),
        (_pretraining(beta=131), "pretraining.beta in the plans must be at most 130, as many as there are masked patc"),
        (_pretraining(mask_ratios=[0.5, 0.6]), "pretraining.mask_ratios in the plans must be a list of 3"),
        (_pretraining(mask_ratio=0.6), "unknown key pretraining.mask_ratio in the plans"),
        (_crop(96, 96, 90), "crop size (96, 96, 90) is not divisible by the total stride of the network, (32, 32, 32)"),
        (lambda c: c.update(patch_size=[96, 96, 64]), "patch_size [96, 96, 64] and architecture.arch_kwargs.crop_size"),
        (
            lambda c: c["architecture"]["arch_kwargs"]["encoder"].update(num_heads=7),
            "width 384 of the last stage is not divisible by 7 heads",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused_with_one_sentence(tmp_path, monkeypatch, edit, message):
    plans = plan(tmp_path, monkeypatch, "TopoMAEHybridPlanner")
    edit(full(plans))
    with pytest.raises(ValueError, match=r"^plans ") as error:
        MiMPretrainer.check_plans(plans, "3d_fullres")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plans_for_one_method_are_not_taken_by_the_other(tmp_path, monkeypatch):
    plans = plan(tmp_path, monkeypatch, "TopoMAEHybridPlanner")
    with pytest.raises(ValueError, match=r"written for another method \(by TopoMAEHybridPlanner\)"):
        AlicePretrainer.check_plans(plans, "3d_fullres")
