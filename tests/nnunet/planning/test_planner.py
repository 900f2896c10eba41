import json
from functools import partial

import numpy as np
import pytest
import torch

from nnunet_topomae.commands.cli import find_planner
from nnunet_topomae.methods.topomae import TopoMAEConfig
from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.nnunet.planning import planner as planner_module
from nnunet_topomae.nnunet.planning.geometry import choose_patch_size, fit_strides, shrinking_crops
from nnunet_topomae.nnunet.planning.memory import GIB
from nnunet_topomae.nnunet.planning.planner import epochs_for
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner
from nnunet_topomae.trainers.alice_pretrainer import AlicePretrainer
from nnunet_topomae.trainers.mae_pretrainer import MAEPretrainer
from nnunet_topomae.trainers.pretrained_finetune_trainer import PretrainedFinetuneTrainer
from nnunet_topomae.trainers.topomae_pretrainer import TopoMAEPretrainer
from unplanned import DATASET, make_planner, trace_quickly


@pytest.fixture(autouse=True)
def _quick_traces(monkeypatch):
    trace_quickly(monkeypatch)


@pytest.mark.parametrize(
    ("spacing", "crop", "padded", "strides"),
    [
        ((1.5,) * 3, (96, 96, 96), (96, 96, 96), [[4] * 3, [2] * 3, [2] * 3, [2] * 3]),  # the paper's
        ((1, 1, 1), (36, 50, 35), (40, 56, 40), [[2] * 3, [2] * 3, [2] * 3, [1] * 3]),  # hippocampus
        ((10, 1.5, 1.5), (16, 160, 160), (16, 160, 160), [[1, 4, 4], [2] * 3, [2] * 3, [1, 2, 2]]),  # thick slices
        ((6, 0.5, 0.5), (9, 320, 320), (10, 320, 320), [[1, 4, 4], [1, 2, 2], [2] * 3, [1, 2, 2]]),
    ],
)
def test_strides(spacing, crop, padded, strides):
    got_crop, got_strides, divisor = fit_strides(spacing, crop)
    assert got_crop == padded
    assert [list(s) for s in got_strides] == [[1, 1, 1], *strides]
    assert all(c % d == 0 for c, d in zip(got_crop, divisor, strict=True))


@pytest.mark.parametrize(
    ("crop", "spacing", "patch"),
    [
        ((96, 96, 96), (1.5,) * 3, (16, 16, 16)),  # 216 tokens
        ((40, 56, 40), (1, 1, 1), (8, 8, 8)),  # 175
        ((16, 160, 160), (10, 1.5, 1.5), (4, 16, 16)),  # 400 tokens of 40 x 24 x 24 mm
        ((12, 12, 12), (1, 1, 1), (2, 2, 2)),  # 216
    ],
)
def test_patches(crop, spacing, patch):
    assert choose_patch_size(crop, spacing) == patch


def test_crops_shrink_to_nothing_and_every_one_can_be_built():
    crops = [crop for crop, _ in shrinking_crops((5, 0.8, 0.8), (24, 300, 300))]
    voxels = [np.prod(crop) for crop in crops]
    assert voxels == sorted(voxels, reverse=True)
    assert len(set(crops)) == len(crops)
    assert voxels[-1] < 10_000


@pytest.mark.parametrize(("cases", "epochs"), [(30, 600), (260, 5200), (1, 20)])
def test_epochs_from_passes(cases, epochs):
    assert epochs_for(10_000, cases, 2, TopoMAEConfig()) == epochs


class SmallPlanner(TopoMAEPlanner):
    """Networks that are quick to trace."""

    vit = {"width": 64, "depth": 4, "num_heads": 2}
    features_per_stage = (8, 16, 32, 64)


_planner = partial(make_planner, planner_class=SmallPlanner)


