import json
import shutil

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint

ADAPT = ["-d", "998", "-c", "3d_fullres", "-p"]


def _larger(configuration):
    configuration["patch_size"] = configuration["architecture"]["arch_kwargs"]["crop_size"] = [32, 32, 48]
    configuration["pretraining"]["topology"]["grid"] = None


@pytest.fixture(scope="module")
def larger(workspace, pretrained, tmp_path_factory):
    """Plans of another crop size, and a checkpoint carried to them."""
    plans = workspace.write_plans("Larger", _larger)
    file = tmp_path_factory.mktemp("adapted") / "carried.pth"
    assert cli.main(["adapt", str(workspace.checkpoint("TopoMAEPretrainer")), *ADAPT, plans, "-o", str(file)]) == 0
    return plans, file


def test_fine_tuning_starts_from_a_carried_checkpoint(workspace, larger):
    plans, file = larger
    trainer = workspace.trainer("FusedFinetuneTrainer", plans)
    maybe_load_checkpoint(trainer, False, False, str(file))
    carried = read_checkpoint(file)
    assert carried["init_args"]["plans"]["plans_name"] == plans
    for name in ("vit.norm.weight", "encoder.stages.0.0.attention.project.weight"):
        assert torch.equal(trainer.network.state_dict()[name], carried["network_weights"][name])


def test_pretraining_goes_on_from_a_carried_checkpoint(workspace, larger):
    plans, file = larger
    trainer = workspace.trainer("TopoMAEPretrainer", plans)
    maybe_load_checkpoint(trainer, False, False, str(file))
    weights = read_checkpoint(file)["network_weights"]
    for name in ("vit_decoder.to_voxels.weight", "encoder.stages.0.0.attention.project.weight"):
        assert torch.equal(trainer.task.state_dict()[name], weights[name])


@pytest.mark.parametrize(
    ("of", "drawn", "named"),
    [
        ("Dataset998_Phantom", ["a", "Dataset007_Other/a"], ["Dataset007_Other/a", "a"]),
        ("Dataset007_Other", ["a", "Dataset998_Phantom/b"], ["Dataset007_Other/a", "b"]),
        ("Dataset007_Other", None, None),
    ],
)
def test_a_carried_checkpoint_says_what_was_drawn_from(workspace, pretrained, tmp_path, of, drawn, named):
    checkpoint = _scratch(workspace)
    checkpoint["init_args"]["plans"]["dataset_name"] = of
    del checkpoint["drawn_from"]
    torch.save({**checkpoint, **({"drawn_from": drawn} if drawn else {})}, tmp_path / "in.pth")
    output = tmp_path / "out.pth"
    assert cli.main(["adapt", str(tmp_path / "in.pth"), *ADAPT, "nnUNetTopoMAEPlans", "-o", str(output)]) == 0
    assert read_checkpoint(output).get("drawn_from") == named


def test_the_report_counts_what_was_resized_and_names_what_stays_fresh(workspace, pretrained, tmp_path, capsys):
    def narrower(configuration):
        configuration["architecture"]["arch_kwargs"]["vit"]["width"] = 16

    plans = workspace.write_plans("NarrowerViT", narrower)
    source = str(workspace.checkpoint("TopoMAEPretrainer"))
    assert cli.main(["adapt", source, *ADAPT, plans, "-o", str(tmp_path / "out.pth")]) == 0
    said = capsys.readouterr().out
    assert "loaded       adapted         fresh" in said
    assert "tensors of vit, which cannot be carried over" in said


def _scratch(workspace, **changes):
    """The checkpoint of pre-training with other contents."""
    return {**torch.load(workspace.checkpoint("TopoMAEPretrainer"), weights_only=True), **changes}


