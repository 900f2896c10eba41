"""Files from elsewhere: described, exported and read back, never run."""

import json
import pickle
import zipfile

import torch

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint
from nnunet_topomae.nnunet.weights.exporting import hashed, read_export
from workspace import refused


class _Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_checkpoint_is_described(workspace, pretrained, capsys):
    file = workspace.checkpoint("TopoMAEPretrainer")
    assert cli.main(["inspect", str(file)]) == 0
    said = capsys.readouterr().out
    split = json.loads((workspace.preprocessed / "splits_final.json").read_text())[0]
    assert "trainer: TopoMAEPretrainer\n" in said
    assert "epochs: 3\n" in said
    assert "plans: nnUNetTopoMAEPlans\n" in said
    assert "nnU-Net's own loaders may open it: yes" in said
    for case in split["train"]:
        assert case not in said
        assert hashed(case) in said


def test_what_is_neither_weights_nor_plans_is_refused(tmp_path, capsys):
    (tmp_path / "dataset.json").write_text('{"labels": {}}')
    assert refused(["inspect", tmp_path], capsys) == (
        f"Error: {tmp_path} is a folder that nnUNetv2_topomae export did not write; name a file in it\n"
    )
    assert refused(["inspect", tmp_path / "dataset.json"], capsys) == (
        f'Error: {tmp_path / "dataset.json"} is no plans file: it has no "plans_name"\n'
    )


def test_a_file_with_code_is_refused_by_one_sentence(tmp_path, capsys):
    torch.save({"network_weights": {}, "x": _Code()}, tmp_path / "code.pth")
    said = refused(["inspect", tmp_path / "code.pth"], capsys)
    assert "not loaded because it could execute code" in said
    assert len(said.splitlines()) == 1


def test_a_zip_is_looked_into(workspace, pretrained, tmp_path, capsys):
    file = tmp_path / "model.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(workspace.checkpoint("TopoMAEPretrainer"), "Dataset998_Phantom/fold_0/checkpoint_final.pth")
        archive.writestr("../outside.txt", "x")
    assert cli.main(["inspect", str(file)]) == 0
    said = capsys.readouterr().out
    assert "members that would leave their folder: ../outside.txt" in said
    assert "checkpoint_final.pth: holds tensors and plain types only" in said
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("fold_1/checkpoint_final.pth", pickle.dumps(_Code(), protocol=2))
    assert f"{file}: fold_1/checkpoint_final.pth is no checkpoint, or holds more than tensors" in refused(
        ["inspect", file], capsys
    )


def test_exported_weights_are_adapted_as_their_checkpoint_is(workspace, pretrained, tmp_path, capsys):
    file, folder = workspace.checkpoint("TopoMAEPretrainer"), tmp_path / "exported"
    assert cli.main(["export", str(file), "-o", str(folder)]) == 0
    assert {each.name for each in folder.iterdir()} == {"weights.safetensors", "card.json", "README.md"}
    assert "phantom_00" not in (folder / "card.json").read_text()
    weights = read_checkpoint(file)["network_weights"]
    exported = read_export(folder)["network_weights"]
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in weights)
    for source in (file, folder):
        output = tmp_path / f"{source.name}.pth"
        assert cli.main(["adapt", str(source), "-d", "998", "-o", str(output)]) == 0
    adapted = [read_checkpoint(each)["network_weights"] for each in tmp_path.glob("*.pth")]
    assert len(adapted) == 2
    loaded = [name for name in adapted[0] if name.startswith("vit.")]
    assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in loaded)
    assert cli.main(["inspect", str(folder)]) == 0
    assert "is not empty" in refused(["export", file, "-o", folder], capsys)
