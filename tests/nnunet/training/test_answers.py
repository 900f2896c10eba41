"""What ``nnUNetv2_train -tr OURS`` says of input that a user can mend: one sentence and the exit status 2."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.run import run_training

from nnunet_topomae import trainers
from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.training import command
from workspace import ANYTHING, DATASET, PLANS, refused, says

STAGES = ["TopoMAEPretrainer", "FusedFinetuneTrainer"]


def _answer(monkeypatch, capsys, trainer, plans=PLANS, fold="0", **options) -> str:
    """What a training that fails prints, other than the log."""
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", DATASET, "3d_fullres", fold, "-p", plans, "-tr", trainer])
    arguments = (DATASET, "3d_fullres", fold, trainer, plans)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which one it is does not matter
        run_training.run_training(*arguments, device=torch.device("cpu"), **options)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(raised.type, raised.value, raised.tb)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert "Traceback" not in said
    return said.removeprefix("Error: ").partition("\nThe traceback is in ")[0].removesuffix("\n")


WHERE = 'plans "Poor", configuration "3d_fullres": '
EDITS = {
    "no architecture": (
        lambda c: c.pop("architecture"),
        'there is no "architecture"; these plans are of an old nnU-Net, so plan the dataset again',
    ),
    "spacing in quotes": (
        lambda c: c.update(spacing=["1", "1", "1"]),
        "spacing must be a list of three numbers above 0, in mm, got ['1', '1', '1']",
    ),
    "features in quotes": (
        lambda c: c["architecture"]["arch_kwargs"].update(features_per_stage=["8", "8", "16", "16"]),
        f"architecture nnunet_topomae.networks.fused.FusedViTUNETRPP: {ANYTHING}",
    ),
    "of another method": (
        lambda c: c["pretraining"].update(sparse=True),
        f"unknown key pretraining.sparse in the plans; {ANYTHING}; if the plans were written for another method (by "
        f"TopoMAEPlanner), use the trainer of that method or take its keys out of a copy of the plans",
    ),
}


@pytest.mark.parametrize(("edit", "sentence"), EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("trainer", STAGES)
def test_plans(workspace, monkeypatch, capsys, trainer, edit, sentence):
    if trainer == "FusedFinetuneTrainer" and "pretraining" in sentence:
        pytest.skip("fine-tuning does not read the block")
    said = _answer(monkeypatch, capsys, trainer, workspace.write_plans("Poor", edit))
    assert says(said, WHERE + sentence), said


@pytest.mark.parametrize("trainer", STAGES)
def test_plans_that_are_not_there_or_cut_off(workspace, monkeypatch, capsys, trainer):
    file = workspace.preprocessed / "Pooor.json"
    said = _answer(monkeypatch, capsys, trainer, "Pooor")
    assert said.startswith(f"{file} does not exist; -p takes ")
    assert PLANS in said
    whole = (workspace.preprocessed / f"{PLANS}.json").read_text()
    for content in (whole[:99].encode(), whole.encode("utf-16")):
        file.write_bytes(content)
        try:
            said = _answer(monkeypatch, capsys, trainer, "Pooor")
        finally:
            file.unlink()
        assert says(said, f"{file} is no valid JSON: {ANYTHING}"), said


@pytest.mark.parametrize("trainer", STAGES)
def test_a_copy_of_plans_that_was_not_renamed(workspace, monkeypatch, capsys, trainer):
    content = workspace.plans()
    content["configurations"]["3d_fullres"]["batch_size"] = 1
    (workspace.preprocessed / "Copied.json").write_text(json.dumps(content))
    assert _answer(monkeypatch, capsys, trainer, "Copied") == (
        f'these plans say "plans_name": "{PLANS}", but {workspace.preprocessed / PLANS}.json holds other plans, whose '
        f"results they would overwrite; if they are a copy, set plans_name in it to the name of its file"
    )


@pytest.mark.parametrize("trainer", STAGES)
def test_results_that_have_no_folder(workspace, monkeypatch, capsys, trainer):
    monkeypatch.delenv("nnUNet_results")
    assert _answer(monkeypatch, capsys, trainer) == (
        "nnUNet_results is not set; export it as the folder that results are written to"
    )


SPLITS = {
    "without val": ([{"train": ["a"]}], "must be an object with the lists train and val"),
    "empty val": ([{"train": ["phantom_000"], "val": []}], "fold 0 has 1 cases to train and 0 to validate on"),
    "case that is not there": (
        [{"train": ["phantom_000"], "val": ["phantom_099"]}],
        "phantom_099 is in {folder}/splits_final.json, but not in {folder}/",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("trainer", STAGES)
def test_splits(workspace, no_split, pretrained, monkeypatch, capsys, trainer, content, sentence):
    no_split.write_text(json.dumps(content))
    assert sentence.format(folder=workspace.preprocessed) in _answer(monkeypatch, capsys, trainer)


@pytest.mark.parametrize("trainer", STAGES)
@pytest.mark.parametrize("first_start", [{}, {"continue_training": True}], ids=["plain", "with --c"])
def test_a_dataset_that_is_preprocessed_by_half(workspace, monkeypatch, capsys, trainer, first_start):
    folder = workspace.preprocessed / workspace.plans()["configurations"]["3d_fullres"]["data_identifier"]
    name = workspace.write_plans("By Half")
    files = {file: file.read_bytes() for file in folder.glob("phantom_00[34]*")}
    try:
        for file in files:
            file.unlink()
        said = _answer(monkeypatch, capsys, trainer, name, **first_start)
    finally:
        for file, content in files.items():
            file.write_bytes(content)
    assert said.startswith(
        f"{folder} holds 3 preprocessed cases, but the dataset has 5; preprocess it with nnUNetv2_preprocess "
        f"-d {DATASET} -plans_name 'By Half' -c 3d_fullres"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"numTraining": "5"}, 'says "numTraining": "5", which is no whole number'),
        ({"labels": None}, '"labels" must be an object'),
    ],
)
@pytest.mark.parametrize("trainer", STAGES)
def test_a_description_that_makes_no_sense(workspace, monkeypatch, capsys, trainer, change, sentence):
    file = workspace.preprocessed / "dataset.json"
    content = file.read_text()
    file.write_text(json.dumps({**json.loads(content), **change}))
    try:
        said = _answer(monkeypatch, capsys, trainer)
    finally:
        file.write_text(content)
    assert said.startswith(str(file))
    assert sentence in said


def test_fine_tuning_without_pre_training(workspace, monkeypatch, capsys):
    said = _answer(monkeypatch, capsys, "FusedFinetuneTrainer", workspace.write_plans("No Pretraining"))
    assert f"nnUNetv2_train {DATASET} 3d_fullres 0 -p 'No Pretraining' -tr " in said


def _mistake_of_type():
    raise TypeError("a mistake")


def _mistake_of_shape():
    torch.ones(2, 3) @ torch.ones(2, 3)


def _bare_assertion():
    raise AssertionError


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (_mistake_of_type, "TypeError: a mistake"),
        (_mistake_of_shape, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (_bare_assertion, "AssertionError"),
    ],
)
def test_a_mistake_in_code_is_shown_as_ever(workspace, monkeypatch, capsys, mistake, text):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-tr", "TopoMAEPretrainer"])
    monkeypatch.setitem(mistake.__globals__, "__name__", "nnunet_topomae.somewhere")
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which one it is does not matter
        mistake()
    sys.excepthook(raised.type, raised.value, raised.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert text in said


def _says_so():
    raise RuntimeError("that folder is a file")


def _no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")


@pytest.mark.parametrize(
    ("failure", "module", "sentence"),
    [
        (_says_so, "nnunetv2.somewhere", "that folder is a file"),
        (
            _no_memory,
            "torch.somewhere",
            "the GPU has too little memory: set a smaller batch_size or patch_size in a copy of the plans, or plan "
            "again with -gpu_memory_target and the GB that it has (CUDA out of memory. Tried to allocate 2.00 GiB)",
        ),
    ],
)
def test_an_error_that_is_meant_for_the_user_says_where_its_traceback_is(
    monkeypatch, capsys, tmp_path, failure, module, sentence
):
    log = tmp_path / "training_log.txt"
    trainer = SimpleNamespace(log_file=str(log))
    monkeypatch.setattr(command, "_trainers", [trainer])
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-tr", "TopoMAEPretrainer"])
    monkeypatch.setitem(failure.__globals__, "__name__", module)
    with pytest.raises(RuntimeError) as raised:
        failure()
    with pytest.raises(SystemExit):
        sys.excepthook(raised.type, raised.value, raised.tb)
    assert capsys.readouterr().err == f"Error: {sentence}\nThe traceback is in {log}\n"
    assert f"in {failure.__name__}" in log.read_text()


def test_other_trainers_fail_as_ever(workspace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-tr", "nnUNetTrainer"])
    error = ValueError("wrong")
    sys.excepthook(ValueError, error, None)
    assert "ValueError: wrong" in capsys.readouterr().err


def test_predicting_with_a_pre_training(workspace, pretrained):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    folder = workspace.checkpoint("TopoMAEPretrainer").parents[1]
    with pytest.raises(ValueError, match="are of a pre-training, which cannot segment: fine-tune first, and predict"):
        predictor.initialize_from_trained_model_folder(str(folder), (0,))


@pytest.mark.parametrize("name", ["os; import x", "../evil", "nnUNetTrainer", "Pretrainer", 3, None])
def test_adapt_of_a_file_that_names_another_trainer(workspace, pretrained, tmp_path, capsys, name):
    file = tmp_path / "in.pth"
    content = torch.load(workspace.checkpoint("TopoMAEPretrainer"), weights_only=True)
    torch.save({**content, "trainer_name": name}, file)
    said = refused(["adapt", file, "-d", "998", "-o", tmp_path / "out.pth"], capsys)
    assert said.startswith(f"Error: {file} ")
    assert "trainer" in said
    assert said.count("\n") == 1


def test_a_trainer_folder_that_is_the_checkout_runs_no_setup(monkeypatch, tmp_path):
    setup = Path(__file__).parents[3] / "setup.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "setup_of_checkout.py").write_text(setup.read_text())
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train"])
    __import__("setup_of_checkout")  # would end the process: no command given to setup()


def test_the_folder_of_trainers_is_printed(capsys):
    assert cli.main(["trainers"]) == 0
    assert capsys.readouterr().out.strip() == str(trainers.FOLDER)
