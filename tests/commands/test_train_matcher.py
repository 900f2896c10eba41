import pytest

from nnunet_topomae.commands import cli
from tiny import PLANNED_CROP, PLANNED_NETWORK, SCHEDULE
from workspace import refused

LANDMARKS = {"iterations": 3, "batch_size": 1, "spacing": 4.0, "min_similarity": -1.0}
COMMAND = ["train_matcher", "-d", 998, "-device", "cpu", "-f", 1, "-p"]


@pytest.fixture
def plans(workspace):
    def write(name, **settings):
        def edit(configuration):
            configuration["architecture"].update(
                network_class_name="nnunet_topomae.networks.unetr.UNETR",
                arch_kwargs={
                    "crop_size": PLANNED_CROP,
                    "strides": [[1] * 3, *[[2] * 3] * 3],
                    "vit": PLANNED_NETWORK["vit"],
                    "features": 4,
                },
            )
            configuration["pretraining"] = {**SCHEDULE, "head_width": 32, "landmarks": LANDMARKS, **settings}

        return workspace.write_plans(name, edit)

    return write


def test_the_matcher_is_trained_beforehand_and_pretraining_uses_it(workspace, plans, capsys):
    name = plans("TrainMatcher")
    cache = workspace.preprocessed / "nnUNetTopoMAEPlans_3d_fullres_cache"
    before = set(cache.glob("landmarks_*"))  # other tests have trained networks with other settings
    assert cli.main([*map(str, COMMAND), name]) == 0
    said = capsys.readouterr().out
    assert "Training a landmark network on 4 images at 4 mm" in said
    assert "of the matches of the landmark network are accepted" in said
    (folder,) = set(cache.glob("landmarks_*")) - before
    assert len(list((folder / "embeddings").iterdir())) == 5  # the validation case is embedded, but not learned from
    trainer = workspace.trainer("AlicePretrainer", name, fold=1)
    trainer.initialize()
    trainer.prepare()
    said = capsys.readouterr().out
    assert "Training a landmark network" not in said
    assert "Embedding" not in said


def test_another_matcher_needs_no_training(plans, capsys):
    said = refused([*COMMAND, plans("ByPosition", matcher="position")], capsys)
    assert said == (
        "Error: pretraining.matcher in ByPosition is position, which needs no training; set it to embedding\n"
    )
