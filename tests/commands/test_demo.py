"""The demo with commands that are only noted; tests/end_to_end runs them."""

import json
import sys

import pytest

from nnunet_topomae.commands import demo
from nnunet_topomae.commands.demo import Demo

DICE = {"nnUNetTopoMAEPlans": 0.75, "nnUNetTopoMAEPlansScratch": 0.5}


@pytest.fixture
def commands(monkeypatch):
    """What the demo would run; files that it reads afterwards are written."""
    noted = []

    def execute(self, command, *arguments):
        words = [command, *map(str, arguments)]
        noted.append(words)
        if "plan_and_preprocess" in words:
            configuration = {"architecture": {"arch_kwargs": {"depths": [3]}}, "pretraining": {}, "finetuning": {}}
            folder = self.preprocessed / "Dataset999_TopoMAEPhantom"
            folder.mkdir()
            plans = {"plans_name": "nnUNetTopoMAEPlans", "configurations": {"3d_fullres": configuration}}
            (folder / "nnUNetTopoMAEPlans.json").write_text(json.dumps(plans))
        if command == "nnUNetv2_evaluate_simple":
            predictions = self.folder / "predictions" / words[2].rsplit("/", 1)[-1]
            predictions.mkdir(parents=True)
            mean = {str(label): {"Dice": DICE[predictions.name] + label / 100} for label in range(1, 5)}
            (predictions / "summary.json").write_text(json.dumps({"mean": mean}))

    monkeypatch.setattr(Demo, "execute", execute)
    return noted


def test_steps_are_those_of_the_readme_and_both_columns_are_printed(tmp_path, commands, capsys):
    demo.run(tmp_path / "demo")
    trained = [words[words.index("-p") + 1 : words.index("-tr") + 2] for words in commands if "-tr" in words]
    assert [words[0] for words in commands] == [
        "nnUNetv2_topomae", "nnUNetv2_train", "nnUNetv2_train", "nnUNetv2_train",
        "nnUNetv2_predict", "nnUNetv2_evaluate_simple", "nnUNetv2_predict", "nnUNetv2_evaluate_simple",
    ]  # fmt: skip
    assert trained == [
        ["nnUNetTopoMAEPlans", "-tr", "TopoMAEPretrainer"],
        ["nnUNetTopoMAEPlans", "-tr", "FusedFinetuneTrainer"],
        ["nnUNetTopoMAEPlansScratch", "-tr", "FusedFinetuneTrainer"],
        ["nnUNetTopoMAEPlans", "-tr", "FusedFinetuneTrainer"],
        ["nnUNetTopoMAEPlansScratch", "-tr", "FusedFinetuneTrainer"],
    ]
    said = capsys.readouterr().out
    assert "  solid_organ              0.760         0.510" in said
    assert "  tree                     0.790         0.540" in said
    fold = "nnUNet_results/Dataset999_TopoMAEPhantom/TopoMAEPretrainer__nnUNetTopoMAEPlans__3d_fullres/fold_0"
    assert str(tmp_path / "demo" / fold / "validation" / "reconstructions.png") in said
    raw = tmp_path / "demo" / "nnUNet_raw" / "Dataset999_TopoMAEPhantom"
    assert (len(list((raw / "imagesTr").iterdir())), len(list((raw / "imagesTs").iterdir()))) == (10, 3)


def test_both_plans_differ_in_starting_from_scratch_only(tmp_path, commands):
    demo.run(tmp_path)
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset999_TopoMAEPhantom"
    own, scratch = (json.loads((folder / f"{name}.json").read_text()) for name in DICE)
    configuration = own["configurations"]["3d_fullres"]
    arguments = configuration["architecture"]["arch_kwargs"]
    assert configuration["patch_size"] == arguments["crop_size"] == [32, 32, 32]
    assert arguments["depths"] == [3]  # what the planner has planned stays
    assert configuration["pretraining"]["topology"] == {"grid": [16, 16, 16]}
    configuration["finetuning"]["from_scratch"] = True
    assert scratch == {**own, "plans_name": "nnUNetTopoMAEPlansScratch"}


def test_a_command_that_fails_is_named_with_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "executable", lambda command: sys.executable)
    failing = "print('\\n'.join(f'line {n}' for n in range(50))); raise SystemExit(3)"
    with pytest.raises(RuntimeError) as failed:
        Demo(tmp_path).execute("nnUNetv2_train", "-c", failing)
    tail = "\n".join(f"line {n}" for n in range(30, 50))
    assert str(failed.value) == f"nnUNetv2_train failed with exit status 3; its output ends:\n{tail}"
    assert (tmp_path / "logs" / "00_nnUNetv2_train.log").read_text().startswith("line 0\n")


def test_a_demo_that_is_not_kept_leaves_nothing(tmp_path, commands, monkeypatch, capsys):
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    demo.run(None)
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "Use --keep FOLDER" in said
    assert ".png" not in said
    monkeypatch.setattr(Demo, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.run(None)
    assert not list(tmp_path.iterdir())
