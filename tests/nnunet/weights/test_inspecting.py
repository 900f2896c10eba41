"""Files from elsewhere: described, exported and read back, never run."""

import json
import os
import pickle
import signal
import sys
import zipfile

import pytest
import torch

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.weights import exporting
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"drawn_from": ["b", "a"]}, f"2 cases: {hashed('b')}, {hashed('a')}"),
        ({"finetuned_by": "FusedFinetuneTrainer"}, "unknown"),
    ],
)
@pytest.mark.parametrize("exported", [False, True])
def test_the_cases_that_weights_were_trained_on_are_counted(tmp_path, capsys, exported, content, said):
    file = tmp_path / "in.pth"
    torch.save({"network_weights": {"a": torch.ones(1)}, **content}, file)
    if exported:
        file = exporting.export(file, tmp_path / "out")
    assert cli.main(["inspect", str(file)]) == 0
    assert f"trained on: {said}\n" in capsys.readouterr().out


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


def _symbolic_link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16
    return member


@pytest.mark.parametrize(
    ("member", "leaves"),
    [
        ("/etc/x", True),
        ("C:\\x", True),
        ("a\\..\\..\\x", True),
        (_symbolic_link("x"), True),
        ("fold_0/a..b.txt", False),
    ],
)
def test_members_of_a_zip_that_would_leave_their_folder(tmp_path, capsys, member, leaves):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr(member, "/etc/passwd")
    assert cli.main(["inspect", str(tmp_path / "model.zip")]) == 0
    assert ("members that would leave their folder: none" not in capsys.readouterr().out) == leaves


def test_a_damaged_member_of_a_zip_is_named(tmp_path, capsys):
    file = tmp_path / "model.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("plans.json", '{"plans_name": "a"}')
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"'))
    assert refused(["inspect", file], capsys).startswith(f"Error: {file}: plans.json cannot be read: ")


def test_a_member_that_would_fill_the_memory_is_not_unpacked(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fold_0/checkpoint_final.pth", bytes(1_000_000))
    said = refused(["inspect", tmp_path / "model.zip"], capsys)
    assert "fold_0/checkpoint_final.pth would grow from " in said


def test_text_from_a_file_cannot_pass_for_a_line_of_ours(tmp_path, capsys):
    (tmp_path / "plans.json").write_text(json.dumps({"plans_name": "a\nnnU-Net may open it: yes\x1b[2J"}))
    assert cli.main(["inspect", str(tmp_path / "plans.json")]) == 0
    assert r"plans: a\nnnU-Net may open it: yes\x1b[2J" in capsys.readouterr().out.splitlines()


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "pipe.pth does not exist" in refused(["inspect", tmp_path / "pipe.pth"], capsys)


def _disk_full(*_):
    raise OSError("disk full")


def _ended(*_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("fault", "status"), [(_disk_full, 2), (_ended, 143)])
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, fault, status):
    torch.save({"network_weights": {"a": torch.ones(1)}}, tmp_path / "in.pth")
    monkeypatch.setattr(exporting, "write_json", fault)
    with pytest.raises(SystemExit) as ended:
        sys.exit(cli.main(["export", str(tmp_path / "in.pth"), "-o", str(tmp_path / "out")]))
    assert ended.value.code == status
    assert [file.name for file in tmp_path.iterdir()] == ["in.pth"]


def test_cases_that_dataset_json_names_are_not_exported(tmp_path):
    known = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": [1, 2]},
        "regions_class_order": [1],
        "numTraining": 1,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    private = {
        "dataset": {"smith": {"images": ["/ward/smith_0000.nii.gz"], "label": "/ward/smith.nii.gz"}},
        "description": "of Smith and others",
        "training": [{"image": "./imagesTr/smith.nii.gz"}],
    }
    checkpoint = {
        "network_weights": {"a": torch.ones(1)},
        "drawn_from": ["smith"],
        "init_args": {"configuration": "3d_fullres", "fold": 0, "dataset_json": {**known, **private}},
    }
    torch.save(checkpoint, tmp_path / "in.pth")
    exporting.export(tmp_path / "in.pth", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert b"smith" not in file.read_bytes().lower()
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["init_args"] == {"configuration": "3d_fullres", "fold": 0, "dataset_json": known}


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
    capsys.readouterr()
    adapted_files = [tmp_path / f"{source.name}.pth" for source in (file, folder)]
    for described, said in zip((folder, *adapted_files), ("4 cases: ", "4 cases: ", "unknown\n"), strict=True):
        assert cli.main(["inspect", str(described)]) == 0
        assert f"trained on: {said}" in capsys.readouterr().out
    assert "is not empty" in refused(["export", file, "-o", folder], capsys)