@pytest.mark.parametrize(
    ("shape", "spacing", "channels"),
    [
        ((96, 128, 128), (1.5, 1.0, 1.0), ("CT",)),
        ((36, 50, 35), (1.0, 1.0, 1.0), ("MRI", "T2", "CT")),
        ((20, 320, 320), (6.0, 0.5, 0.5), ("MRI",)),
        ((12, 13, 14), (1.0, 1.0, 1.0), ("MRI",)),
    ],
)
def test_plans_of_any_3d_dataset_can_be_trained(tmp_path, monkeypatch, shape, spacing, channels):
    plans = _planner(tmp_path, monkeypatch, shape, spacing, channels).plan_experiment()
    assert "2d" not in plans["configurations"]
    plan = plans["configurations"]["3d_fullres"]
    TopoMAEPretrainer.check_plans(plans, "3d_fullres")
    assert plan["patch_size"] == plan["architecture"]["arch_kwargs"]["crop_size"]
    assert plan["batch_size"] >= 2
    assert plan["pretraining"]["mask_ratio"] == 0.5
    written = json.loads((tmp_path / "preprocessed" / DATASET / "nnUNetTopoMAEPlans.json").read_text())
    assert written["configurations"]["3d_fullres"]["patch_size"] == plan["patch_size"]


