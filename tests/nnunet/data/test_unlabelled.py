import gzip
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_topomae.commands import cli
from nnunet_topomae.commands.phantom import write_dataset
from nnunet_topomae.nnunet.data import unlabelled
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner
from workspace import Workspace, refused

ADD = ["add_unlabelled", "-d", "998", "-c", "3d_fullres", "--no_pbar"]


@pytest.fixture
def in_threads(monkeypatch):
    """Cases are added in threads, as starting a process takes seconds; the first test below starts processes."""
    monkeypatch.setattr(unlabelled, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))


@pytest.fixture
def images(workspace, tmp_path):
    """Three new images and one with the name of a labelled case; what is added is removed afterwards."""
    write_dataset(tmp_path / "source", num_training=3, num_test=0, seed=50)
    folder = tmp_path / "images"
    folder.mkdir()
    for index, file in enumerate(sorted((tmp_path / "source" / "imagesTr").iterdir())):
        shutil.copy(file, folder / f"extra_{index}_0000.nii.gz")
    shutil.copy(file, folder / "phantom_000_0000.nii.gz")
    yield folder
    shutil.rmtree(_folder(workspace), ignore_errors=True)


def _folder(workspace) -> Path:
    return workspace.preprocessed / f"{TopoMAEPlanner.default_plans_name}_3d_fullres_unlabelled"


def _write(file, voxels, zooms=(1.0, 1.0, 1.0)):
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header["pixdim"][1:4] = zooms
    nibabel.save(image, file)


def test_new_images_are_added_and_ill_ones_named(workspace, images, capsys):
    _write(images / "nan_0000.nii.gz", np.full((20, 20, 20), np.nan, np.float32))
    _write(images / "flat_0000.nii.gz", np.ones((20, 20, 20), np.float32), zooms=(0.0, 1.0, 1.0))
    _write(images / "second_0001.nii.gz", np.ones((20, 20, 20), np.float32))
    shutil.copy(images / "extra_0_0000.nii.gz", images / "extra_0_seg_0000.nii.gz")
    _write(images / "blank_0000.nii.gz", np.zeros((20, 20, 20), np.float32))
    _write(images / "scout_0000.nii.gz", np.arange(1, 61, dtype=np.float32).reshape(3, 4, 5))
    whole = gzip.compress(b"no image")
    (images / "cut_0000.nii.gz").write_bytes(whole[:-4])
    assert cli.main([*ADD, "-i", str(images), "-np", "2"]) == 2
    said = capsys.readouterr()
    assert "3d_fullres: 3 cases added, 3 unlabelled cases in all" in said.out
    for message in (
        "8 cases were left out",
        "nan nan_0000.nii.gz holds NaN or inf",
        "flat flat_0000.nii.gz has a spacing of (0.0, 1.0, 1.0) mm",
        "second has channels [1], but the dataset has channels [0]",
        "cut cut_0000.nii.gz cannot be read: ",
        "blank blank_0000.nii.gz: all voxels have the same value",
        "scout has ",
        " voxels at the spacing of the plans, which fills 0.0% of a crop (24 x 32 x 32)",
        "phantom_000 is the name of a labelled case",
        "extra_0_seg has a name that ends in _seg, as the files of labels do",
    ):
        assert message in said.err
    assert "Traceback" not in said.err
    names = sorted(file.name for file in _folder(workspace).iterdir())
    assert names == sorted(f"extra_{i}{end}" for i in range(3) for end in (".b2nd", "_seg.b2nd", ".pkl"))

    written = {file: file.stat().st_mtime_ns for file in _folder(workspace).iterdir()}
    (images / "extra_0_seg_0000.nii.gz").unlink()
    for file in images.glob("[!e]*"):
        file.unlink()
    assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 0
    assert "0 cases added, 3 unlabelled cases in all" in capsys.readouterr().out
    assert written == {file: file.stat().st_mtime_ns for file in _folder(workspace).iterdir()}


