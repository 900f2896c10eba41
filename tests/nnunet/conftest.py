import json
import os
from pathlib import Path

import pytest

from nnunet_topomae import trainers
from nnunet_topomae.commands import cli
from nnunet_topomae.commands.demo import shrink_configuration
from nnunet_topomae.commands.phantom import write_dataset
from workspace import CROP, DATASET, NETWORK, PLANS, SETTINGS, Workspace

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"  # a user's own trainers


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """One preprocessed dataset for all tests of trainers; the environment points to it while they run."""
    folder = tmp_path_factory.mktemp("nnunet")
    saved = dict(os.environ)
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir()
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ["nnUNet_extTrainer"] = os.pathsep.join((str(trainers.FOLDER), str(EXAMPLES)))
    write_dataset(folder / "raw" / DATASET, num_training=5, num_test=0)
    assert (
        cli.main(["plan_and_preprocess", "-d", "998", "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar"]) == 0
    )
    space = Workspace(folder)
    plans = space.plans()
    shrink_configuration(plans["configurations"]["3d_fullres"], CROP, NETWORK, SETTINGS)
    (space.preprocessed / f"{PLANS}.json").write_text(json.dumps(plans))
    yield space
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def pretrained(workspace):
    """A finished pre-training of fold 0."""
    trainer = workspace.trainer("TopoMAEPretrainer")
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer
