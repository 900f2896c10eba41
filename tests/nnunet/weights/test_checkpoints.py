import os

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_topomae.nnunet.weights.checkpoints import (
    cases_seen,
    drawn_from,
    is_pretrained,
    most_trained,
    most_trained_first,
    read_checkpoint,
    to_plain,
    write_checkpoint,
)
from workspace import truncate


def _write(tmp_path, content):
    file = tmp_path / "checkpoint.pth"
    write_checkpoint(content, file)
    return file


def test_round_trip_leaves_no_temporary_file(tmp_path):
    weights = {"a": torch.rand(3)}
    file = _write(
        tmp_path, {"network_weights": weights, "loss": np.float32(0.5), "shape": (1, 2), "device": torch.device("cpu")}
    )
    checkpoint = read_checkpoint(file)
    assert torch.equal(checkpoint["network_weights"]["a"], weights["a"])
    assert (checkpoint["loss"], checkpoint["shape"], checkpoint["device"]) == (0.5, [1, 2], "cpu")
    assert list(tmp_path.iterdir()) == [file]


def test_only_plain_types_are_written():
    with pytest.raises(TypeError, match="tensors and plain types only, got Linear"):
        to_plain({"module": nn.Linear(1, 1)})


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "does not exist"),
        (lambda file: file.write_bytes(b"not a checkpoint"), "checkpoint.pth"),
        (lambda file: file.write_bytes(b""), "damaged, truncated or no checkpoint"),
        (lambda file: torch.save([1, 2], file), 'is no nnU-Net checkpoint: it has no "network_weights"'),
        (lambda file: torch.save({"network_weights": 3}, file), 'it has no "network_weights"'),
        (lambda file: torch.save({"network_weights": Malicious()}, file), "not loaded because it could execute code"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, capsys, make, message):
    file = tmp_path / "checkpoint.pth"
    make(file)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(file)
    assert "this must not run" not in capsys.readouterr().out


NO_TENSORS = {
    "sparse": torch.eye(2).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "complex": torch.ones(2, dtype=torch.complex64),
    "8 bits": torch.ones(2).to(torch.float8_e4m3fn),
    "far larger than the file": torch.ones(1).expand(10**12),
    "without content": torch.ones(2, device="meta"),
    "text": "x",
}


@pytest.mark.parametrize("value", NO_TENSORS.values(), ids=NO_TENSORS.keys())
def test_weights_that_are_no_plain_tensors_are_refused_by_name(tmp_path, value):
    torch.save({"network_weights": {"a.weight": value}}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint\.pth .*'a\.weight' names no dense tensor of real numbers"):
        read_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"network_weights": {7: torch.ones(1)}}, "7 names no dense tensor"),
        ({"untrained_parameters": 3}, '"untrained_parameters" must be a list of names'),
        ({"fixed_parameters": [["a"]]}, '"fixed_parameters" must be a list of names'),
        ({"drawn_from": [None]}, '"drawn_from" must be a list of names'),
        ({"init_args": None}, '"init_args" must be an object that holds the plans'),
        ({"init_args": {"plans": None}}, '"init_args" must be an object that holds the plans'),
    ],
)
def test_what_is_beside_the_weights_is_looked_at(tmp_path, content, message):
    torch.save({"network_weights": {}, **content}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "checkpoint.pth")


def test_truncated_file_is_refused(tmp_path):
    file = _write(tmp_path, {"network_weights": {"a": torch.rand(1000)}})
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(ValueError, match="damaged, truncated or no checkpoint"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"network_weights": {}, "untrained_parameters": []}, True),
        ({"network_weights": {}, "finetuned_by": "FusedFinetuneTrainer"}, False),
        ({"network_weights": {}, "logging": np.float64(1), "init_args": torch.device("cpu")}, False),  # nnU-Net's own
    ],
)
def test_checkpoints_of_pretraining_are_recognised_by_what_they_hold(tmp_path, content, expected):
    torch.save(content, tmp_path / "checkpoint_final.pth")
    assert is_pretrained(tmp_path / "checkpoint_final.pth") == expected


def _progress(epochs, steps=0, begun=5.0):
    log = {"epoch_start_timestamps": [begun] * (epochs + 1)}
    return {"network_weights": {}, "logging": log, "current_epoch": epochs, "steps_of_epoch": [{}] * steps}