def test_a_case_that_is_half_moved_does_not_count(workspace, images, monkeypatch):
    dataset = PlannedDataset.of(998, TopoMAEPlanner.default_plans_name)
    moved = []

    def fail_at_last(self, destination):
        if len(moved) == 2:
            raise OSError("no space left on device")
        moved.append(self.rename(destination))

    monkeypatch.setattr(Path, "replace", fail_at_last)
    image = images / "extra_0_0000.nii.gz"
    problem = unlabelled._add_case(dataset, "3d_fullres", "extra_0", [image])
    assert problem == "cannot be preprocessed: OSError: no space left on device"
    assert dataset.unlabelled_cases("3d_fullres") == []


def test_what_a_killed_process_has_left_is_removed_at_the_next_start(workspace, images, in_threads, monkeypatch):
    (images / "phantom_000_0000.nii.gz").unlink()
    _folder(workspace).mkdir()
    (_folder(workspace) / ".snapshot").mkdir()  # of the disk
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda _: None)
        killed.setattr(Path, "replace", None)
        assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 2
    assert len(list(_folder(workspace).iterdir())) == 1 + 3
    assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 0
    names = {file.name for file in _folder(workspace).iterdir()}
    assert names == {".snapshot", *(f"extra_{i}{end}" for i in range(3) for end in (".b2nd", "_seg.b2nd", ".pkl"))}


