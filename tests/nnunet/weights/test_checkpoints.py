from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint, to_plain, write_checkpoint
from nnunet_topomae.nnunet.weights.handover import hand_over


def _network(width=3):
    network = nn.Module()
    network.encoder = nn.Linear(2, width)
    network.pyramid = nn.Linear(2, 2)
    network.decoder = nn.Module()
    network.decoder.seg_layers = nn.ModuleList([nn.Linear(2, 4)])
    return network


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


def test_truncated_file_is_refused(tmp_path):
    file = _write(tmp_path, {"network_weights": {"a": torch.rand(1000)}})
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(ValueError, match="damaged, truncated or no checkpoint"):
        read_checkpoint(file)


def test_hand_over_loads_all_but_heads_and_reports_what_was_never_trained():
    source, target = _network(), _network()
    checkpoint = {
        "network_weights": {**source.state_dict(), "vit_decoder.weight": torch.rand(2)},
        "untrained_parameters": ["pyramid.weight", "pyramid.bias"],
    }
    head = target.decoder.seg_layers[0].weight.clone()
    result = hand_over(checkpoint, target, Path("x.pth"))
    assert torch.equal(target.encoder.weight, source.encoder.weight)
    assert torch.equal(target.pyramid.weight, source.pyramid.weight)
    assert torch.equal(target.decoder.seg_layers[0].weight, head)
    assert result.loaded == ["encoder.weight", "encoder.bias"]
    assert result.fresh == [
        "pyramid.weight",
        "pyramid.bias",
        "decoder.seg_layers.0.weight",
        "decoder.seg_layers.0.bias",
    ]
    report = result.report(target)
    assert "encoder                              9             0" in report
    assert "2 tensors of segmentation heads; 2 tensors of pyramid" in report


def test_another_architecture_is_refused_and_nothing_is_loaded():
    target = _network(width=5)
    before = target.pyramid.weight.clone()
    weights = _network(width=3).state_dict()
    del weights["pyramid.bias"]
    with pytest.raises(
        ValueError,
        match=r"x.pth is of another architecture than the plans: 1 tensors are missing \(pyramid.bias\), "
        r"2 have another shape \(encoder.weight \(3, 2\) instead of \(5, 2\)",
    ):
        hand_over({"network_weights": weights}, target, Path("x.pth"))
    assert torch.equal(target.pyramid.weight, before)