@pytest.mark.parametrize(
    ("contents", "order"),
    [
        ({"best": _progress(1), "final": _progress(3), "latest": _progress(2)}, ["final", "latest", "best"]),
        ({"previous": _progress(2, steps=1), "latest": _progress(2, steps=2)}, ["latest", "previous"]),
        ({"previous": _progress(2, steps=9), "latest": _progress(3)}, ["latest", "previous"]),
        ({"old": _progress(2), "new": _progress(2)}, ["new", "old"]),  # time stamps decide
        ({"new": _progress(2), "old": _progress(2)}, ["old", "new"]),
        ({"latest": _progress(1, begun=6.0), "final": _progress(3)}, ["latest", "final"]),  # trained anew
        ({"best": {"network_weights": {}}, "latest": _progress(0, steps=1)}, ["latest", "best"]),  # says nothing
        ({"best": {"network_weights": {}, "logging": 3}, "latest": _progress(1)}, ["best", "latest"]),  # is named
    ],
)
def test_checkpoints_are_sorted_by_how_far_the_training_was(tmp_path, contents, order):
    for seconds, (name, content) in enumerate(contents.items()):
        torch.save(content, tmp_path / name)
        os.utime(tmp_path / name, (seconds, seconds))
    assert [file.name for file in most_trained_first(tmp_path.iterdir())] == order


def test_a_damaged_checkpoint_is_named_and_the_next_one_taken(tmp_path):
    for name, epochs in (("latest", 3), ("previous", 2), ("best", 1)):
        torch.save(_progress(epochs), tmp_path / name)
    truncate(tmp_path / "latest")
    file, content, problems = most_trained(tmp_path.iterdir())
    assert (file.name, content["current_epoch"], len(problems)) == ("previous", 2, 1)
    assert problems[0].startswith(f"{tmp_path / 'latest'} is damaged")


def test_a_damaged_checkpoint_is_not_passed_over(tmp_path):
    file = _write(tmp_path, {"network_weights": {"a": torch.rand(1000)}, "untrained_parameters": []})
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(ValueError, match="damaged, truncated or no checkpoint"):
        is_pretrained(file)


@pytest.mark.parametrize(
    ("content", "cases"),
    [
        ({"drawn_from": ["a", "b", "Dataset007_Other/a"]}, {"a", "b"}),
        ({"network_weights": {}}, set()),  # of an older version
        ([1, 2], set()),
    ],
)
def test_cases_that_a_pretraining_drew_from(tmp_path, content, cases):
    torch.save(content, tmp_path / "checkpoint_final.pth")
    assert drawn_from(tmp_path / "checkpoint_final.pth") == cases


@pytest.mark.parametrize(
    ("of", "drawn", "seen"),
    [
        ("Dataset001_Own", ["a", "Dataset007_Other/b"], {"a", "Dataset007_Other/b"}),
        ("Dataset007_Other", ["a", "Dataset001_Own/b"], {"Dataset007_Other/a", "b"}),
        ("Dataset007_Other", [], set()),
    ],
)
def test_cases_of_other_datasets_are_not_taken_for_own_ones(of, drawn, seen):
    checkpoint = {"drawn_from": drawn, "init_args": {"plans": {"dataset_name": of}}}
    assert cases_seen(checkpoint, "Dataset001_Own") == seen


def test_cases_of_an_unnamed_dataset_are_taken_for_own_ones():
    assert cases_seen({"drawn_from": ["a"]}, "Dataset001_Own") == {"a"}
    assert cases_seen({}, "Dataset001_Own") == set()


def test_a_checkpoint_of_nnunets_own_trainers_is_read(tmp_path):
    content = {
        "network_weights": {"a": torch.ones(2)},
        "_best_ema": np.float64(0.5),
        "logging": {"dice": [[np.float32(0.5), np.float64(1)]], "epoch": np.int64(3)},
        "init_args": {"device": torch.device("cuda")},
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    assert read_checkpoint(tmp_path / "checkpoint.pth")["logging"] == content["logging"]


@pytest.mark.parametrize("content", [b"\x80\x02h\x65.", b"\x80\x02."], ids=["reference to nothing", "empty stack"])
def test_damage_is_described_in_words(tmp_path, content):
    file = tmp_path / "checkpoint.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^.* is damaged, truncated or no checkpoint: its parts do not fit together$"):
        read_checkpoint(file)


def test_bytes_that_have_changed_are_noticed(tmp_path):
    file = _write(tmp_path, {"network_weights": {"a": torch.rand(100_000)}})
    content = bytearray(file.read_bytes())
    content[200_000:200_064] = bytes(byte ^ 255 for byte in content[200_000:200_064])
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pth is damaged, .*: bytes have changed in archive/data/0$"):
        read_checkpoint(file)


def test_weights_of_a_diverged_training_are_neither_written_nor_read(tmp_path):
    content = {"network_weights": {"a": torch.ones(1), "b": torch.tensor([1, torch.nan])}}
    with pytest.raises(ValueError, match=r"is not written: the network holds NaN or inf in 1 of 2 tensors, such as b"):
        _write(tmp_path, content)
    assert not list(tmp_path.iterdir())
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint\.pth: the network holds NaN or inf in 1 of 2 tensors, such as b"):
        read_checkpoint(tmp_path / "checkpoint.pth")