def test_intensities_are_normalised_as_nnunet_does_by_default(tmp_path, monkeypatch):
    plans = _planner(tmp_path, monkeypatch, channels=("CT", "MRI")).plan_experiment()
    plan = plans["configurations"]["3d_fullres"]
    assert plan["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    fingerprint = json.loads((tmp_path / "preprocessed" / DATASET / "dataset_fingerprint.json").read_text())
    key = "foreground_intensity_properties_per_channel"
    assert plans[key] == fingerprint[key]


def test_vits_of_default_plans_start_local_and_pre_training_has_no_dropout(tmp_path, monkeypatch):
    plan = _planner(tmp_path, monkeypatch).plan_experiment()["configurations"]["3d_fullres"]
    assert plan["architecture"]["arch_kwargs"]["vit"]["local_start"] is True
    assert plan["pretraining"]["dropout"] == 0


@pytest.mark.parametrize(("unit", "scheme"), [(False, "ZScoreNormalization"), (True, "RescaleTo01Normalization")])
def test_nnunets_mask_for_normalisation_belongs_to_its_z_scores(tmp_path, monkeypatch, unit, scheme):
    planner_class = UnitPlanner if unit else SmallPlanner
    planner = _planner(tmp_path, monkeypatch, channels=("T1", "T2"), planner_class=planner_class)
    planner.dataset_fingerprint["median_relative_size_after_cropping"] = 0.5  # images that are empty outside the body
    plan = planner.plan_experiment()["configurations"]["3d_fullres"]
    assert plan["normalization_schemes"] == [scheme] * 2
    assert plan["use_mask_for_norm"] == [not unit] * 2


def _without_foreground(tmp_path, monkeypatch, planner_class):
    _planner(tmp_path, monkeypatch, channels=("CT",), planner_class=planner_class)
    file = tmp_path / "preprocessed" / DATASET / "dataset_fingerprint.json"
    fingerprint = json.loads(file.read_text())
    for properties in fingerprint["foreground_intensity_properties_per_channel"].values():
        properties.update(dict.fromkeys(properties, float("nan")))
    file.write_text(json.dumps(fingerprint))
    return planner_class(777)


class UnitPlanner(SmallPlanner):
    unit_intensities = True


class RangePlanner(UnitPlanner):
    intensity_range = (-175, 250)


@pytest.mark.parametrize("planner_class", [SmallPlanner, UnitPlanner])
def test_ct_without_foreground_has_nothing_to_be_normalised_by(tmp_path, monkeypatch, planner_class):
    with pytest.raises(ValueError, match="channel 0 is CT, but no case has a labelled foreground"):
        _without_foreground(tmp_path, monkeypatch, planner_class)


def test_ct_without_foreground_can_be_scaled_by_a_range(tmp_path, monkeypatch):
    plans = _without_foreground(tmp_path, monkeypatch, RangePlanner).plan_experiment()
    properties = plans["foreground_intensity_properties_per_channel"]["0"]
    assert (properties["mean"], properties["std"]) == (-175, 425)


def test_a_range_without_unit_intensities_is_refused(tmp_path, monkeypatch):
    planner_class = type("Clipped", (SmallPlanner,), {"intensity_range": (0, 1)})
    with pytest.raises(ValueError, match="Clipped: intensity_range needs unit_intensities"):
        _planner(tmp_path, monkeypatch, planner_class=planner_class)


def test_unlabelled_cases_of_another_normalisation_are_not_mixed_with_new_ones(tmp_path, monkeypatch):
    _planner(tmp_path, monkeypatch, channels=("MRI",), planner_class=UnitPlanner).plan_experiment()
    folder = tmp_path / "preprocessed" / DATASET
    unlabelled = folder / "nnUNetTopoMAEPlans_3d_fullres_unlabelled"
    unlabelled.mkdir()
    (unlabelled / "case.pkl").touch()
    (unlabelled / "case.b2nd").touch()
    before = (folder / "nnUNetTopoMAEPlans.json").read_text()
    with pytest.raises(
        ValueError, match=r"_unlabelled holds cases .*\(normalization_schemes is .*\); delete that folder"
    ):
        SmallPlanner(777).plan_experiment()
    assert (folder / "nnUNetTopoMAEPlans.json").read_text() == before
    UnitPlanner(777).plan_experiment()


def test_the_papers_intensities_go_to_the_unit_interval_by_nnunets_own_normalisation(tmp_path, monkeypatch):
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

    plans = _planner(tmp_path, monkeypatch, channels=("CT", "MRI"), planner_class=UnitPlanner).plan_experiment()
    plan = plans["configurations"]["3d_fullres"]
    assert plan["normalization_schemes"] == ["CTNormalization", "RescaleTo01Normalization"]
    properties = plans["foreground_intensity_properties_per_channel"]["0"]
    hu = np.array([-1000, -175, 0, 37.5, 250, 3000], dtype=np.float32)
    scaled = CTNormalization(False, properties).run(hu)
    np.testing.assert_allclose(scaled, [0, 0, 175 / 425, 0.5, 1, 1], atol=1e-6)
    fingerprint = json.loads((tmp_path / "preprocessed" / DATASET / "dataset_fingerprint.json").read_text())
    assert fingerprint["foreground_intensity_properties_per_channel"]["0"]["mean"] == 40  # left as nnU-Net wrote it


def test_crops_and_batches_grow_with_the_memory_target(tmp_path, monkeypatch):
    voxels = []
    for target in (2, 4, 8, 11, 24, 40, 80):
        planner = _planner(tmp_path, monkeypatch, shape=(192, 384, 384), gpu_memory_target_in_gb=target)
        plan = planner.plan_experiment()["configurations"]["3d_fullres"]
        taken = plan["batch_size"] * np.prod(plan["patch_size"])
        assert 1.5 * GIB + 1100 * taken <= target * GIB
        voxels.append(taken)
    assert voxels == sorted(voxels)
    assert len(set(voxels)) == len(voxels)


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    planner = _planner(tmp_path, monkeypatch, gpu_memory_target_in_gb=0.5)
    with pytest.raises(ValueError, match=r"no crop fits into 0\.5 GB"):
        planner.plan_experiment()


def test_crops_that_a_method_refuses_do_not_fit(tmp_path, monkeypatch):
    def refuse(task_class, sizes):
        raise ValueError("too few patches")

    monkeypatch.setattr(planner_module, "trace_pretraining", refuse)
    planner = _planner(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="no crop fits into"):
        planner.plan_experiment()
    planner.crop_size = (64, 64, 64)
    with pytest.raises(ValueError, match="too few patches"):
        planner.plan_experiment()


def _plan_epochs(tmp_path, monkeypatch, planner_class=SmallPlanner, **kwargs):
    plan = _planner(tmp_path, monkeypatch, planner_class=planner_class, **kwargs).plan_experiment()
    configuration = plan["configurations"]["3d_fullres"]
    return configuration["pretraining"]["num_epochs"] * configuration["batch_size"] * 250 / 10_000


def test_passes_are_over_the_training_cases_of_nnunets_folds(tmp_path, monkeypatch):
    unlimited = type("Unlimited", (SmallPlanner,), {"max_epochs": np.inf})
    assert _plan_epochs(tmp_path, monkeypatch, unlimited) == pytest.approx(0.8 * 30, rel=0.01)


def test_passes_are_over_the_training_cases_of_the_split(tmp_path, monkeypatch):
    unlimited = type("Unlimited", (SmallPlanner,), {"max_epochs": np.inf})
    _planner(tmp_path, monkeypatch)
    split = {"train": [f"c{case:03d}" for case in range(6)], "val": ["c006"]}
    (tmp_path / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps([split]))
    assert _plan_epochs(tmp_path, monkeypatch, unlimited) == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"val": []}]', "[3]"])