def test_a_vit_that_knows_other_positions_is_refused(workspace, pretrained, tmp_path, capsys):
    def as_selfmedmae(configuration):
        configuration["architecture"]["arch_kwargs"]["vit"]["local_start"] = False

    plans = workspace.write_plans("SelfMedMAE", as_selfmedmae)
    source, output = str(workspace.checkpoint("TopoMAEPretrainer")), tmp_path / "out.pth"
    assert cli.main(["adapt", source, *ADAPT, plans, "-o", str(output)]) == 2
    assert "pre-trained with local_start True in arch_kwargs.vit" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("untrained_parameters"), "was not written by a pre-training trainer of this package"),
        (lambda c: c.update(trainer_name="OtherTrainer"), "was written by OtherTrainer, which is none of the trainers"),
        (
            lambda c: c["network_weights"].update({"vit.norm.weight": torch.ones(())}),
            "holds vit.norm.weight (), but the plans in it say (32,)",
        ),
        (lambda c: c["init_args"]["dataset_json"].update(channel_names="CT"), 'has no "channel_names"'),
        (lambda c: c.update(network_weights={}), "has nothing in common with the network of nnUNetTopoMAEPlans"),
        (lambda c: c.pop("network_weights"), 'is no nnU-Net checkpoint: it has no "network_weights"'),
    ],
)
def test_other_checkpoints_are_refused(workspace, pretrained, tmp_path, capsys, edit, message):
    checkpoint = _scratch(workspace)
    edit(checkpoint)
    torch.save(checkpoint, tmp_path / "in.pth")
    arguments = ["adapt", str(tmp_path / "in.pth"), *ADAPT, "nnUNetTopoMAEPlans", "-o", str(tmp_path / "out.pth")]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["in.pth"]


def test_nothing_is_overwritten(workspace, larger, capsys):
    plans, file = larger
    before = file.read_bytes()
    assert cli.main(["adapt", str(workspace.checkpoint("TopoMAEPretrainer")), *ADAPT, plans, "-o", str(file)]) == 2
    assert "exists already; delete it or choose another name" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_several_datasets_are_pretrained_on_together(workspace, other_dataset):
    def both(configuration):
        configuration["pretraining"]["datasets"] = [998, 997]

    plans = workspace.write_plans("Both", both)
    shutil.copy(workspace.preprocessed / f"{plans}.json", other_dataset)
    trainer = workspace.trainer("TopoMAEPretrainer", plans)
    alone = workspace.trainer("TopoMAEPretrainer")
    training, validation = trainer.get_tr_and_val_datasets()
    own, own_validation = (cases.identifiers for cases in alone.get_tr_and_val_datasets())
    others = {case for case in training.identifiers if case.startswith("Dataset997_Other/")}
    assert set(training.identifiers) == {*own, *others}
    assert len(others) == 5
    assert sorted(validation.identifiers) == sorted(own_validation)
    trainer.num_epochs = 1
    trainer.run_training()
    drawn = {trainer.stream(training, 0, mirror=True)[i]["case"] for i in range(60)}
    assert drawn == set(training.identifiers)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c.update(spacing=[3, 1, 1]),
            r"Dataset997_Other was not preprocessed like Dataset998_Phantom: spacing",
        ),
        (
            lambda c: c.update(data_identifier="none"),
            "Dataset997_Other, which pretraining.datasets names, has no prepro",
        ),
        (None, r"Dataset997_Other/Foreign.json does not exist; plan the dataset"),
    ],
)
def test_another_dataset_that_does_not_fit_is_named(workspace, other_dataset, edit, message):
    plans = workspace.write_plans("Foreign", lambda c: c["pretraining"].update(datasets=[997]))
    file = other_dataset / f"{plans}.json"
    file.unlink(missing_ok=True)
    if edit is not None:
        content = json.loads((workspace.preprocessed / file.name).read_text())
        edit(content["configurations"]["3d_fullres"])
        file.write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        workspace.trainer("TopoMAEPretrainer", plans).on_train_start()


def test_another_dataset_that_there_is_not_is_named(workspace):
    plans = workspace.write_plans("Foreign", lambda c: c["pretraining"].update(datasets=[555]))
    with pytest.raises(FileNotFoundError, match="there is no dataset 555: neither"):
        workspace.trainer("TopoMAEPretrainer", plans).on_train_start()