def test_what_another_process_is_adding_stays(workspace, images, in_threads, capsys):
    (images / "phantom_000_0000.nii.gz").unlink()
    file = _folder(workspace).with_name(f".{_folder(workspace).name}.lock")
    code = (
        f"import fcntl, sys\nstream = open({str(file)!r}, 'a')\nfcntl.lockf(stream, fcntl.LOCK_EX)\n"
        f"print('another', file=stream, end='', flush=True)\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    file.write_text("")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        said = refused([*ADD, "-i", images, "-np", "1"], capsys)
        other.kill()
    assert said == f"Error: {file.parent} is in use by another; wait for it, or end it\n"
    assert not _folder(workspace).exists()
    assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 0


def test_pretraining_draws_from_both_and_fine_tuning_from_labelled_cases_alone(workspace, images, in_threads):
    (images / "phantom_000_0000.nii.gz").unlink()
    before = workspace.trainer("TopoMAEPretrainer").get_tr_and_val_datasets()
    assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 0
    trainer = workspace.trainer("TopoMAEPretrainer")
    trainer.on_train_start()
    training, validation = trainer.get_tr_and_val_datasets()
    assert set(training.identifiers) == {*before[0].identifiers, "extra_0", "extra_1", "extra_2"}
    assert validation.identifiers == before[1].identifiers
    assert (
        "Crops are drawn from 4 labelled and 3 unlabelled cases; validation on 1. In 3 epochs each image is drawn "
        "about 1.7 times"  # 3 epochs of 2 steps of 2 crops, over 7 images
    ) in Path(trainer.log_file).read_text()
    drawn = {trainer.stream(training, 0, mirror=True)[i]["case"] for i in range(60)}
    assert drawn == set(training.identifiers)
    finetuner = workspace.trainer("FusedFinetuneTrainer")
    assert not any("extra" in case for part in finetuner.get_tr_and_val_datasets() for case in part.identifiers)


def test_cases_are_preprocessed_as_nnunet_does(workspace, images, in_threads):
    labelled = workspace.trainer("TopoMAEPretrainer").get_tr_and_val_datasets()[0]
    raw = workspace.folder / "raw" / "Dataset998_Phantom" / "imagesTr"
    case = labelled.identifiers[0]
    shutil.copy(raw / f"{case}_0000.nii.gz", images / "copy_0000.nii.gz")
    (images / "phantom_000_0000.nii.gz").unlink()
    assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 0
    training, _ = workspace.trainer("TopoMAEPretrainer").get_tr_and_val_datasets()
    np.testing.assert_array_equal(training.load_case("copy")[0][:], labelled.load_case(case)[0][:])


def test_list_and_remove(workspace, images, in_threads, no_split, capsys):
    (images / "phantom_000_0000.nii.gz").unlink()
    cli.main([*ADD, "-i", str(images), "-np", "1"])
    assert cli.main([*ADD, "--remove", "extra_1"]) == 0
    capsys.readouterr()
    assert cli.main([*ADD, "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"3d_fullres: 2 unlabelled cases in {_folder(workspace)}",
        "    extra_0",
        "    extra_2",
        "3d_fullres: 6 images to pre-train on; pretraining.num_epochs is 3, and would be 1000 now (--update_epochs "
        "sets it)",
    ]
    assert not list(_folder(workspace).glob("extra_1*"))
    assert cli.main([*ADD, "--remove", "extra_1"]) == 2
    assert "there is no unlabelled case extra_1" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["1.2.840", "ct[1]", "a*"])
@pytest.mark.parametrize("endings", [(".b2nd", "_seg.b2nd", ".pkl"), (".npz", ".npy", "_seg.npy", ".pkl")])
def test_only_the_case_of_that_very_name_is_removed(workspace, case, endings):
    """The files are those that nnU-Net's two classes of datasets write, and unpack."""
    dataset, folder = PlannedDataset.of(998, TopoMAEPlanner.default_plans_name), _folder(workspace)
    others = ["1.2.840.7", "1.2.840_seg.7", "ct1", "abc"]
    folder.mkdir()
    try:
        for name in (case, *others):
            for ending in endings:
                (folder / f"{name}{ending}").touch()
        unlabelled.remove(dataset, case, ["3d_fullres"])
        assert {file.name for file in folder.iterdir()} == {f"{name}{ending}" for name in others for ending in endings}
    finally:
        shutil.rmtree(folder)


def test_a_case_that_got_its_label_later_is_named(workspace, images, in_threads):
    (images / "phantom_000_0000.nii.gz").unlink()
    assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 0
    for file in _folder(workspace).glob("extra_0*"):
        file.rename(file.with_name(file.name.replace("extra_0", "phantom_001")))
    with pytest.raises(ValueError, match=r"phantom_001 is a labelled case and lies in .* too; remove it there with"):
        workspace.trainer("TopoMAEPretrainer").get_tr_and_val_datasets()


def test_an_image_of_a_patient_who_is_held_out_is_left_out(workspace, images, in_threads, no_split, capsys):
    names = ["phantom_001", "phantom_002", "phantom_003", "phantom_004"]
    no_split.write_text(
        json.dumps([{"train": names[:2], "val": names[2:], "test": ["extra_1_ct"], "patient": r"extra_\d"}])
    )
    assert cli.main([*ADD, "-i", str(images), "-np", "1"]) == 2
    said = capsys.readouterr()
    assert "extra_1 is of the same patient as extra_1_ct, which is held out" in said.err
    assert PlannedDataset.of(998, TopoMAEPlanner.default_plans_name).unlabelled_cases("3d_fullres") == [
        "extra_0",
        "extra_2",
    ]
    no_split.write_text(
        json.dumps([{"train": names[:2], "val": names[2:], "test": ["extra_2_ct"], "patient": r"extra_\d"}])
    )
    with pytest.raises(
        ValueError,
        match=r"^the added image extra_2 is of the same patient as extra_2_ct, which is held out; remove it with "
        r"nnUNetv2_topomae add_unlabelled --remove extra_2, or hold out other cases$",
    ):
        workspace.trainer("TopoMAEPretrainer").get_tr_and_val_datasets()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "998", "-i", "nowhere"], "nowhere holds no image named CASE_0000.nii.gz"),
        (["-d", "998", "--list", "-p", "Others"], "Others.json does not exist; plan the dataset with"),
        (["-d", "998", "--list", "-c", "3d_none"], "has no 3D configuration 3d_none; it has 3d_fullres"),
    ],
)
def test_what_is_missing_is_named(workspace, arguments, message, capsys):
    assert cli.main(["add_unlabelled", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def without_labels(workspace, in_threads, tmp_path):
    """A dataset of six images that has no labels."""
    write_dataset(tmp_path / "source", num_training=6, num_test=0, seed=70)
    dataset = workspace.preprocessed.with_name("Dataset995_Unlabelled")
    dataset.mkdir()
    plans = workspace.plans() | {"dataset_name": dataset.name}
    (dataset / f"{TopoMAEPlanner.default_plans_name}.json").write_text(json.dumps(plans))
    for name in ("dataset.json", "dataset_fingerprint.json"):
        shutil.copy(workspace.preprocessed / name, dataset)
    images = tmp_path / "source" / "imagesTr"
    assert cli.main(["add_unlabelled", "-d", "995", "-i", str(images), "-c", "3d_fullres", "--no_pbar"]) == 0
    other = Workspace(workspace.folder, dataset.name)
    yield other
    shutil.rmtree(dataset)
    shutil.rmtree(other.results, ignore_errors=True)


def test_a_dataset_without_labels_can_be_pretrained(without_labels):
    trainer = without_labels.trainer("TopoMAEPretrainer")
    trainer.run_training()
    trainer.perform_actual_validation()
    assert without_labels.checkpoint("TopoMAEPretrainer").is_file()
    assert not (without_labels.preprocessed / "splits_final.json").exists()
    splits = [set(part.identifiers) for part in trainer.get_tr_and_val_datasets()]
    assert not splits[0] & splits[1]
    assert len(splits[0] | splits[1]) == 6


def test_a_run_without_labels_that_goes_on_keeps_its_validation_images(without_labels):
    trainer = without_labels.trainer("TopoMAEPretrainer")
    trainer.run_training()
    training, validation = (part.identifiers for part in trainer.get_tr_and_val_datasets())
    folder = _folder(without_labels)
    for file in folder.glob(f"{training[0]}*"):  # was ill
        for number in range(3):
            shutil.copy(file, folder / file.name.replace(training[0], f"added_{number}"))
        file.unlink()
    trainer = without_labels.trainer("TopoMAEPretrainer", continue_training=True)
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    now = [part.identifiers for part in trainer.get_tr_and_val_datasets()]
    assert now == [["added_0", "added_1", "added_2", *training[1:]], validation]


def test_a_dataset_without_labels_has_five_folds(without_labels):
    trainer = without_labels.trainer("TopoMAEPretrainer", fold=5)
    with pytest.raises(ValueError, match="Dataset995_Unlabelled has no labels and so folds 0 to 4 only, not 5"):
        trainer.on_train_start()


def test_cascades_are_left_out(workspace):
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans = {**workspace.plans(), "plans_name": "Cascade"}
    plans["configurations"]["3d_cascade_fullres"] = cascade
    (workspace.preprocessed / "Cascade.json").write_text(json.dumps(plans))
    dataset = PlannedDataset.of(998, "Cascade")
    assert dataset.configurations(None) == ["3d_fullres"]
    with pytest.raises(ValueError, match="Cascade has no 3D configuration 3d_cascade_fullres; it has 3d_fullres"):
        dataset.configurations(["3d_cascade_fullres"])


def test_channels_are_found_in_order(tmp_path):
    for name in ("a_0001.nii.gz", "a_0000.nii.gz", "b_0000.nii.gz", "notes.txt", "c_0000.nrrd"):
        (tmp_path / name).touch()
    complete, incomplete = unlabelled.find_images(tmp_path, ".nii.gz", 2)
    assert complete == {"a": [tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"]}
    assert incomplete == {"b": "has channels [0], but the dataset has channels [0, 1]"}