def test_a_file_that_holds_no_splits_is_named(tmp_path, monkeypatch, content):
    planner = _planner(tmp_path, monkeypatch)
    file = tmp_path / "preprocessed" / DATASET / "splits_final.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file}.* (valid JSON|holds no fold|JSON list|the lists train and val)"):
        planner.plan_experiment()


def test_a_batch_covers_at_most_5_percent_of_the_dataset(tmp_path, monkeypatch):
    fixed_crop = type("Fixed", (SmallPlanner,), {"crop_size": (96, 96, 96)})
    planner = _planner(tmp_path, monkeypatch, (96, 96, 96), (1, 1, 1), planner_class=fixed_crop, num_cases=100)
    assert planner.plan_experiment()["configurations"]["3d_fullres"]["batch_size"] == 5


RAW = {  # what the datasets look like: shape, spacing in mm (z, y, x), channel
    "Synapse": ((148, 512, 512), (3.0, 0.76, 0.76), "CT"),
    "BTCV": ((148, 512, 512), (3.0, 0.76, 0.76), "CT"),
    "ACDC": ((9, 256, 216), (10.0, 1.56, 1.56), "MRI"),
    "Spleen": ((90, 512, 512), (5.0, 0.79, 0.79), "CT"),
    "Lung": ((252, 512, 512), (1.24, 0.79, 0.79), "CT"),
}
NUM_LABELS = {"Synapse": 8, "BTCV": 13, "ACDC": 3, "Spleen": 1, "Lung": 1}


def _paper_plans(tmp_path, monkeypatch, name, num_cases=30):
    shape, spacing, channel = RAW[name]
    planner_class = find_planner(f"TopoMAEPlanner{name}")
    return _planner(
        tmp_path,
        monkeypatch,
        shape,
        spacing,
        (channel,),
        planner_class=planner_class,
        num_labels=NUM_LABELS[name],
        num_cases=num_cases,
    ).plan_experiment()


@pytest.mark.parametrize(
    ("name", "spacing", "hu", "crop", "cases", "training_cases", "passes"),
    [  # Gu et al., section III; axes (z, y, x)
        ("Synapse", [2.0, 1.5, 1.5], (-175, 250), [96, 96, 96], 30, 18, (10_000, 5_000)),
        ("BTCV", [2.0, 1.5, 1.5], (-175, 250), [96, 96, 96], 30, 24, (10_000, 5_000)),  # no split given: 80 %
        ("ACDC", [6.35, 1.52, 1.52], None, [16, 160, 160], 100, 70, (2_000, 1_000)),
        ("Spleen", [2.0, 1.5, 1.5], (-57, 164), [96, 96, 96], 41, 33, (10_000, 5_000)),
        ("Lung", [1.0, 1.0, 1.0], (-1000, 3071), [32, 192, 192], 64, 51, (10_000, 5_000)),
    ],
)
def test_the_papers_set_ups(tmp_path, monkeypatch, name, spacing, hu, crop, cases, training_cases, passes):
    plans = _paper_plans(tmp_path, monkeypatch, name, cases)
    assert plans["plans_name"] == f"nnUNetTopoMAE{name}Plans"
    assert list(plans["configurations"]) == ["3d_fullres"]
    plan = plans["configurations"]["3d_fullres"]
    TopoMAEPretrainer.check_plans(plans, "3d_fullres")
    assert plan["spacing"] == spacing
    assert plan["patch_size"] == crop
    if hu is None:
        assert plan["normalization_schemes"] == ["RescaleTo01Normalization"]
    else:
        assert plan["normalization_schemes"] == ["CTNormalization"]
        properties = plans["foreground_intensity_properties_per_channel"]["0"]
        assert (properties["percentile_00_5"], properties["percentile_99_5"]) == hu
        assert (properties["mean"], properties["std"]) == (hu[0], hu[1] - hu[0])
    bytes_of_a_crop = 1100 * np.prod(crop)
    assert plan["batch_size"] == (32 - 1.5) * GIB // bytes_of_a_crop  # the largest; 5 % of the dataset are fewer
    for stage, times in zip(("pretraining", "finetuning"), passes, strict=True):
        schedule = plan[stage]
        assert schedule["num_epochs"] == round(times * training_cases / plan["batch_size"] / 250)
        assert schedule["warmup_epochs"] == pytest.approx(0.01 * schedule["num_epochs"], abs=0.05)
        assert schedule["weight_decay"] == 0.005
    pretraining = plan["pretraining"]
    assert pretraining["topology"] == {"enabled": True, "weight": 1, "grid": None, "tolerance": 0}
    assert (pretraining["lambda1"], pretraining["lambda2"], pretraining["lambda3"]) == (0.5, 0.1, 0.1)
    assert (pretraining["base_lr"], plan["finetuning"]["base_lr"]) == (6.4e-3, 1e-1)
    assert pretraining["mask_ratio"] == 0.5
    assert pretraining["dropout"] is None  # the published network's
    arguments = plan["architecture"]["arch_kwargs"]
    assert arguments["fusion_gain"] == 1
    assert not arguments["vit"]["local_start"]


