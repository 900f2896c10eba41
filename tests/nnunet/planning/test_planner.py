import json

import numpy as np
import pytest

from nnunet_topomae.commands.cli import find_planner
from nnunet_topomae.methods.topomae import TopoMAEConfig
from nnunet_topomae.nnunet.planning import planner as planner_module
from nnunet_topomae.nnunet.planning.geometry import choose_patch_size, fit_strides, shrinking_crops
from nnunet_topomae.nnunet.planning.memory import GIB
from nnunet_topomae.nnunet.planning.planner import epochs_for
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner
from nnunet_topomae.trainers.mae_pretrainer import MAEPretrainer
from nnunet_topomae.trainers.topomae_pretrainer import TopoMAEPretrainer

DATASET = "Dataset777_Planned"


@pytest.fixture(autouse=True)
def _quick_traces(monkeypatch):
    """About what a trace gives; tests/nnunet/test_memory.py has real ones."""

    def trace(sizes):
        return 1.5 * GIB + 1100 * sizes.batch_size * np.prod(sizes.crop_size)

    monkeypatch.setattr(planner_module, "trace_pretraining", lambda task_class, sizes: trace(sizes))
    monkeypatch.setattr(planner_module, "trace_finetuning", trace)


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


def _planner(
    tmp_path,
    monkeypatch,
    shape=(96, 128, 128),
    spacing=(1.5, 1.0, 1.0),
    channels=("CT",),
    planner_class=SmallPlanner,
    **kwargs,
):
    """A dataset that has a fingerprint and file names, but no image."""
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    images, labels = raw / DATASET / "imagesTr", raw / DATASET / "labelsTr"
    for folder in (images, labels, preprocessed / DATASET):
        folder.mkdir(parents=True, exist_ok=True)
    for case in range(30):
        for channel in range(len(channels)):
            (images / f"c{case:02d}_{channel:04d}.nii.gz").touch()
        (labels / f"c{case:02d}.nii.gz").touch()
    dataset = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 30,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    (raw / DATASET / "dataset.json").write_text(json.dumps(dataset))
    intensities = {"percentile_00_5": -175.0, "percentile_99_5": 250.0, "mean": 40.0, "std": 70.0}
    fingerprint = {
        "spacings": [list(spacing)] * 30,
        "shapes_after_crop": [list(shape)] * 30,
        "foreground_intensity_properties_per_channel": {str(i): dict(intensities) for i in range(len(channels))},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / DATASET / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    monkeypatch.setenv("nnUNet_raw", str(raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    return planner_class(777, **kwargs)


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


@pytest.mark.parametrize(
    ("name", "shape", "spacing", "channel", "crop", "stem", "planned_spacing", "hu"),
    [
        (
            "Synapse",
            (148, 512, 512),
            (3.0, 0.76, 0.76),
            "CT",
            (64, 128, 128),
            [2, 4, 4],
            (3.0, 0.76, 0.76),
            (-175, 250),
        ),
        ("BTCV", (148, 512, 512), (3.0, 0.76, 0.76), "CT", (96, 96, 96), [4, 4, 4], (2.0, 1.5, 1.5), (-175, 250)),
        ("ACDC", (9, 256, 216), (10.0, 1.56, 1.56), "MRI", (16, 160, 160), [1, 4, 4], (10.0, 1.56, 1.56), None),
        ("Spleen", (90, 512, 512), (5.0, 0.79, 0.79), "CT", (96, 96, 96), [4, 4, 4], (2.0, 1.5, 1.5), (-57, 164)),
        ("Lung", (252, 512, 512), (1.24, 0.79, 0.79), "CT", (32, 192, 192), [4, 4, 4], (1.24, 0.79, 0.79), None),
    ],
)
def test_the_papers_set_ups(tmp_path, monkeypatch, name, shape, spacing, channel, crop, stem, planned_spacing, hu):
    planner_class = find_planner(f"TopoMAEPlanner{name}")
    small = type("Small", (planner_class,), {"vit": SmallPlanner.vit, "features_per_stage": (8, 16, 32, 64)})
    plans = _planner(tmp_path, monkeypatch, shape, spacing, (channel,), small, gpu_memory_target_in_gb=24)
    plans = plans.plan_experiment()
    assert plans["plans_name"] == f"nnUNetTopoMAE{name}Plans"
    plan = plans["configurations"]["3d_fullres"]
    TopoMAEPretrainer.check_plans(plans, "3d_fullres")
    assert plan["patch_size"] == list(crop)
    assert plan["architecture"]["arch_kwargs"]["strides"][1] == stem
    assert list(plan["spacing"]) == list(planned_spacing)
    schedule = plan["pretraining"]
    assert schedule["num_epochs"] == round(10_000 * 30 / plan["batch_size"] / 250)  # no limit
    assert schedule["warmup_epochs"] == pytest.approx(0.01 * schedule["num_epochs"], abs=0.05)
    assert plan["normalization_schemes"] == ["CTNormalization" if channel == "CT" else "RescaleTo01Normalization"]
    assert schedule["dropout"] == 0.1
    assert not plan["architecture"]["arch_kwargs"]["vit"]["local_start"]
    if hu is not None:
        properties = plans["foreground_intensity_properties_per_channel"]["0"]
        assert (properties["percentile_00_5"], properties["percentile_99_5"]) == hu
        assert (properties["mean"], properties["std"]) == (hu[0], hu[1] - hu[0])


def test_large_images_get_a_low_resolution_and_no_cascade(tmp_path, monkeypatch):
    plans = _planner(tmp_path, monkeypatch, (500, 512, 512), (1.0, 0.8, 0.8)).plan_experiment()
    assert set(plans["configurations"]) == {"3d_fullres", "3d_lowres"}
    low, full = (plans["configurations"][name] for name in ("3d_lowres", "3d_fullres"))
    assert np.prod(low["spacing"]) > np.prod(full["spacing"])
    for name in plans["configurations"]:
        TopoMAEPretrainer.check_plans(plans, name)
    with pytest.raises(ValueError, match='configuration "3d_cascade_fullres": there is no such configuration'):
        TopoMAEPretrainer.check_plans(plans, "3d_cascade_fullres")


def test_a_unetr_is_planned_for_mae(tmp_path, monkeypatch):
    planner_class = find_planner("TopoMAEUNETRPlanner")
    plans = _planner(
        tmp_path, monkeypatch, (20, 320, 320), (6.0, 0.5, 0.5), planner_class=planner_class
    ).plan_experiment()
    assert plans["plans_name"] == "nnUNetTopoMAEUNETRPlans"
    MAEPretrainer.check_plans(plans, "3d_fullres")
    configuration = plans["configurations"]["3d_fullres"]
    arguments = configuration["architecture"]["arch_kwargs"]
    assert np.prod(arguments["strides"], axis=0).tolist() == arguments["vit"]["patch_size"]
    assert configuration["pretraining"]["mask_ratio"] == 0.75
    assert "topology" not in configuration["pretraining"]


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
        (lambda c: _set(c, previous_stage="3d_lowres"), "3d_fullres", "second stage of the cascade"),
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
