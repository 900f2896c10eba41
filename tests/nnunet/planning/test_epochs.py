import json
import shutil

import pytest

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from workspace import PLANS

LIST = ["add_unlabelled", "-d", "998", "-c", "3d_fullres", "--list"]


@pytest.fixture
def two_unlabelled(workspace):
    """Two images without labels, copies of a labelled case."""
    dataset = PlannedDataset.of(998, PLANS)
    folder = dataset.unlabelled_folder("3d_fullres")
    folder.mkdir()
    for name in ("extra_0", "extra_1"):
        for file in dataset.labelled_folder("3d_fullres").glob("phantom_000*"):
            shutil.copy(file, folder / file.name.replace("phantom_000", name))
    yield
    shutil.rmtree(folder)


def plans_by(workspace, planner: str, **pretraining) -> str:
    name = workspace.write_plans(f"By{planner}", lambda c: c["pretraining"].update(pretraining))
    plans = {**workspace.plans(name), "experiment_planner_used": planner}
    (workspace.preprocessed / f"{name}.json").write_text(json.dumps(plans))
    return name


def test_epochs_follow_labelled_and_unlabelled_images(workspace, no_split, two_unlabelled, capsys):
    """10,000 draws of each of 6 images (4 of 5, and 2), 2 in a step, 250 in an epoch; the paper has no limit."""
    plans = plans_by(workspace, "TopoMAEPlannerBTCV", num_iterations_per_epoch=250, warmup_epochs=1)
    before = workspace.plans(plans)
    assert cli.main([*LIST, "-p", plans]) == 0
    assert "3d_fullres: 6 images to pre-train on; pretraining.num_epochs is 3, and would be 120 now" in (
        capsys.readouterr().out
    )
    assert workspace.plans(plans) == before

    assert cli.main([*LIST, "-p", plans, "--update_epochs"]) == 0
    assert "pretraining.num_epochs was 3 and is 120 now" in capsys.readouterr().out
    before["configurations"]["3d_fullres"]["pretraining"].update(num_epochs=120, warmup_epochs=1.2)
    assert workspace.plans(plans) == before
    assert workspace.trainer("TopoMAEPretrainer", plans).num_epochs == 120

    assert cli.main([*LIST, "-p", plans]) == 0
    assert "6 images to pre-train on; pretraining.num_epochs stays 120" in capsys.readouterr().out


def test_images_that_a_split_holds_out_do_not_count(workspace, no_split, two_unlabelled, capsys):
    """The 2,000 draws of the set-up for ACDC of the images of 3 cases and 2 added ones."""
    plans = plans_by(workspace, "TopoMAEPlannerACDC", num_iterations_per_epoch=250)
    assert cli.main(["splits", "-d", "998", "--nested", "1", "2", "--val", "1", "--test", "1"]) == 0
    assert cli.main([*LIST, "-p", plans]) == 0
    assert "5 images to pre-train on; pretraining.num_epochs is 3, and would be 20 now" in capsys.readouterr().out


def test_the_default_planner_stops_at_1000(workspace, no_split, capsys):
    plans = plans_by(workspace, "TopoMAEPlanner", num_iterations_per_epoch=20)  # 1250 epochs
    assert cli.main([*LIST, "-p", plans, "--update_epochs"]) == 0
    pretraining = workspace.plans(plans)["configurations"]["3d_fullres"]["pretraining"]
    assert (pretraining["num_epochs"], pretraining["warmup_epochs"]) == (1000, 50)


def test_plans_of_nnunets_planners_get_a_block(workspace, no_split):
    def as_planned(configuration):
        configuration["batch_size"] = 2
        configuration.pop("pretraining", None)  # which other tests give these plans

    plans = workspace.write_plans("UNetEpochs", as_planned, like="nnUNetResEncUNetMPlans")
    assert cli.main([*LIST, "-p", plans, "--update_epochs"]) == 0
    pretraining = workspace.plans(plans)["configurations"]["3d_fullres"]["pretraining"]
    assert pretraining == {"num_epochs": 80, "warmup_epochs": 4.0}  # 10,000 draws of 4 images, 2 x 250 an epoch


def test_a_schedule_that_is_no_number_is_named(workspace, no_split, capsys):
    plans = plans_by(workspace, "TopoMAEPlannerLung", num_epochs="many")
    assert cli.main([*LIST, "-p", plans, "--update_epochs"]) == 2
    assert "pretraining.num_epochs in the plans must be a whole number of at least 1, got 'many'" in (
        capsys.readouterr().err
    )