@pytest.mark.parametrize(
    ("name", "strides", "attention_dropout", "millions"),
    [  # UNETR++ alone; ACDC and lung: published to the parameter
        ("Synapse", [[1, 1, 1], [4, 4, 4], *[[2, 2, 2]] * 3], 0.15, 29.867),
        ("ACDC", [[1, 1, 1], [1, 4, 4], *[[2, 2, 2]] * 3], 0.1, 66.796404),
        ("Lung", [[1, 1, 1], [1, 4, 4], *[[2, 2, 2]] * 3], 0.1, 121.174798),
    ],
)
def test_the_papers_set_ups_have_the_published_networks(
    tmp_path, monkeypatch, name, strides, attention_dropout, millions
):
    arguments = _paper_plans(tmp_path, monkeypatch, name)["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert arguments["strides"] == strides
    classes = 14 if name == "Synapse" else 1 + NUM_LABELS[name]
    with torch.device("meta"):
        network = FusedViTUNETRPP(1, classes, **arguments)
    ours = (network.vit, network.pyramid)
    fused, added = (sum(p.numel() for m in modules for p in m.parameters()) for modules in ([network], ours))
    assert (fused - added) / 1e6 == pytest.approx(millions, abs=5e-4 if name == "Synapse" else 1e-9)
    for part in (network.encoder, network.decoder):
        assert {m.p for m in part.modules() if isinstance(m, torch.nn.Dropout)} == {attention_dropout}


def test_the_memory_target_of_the_papers_set_ups_can_be_changed(tmp_path, monkeypatch):
    batch_sizes = [
        _planner(
            tmp_path, monkeypatch, *RAW["Spleen"][:2], planner_class=find_planner("TopoMAEPlannerSpleen"), **target
        ).plan_experiment()["configurations"]["3d_fullres"]["batch_size"]
        for target in ({"gpu_memory_target_in_gb": 8}, {})
    ]
    assert batch_sizes[0] < batch_sizes[1] / 3


@pytest.mark.parametrize(
    ("name", "channels", "num_labels", "message"),
    [
        ("Synapse", ("CT",), 13, "one CT channel and 9 labels .* but this dataset has CT and 14 labels"),
        ("Spleen", ("MRI",), 1, "one CT channel and 2 labels .* but this dataset has MRI and 2 labels"),
        ("Lung", ("CT", "PET"), 1, "one CT channel and 2 labels .* but this dataset has CT, PET and 2 labels"),
        ("ACDC", ("CT",), 3, "one MRI channel and 4 labels .* but this dataset has CT and 4 labels"),
    ],
)
def test_another_dataset_than_the_papers_is_refused(tmp_path, monkeypatch, name, channels, num_labels, message):
    planner_class = find_planner(f"TopoMAEPlanner{name}")
    with pytest.raises(ValueError, match=f"{DATASET}: TopoMAEPlanner{name} is made for {message}; use TopoMAEPlanner"):
        _planner(tmp_path, monkeypatch, channels=channels, planner_class=planner_class, num_labels=num_labels)


def test_large_images_get_a_low_resolution_and_no_cascade(tmp_path, monkeypatch):
    plans = _planner(tmp_path, monkeypatch, (500, 512, 512), (1.0, 0.8, 0.8)).plan_experiment()
    assert set(plans["configurations"]) == {"3d_fullres", "3d_lowres"}
    low, full = (plans["configurations"][name] for name in ("3d_lowres", "3d_fullres"))
    assert np.prod(low["spacing"]) > np.prod(full["spacing"])
    for name in plans["configurations"]:
        TopoMAEPretrainer.check_plans(plans, name)
    with pytest.raises(ValueError, match='configuration "3d_cascade_fullres": there is no such configuration'):
        TopoMAEPretrainer.check_plans(plans, "3d_cascade_fullres")


@pytest.mark.parametrize(
    ("planner", "name", "pretrainer"),
    [
        ("TopoMAEUNETRPlanner", "nnUNetTopoMAEUNETRPlans", MAEPretrainer),
        ("AliceUNETRPlanner", "nnUNetAliceUNETRPlans", AlicePretrainer),
    ],
)
def test_a_unetr_is_planned_for_mae_and_alice(planner, name, pretrainer, tmp_path, monkeypatch):
    planner_class = find_planner(planner)
    plans = _planner(
        tmp_path, monkeypatch, (20, 320, 320), (6.0, 0.5, 0.5), planner_class=planner_class
    ).plan_experiment()
    assert plans["plans_name"] == name
    pretrainer.check_plans(plans, "3d_fullres")
    configuration = plans["configurations"]["3d_fullres"]
    arguments = configuration["architecture"]["arch_kwargs"]
    assert np.prod(arguments["strides"], axis=0).tolist() == arguments["vit"]["patch_size"]
    assert configuration["pretraining"]["mask_ratio"] == 0.75
    assert "topology" not in configuration["pretraining"]
    finetuning = PretrainedFinetuneTrainer.check_plans(plans, "3d_fullres")["finetuning"]
    assert (finetuning.base_lr, finetuning.weight_decay) == (0.1, 0.005)  # not those for U-Nets


def test_a_fixed_crop_that_does_not_fit_is_said(tmp_path, monkeypatch):
    planner_class = find_planner("TopoMAEPlannerLung")
    planner = _planner(tmp_path, monkeypatch, planner_class=planner_class, gpu_memory_target_in_gb=3)
    with pytest.raises(ValueError, match=r"two crops of \(32, 192, 192\) do not fit into 3 GB"):
        planner.plan_experiment()


def test_2d_dataset_is_refused_and_nothing_written(tmp_path, monkeypatch):
    planner = _planner(tmp_path, monkeypatch, shape=(1, 512, 512))
    with pytest.raises(ValueError, match="is a 2D dataset"):
        planner.plan_experiment()
    assert not (tmp_path / "preprocessed" / DATASET / "nnUNetTopoMAEPlans.json").exists()


def _set(configuration, **changes):
    configuration.update(changes)


@pytest.mark.parametrize(
    ("edit", "configuration", "message"),
    [
        (lambda c: None, "3d_lores", "there is no such configuration; these plans have 3d_fullres"),
        (lambda c: _set(c, patch_size=[96, 96]), "3d_fullres", "this one is 2D; use 3d_fullres"),
        (
            lambda c: _set(c, previous_stage="3d_lowres"),
            "3d_fullres",
            "cascade can be neither pre-trained nor fine-tuned",
        ),
        (lambda c: _set(c["architecture"], network_class_name="a.PlainConvUNet"), "3d_fullres", "a.PlainConvUNet"),
        (lambda c: _set(c, patch_size=[90, 90, 90]), "3d_fullres", "crop_size .* must be equal"),
        (lambda c: _set(c, batch_size=0), "3d_fullres", "batch_size must be a whole number of at least 1, got 0"),
        (lambda c: _set(c["pretraining"], mask_ratio=2), "3d_fullres", "pretraining.mask_ratio in the plans must be"),
        (lambda c: _set(c["finetuning"], lr=1), "3d_fullres", "unknown key finetuning.lr in the plans"),
        (lambda c: _set(c["pretraining"]["topology"], grid=[500, 1, 1]), "3d_fullres", "does not fit a crop"),
        (
            lambda c: _set(c["architecture"]["arch_kwargs"]["vit"], patch_size=[7, 8, 8]),
            "3d_fullres",
            "not divisible by ViT patch",
        ),
    ],
)
def test_plans_that_cannot_work_are_refused(tmp_path, monkeypatch, edit, configuration, message):
    plans = _planner(tmp_path, monkeypatch, (48, 48, 48), (1.0, 1.0, 1.0)).plan_experiment()
    edit(plans["configurations"]["3d_fullres"])
    with pytest.raises(ValueError, match=message) as error:
        TopoMAEPretrainer.check_plans(plans, configuration)
    assert f'plans "nnUNetTopoMAEPlans", configuration "{configuration}"' in str(error.value)
