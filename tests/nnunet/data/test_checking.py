import os

import numpy as np
import pytest

from nnunet_topomae.nnunet.data import checking
from nnunet_topomae.nnunet.data.checking import CheckedFiles, check_finite


class Cases:
    """Stands in for preprocessed cases, each with an image and a label."""

    source_folder = "folder"

    def __init__(self, folder, *names):
        self.folder, self.identifiers = folder, list(names)
        for name in names:
            np.save(folder / f"{name}.npy", np.ones((1, 4, 4, 4)))
            (folder / f"{name}_seg.npy").write_bytes(b"label")

    def load_image(self, case):
        return np.load(self.folder / f"{case}.npy")

    def files_of(self, case, *, with_label):
        files = [self.folder / f"{case}.npy", self.folder / f"{case}_seg.npy"]
        return files if with_label else files[:1]


def test_cases_that_are_not_finite_are_named(tmp_path):
    cases = Cases(tmp_path, "good", "bad", "worse")
    for name, value in (("bad", np.inf), ("worse", np.nan)):
        np.save(tmp_path / f"{name}.npy", np.full((1, 4, 4, 4), value))
    check_finite(cases, ["good"], show_progress=False)
    with pytest.raises(ValueError, match=r"^NaN or inf in 2 preprocessed case\(s\) in folder: bad, worse; repair"):
        check_finite(cases, cases.identifiers, show_progress=False)


def test_a_case_that_cannot_be_read_is_named(tmp_path):
    cases = Cases(tmp_path, "good", "bad")
    (tmp_path / "bad.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^case bad in folder cannot be read: EOFError"):
        check_finite(cases, cases.identifiers, show_progress=False)


def test_files_that_were_checked_are_remembered_until_they_change(tmp_path):
    cases = Cases(tmp_path, "a", "b", "c")
    images, all_files = (CheckedFiles(tmp_path, with_labels=flag) for flag in (False, True))
    assert images.unknown(cases) == ["a", "b", "c"]
    images.add(cases, ["a", "b"])
    assert images.unknown(cases) == ["c"]
    assert all_files.unknown(cases) == ["a", "b", "c"], "their labels were not read"
    all_files.add(cases, ["a", "b", "c"])
    assert all_files.unknown(cases) == images.unknown(cases) == []
    os.utime(tmp_path / "a.npy", (1, 1))
    (tmp_path / "b_seg.npy").write_bytes(b"another label")
    assert images.unknown(cases) == ["a"]
    assert all_files.unknown(cases) == ["a", "b"]
    (tmp_path / "c.npy").unlink()
    (tmp_path / "checked_files.json").write_text("{")
    assert images.unknown(Cases(tmp_path, "c")) == ["c"], "a damaged memory is none"


def test_a_folder_that_must_not_be_written_to_does_not_end_a_training(workspace, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(checking, "write_json", refuse)
    (workspace.preprocessed / "checked_files.json").unlink(missing_ok=True)
    workspace.trainer("TopoMAEPretrainer").on_train_start()
    assert "WARNING: cases are checked again at the next start: read-only" in capsys.readouterr().out


def test_a_second_training_reads_no_case_for_the_check(workspace, monkeypatch):
    workspace.trainer("TopoMAEPretrainer", workspace.write_plans("FirstCheck")).on_train_start()
    read = []
    monkeypatch.setattr(checking, "defect", lambda cases, case, **_: read.append(case))
    workspace.trainer("TopoMAEPretrainer", workspace.write_plans("SecondCheck")).on_train_start()
    assert read == []
