"""Plans from elsewhere name classes; nothing but networks and their parts is imported or called."""

import sys

import pytest

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.planning.class_names import TRUSTED, check_class_names

UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def _architecture(network=UNET, **parts):
    return {"network_class_name": network, "arch_kwargs": parts, "_kw_requires_import": list(parts)}


def test_parts_of_nnunets_networks_are_accepted():
    check_class_names(
        _architecture(conv_op="torch.nn.modules.conv.Conv3d", nonlin="torch.nn.LeakyReLU", dropout_op=None)
    )


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.exec",
        "torch.nn.parallel.distributed.os.system",
        "torch.nn.functional.importlib",
        "torch.nnx.Evil",
        "torch.load",
        "nnunet_topomae.files.write_json",
        "nnunet_topomae.commands.demo.run",
        "torch.nn",
        ["os.system"],
        3,
    ],
)
@pytest.mark.parametrize("network", [True, False], ids=["as network", "as part"])
def test_everything_else_is_refused(name, network):
    architecture = _architecture(name) if network else _architecture(nonlin=name)
    with pytest.raises(ValueError, match="is no network or part of one in"):
        check_class_names(architecture)


def test_nothing_is_imported_before_the_name_is_checked(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text("from torch import nn\nclass Own(nn.Module): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'own_networks.Own' is no network"):
        check_class_names(_architecture("own_networks.Own"))
    assert "own_networks" not in sys.modules
    monkeypatch.setenv(TRUSTED, "own_networks")
    check_class_names(_architecture("own_networks.Own"))


def test_adapt_runs_nothing_from_the_plans_in_a_checkpoint(workspace, pretrained, tmp_path, capsys):
    import torch

    checkpoint = torch.load(workspace.checkpoint("TopoMAEPretrainer"), weights_only=True)
    architecture = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"]["nonlin"] = "os.mkdir"
    architecture["_kw_requires_import"] = ["nonlin"]
    torch.save(checkpoint, tmp_path / "in.pth")
    arguments = ["adapt", str(tmp_path / "in.pth"), "-d", "998", "-o", str(tmp_path / "out.pth")]
    assert cli.main(arguments) == 2
    assert "architecture.arch_kwargs.nonlin: 'os.mkdir' is no network or part of one" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
