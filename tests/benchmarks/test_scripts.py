"""Benchmarks still run, and print what they say."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_topomae.nnunet.training.pretraining import Pretrainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(load, monkeypatch, capsys):
    """Run a benchmark in this process, with some of its names replaced; gives what it printed."""

    def run(name: str, *arguments: str, **replaced) -> str:
        module = load(name)
        for variable, value in replaced.items():
            monkeypatch.setattr(module, variable, value)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setenv("nnUNet_extTrainer", "")
        module.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_every_benchmark_finds_what_it_imports(load, name):
    assert load(name).__doc__


def test_the_topological_loss_is_compared_with_gudhi(load, run):
    def measured(function, arguments, limit):  # in this process, because others cannot import a benchmark by this name
        value, remark = function(*arguments)
        return 1.0, 0.0, value, remark()

    benchmark = load("topology")
    peers = {"gudhi.wasserstein": (benchmark.gudhi_exact, (), 32)}
    printed = run("topology", "--sizes", 12, "--case", "noise", measure=measured, PEERS=peers)
    values = dict(re.findall(r"^  (ours, exact|gudhi\.wasserstein) +1\.000 +0\.00 +([0-9.]+)", printed, re.MULTILINE))
    assert float(values["ours, exact"]) == pytest.approx(float(values["gudhi.wasserstein"]), rel=1e-4)
    assert "times as fast as, ours, exact: gudhi.wasserstein 1.0" in printed


def _counted(method, calls):
    """The method, which counts its calls by name."""

    def counted(*arguments):
        calls[method.__name__] += 1
        return method(*arguments)

    return counted


def test_methods_are_compared_with_their_bare_networks(workspace, run):
    methods = {"nnUNetTopoMAEPlans": ("TopoMAEPretrainer",)}
    printed = run("methods", workspace.dataset, "--device", "cpu", "--steps", 1, METHODS=methods)
    (whole, of_bare) = re.search(r"TopoMAEPretrainer +([0-9.]+) s.* ([0-9.]+) x bare", printed).groups()
    (bare,) = re.search(r"TopoMAEPretrainer, bare +([0-9.]+) s", printed).groups()
    assert float(of_bare) == pytest.approx(
        float(whole) / float(bare),
        rel=0.2,  # seconds are printed with three digits
    )


def test_a_bare_step_trains_without_the_loss_of_the_method(workspace, run, monkeypatch):
    calls = {"loss_terms": 0, "optimise": 0}
    for name in calls:
        monkeypatch.setattr(Pretrainer, name, _counted(getattr(Pretrainer, name), calls))
    methods = {"nnUNetTopoMAEPlans": ("TopoMAEPretrainer",)}
    run("methods", workspace.dataset, "--device", "cpu", "--steps", 1, METHODS=methods)
    assert calls == {"loss_terms": 2, "optimise": 4}  # two steps of each kind


def test_a_step_is_measured_with_every_grid(workspace, run):
    printed = run("training_step", workspace.dataset, "--device", "cpu", "--steps", 1, "--longest_axes", 8, 0)
    assert [line.split(" on ")[1] for line in printed.splitlines() if line.startswith("topology on")] == [
        "12 x 16 x 16",
        "6 x 8 x 8",
        "every voxel",
    ]
    assert printed.count("whole step") == 3


def test_small_plans_build_networks_for_their_crop(tmp_path, run):
    block = {"topology": {"enabled": True, "weight": 1.0}, "mask_ratio": 0.5}
    prefixes = ("Coarse", "Small")
    networks = {"SmallTopoMAE", "SmallTopoMAEFinePatches", "SmallUNETR", "SmallMiM", "SmallAlice", "SmallUNet"}
    configuration = {"pretraining": block, "finetuning": {}, "batch_size": 9, "patch_size": [8] * 3}
    plans = {"plans_name": "nnUNetTopoMAEPlans", "configurations": {"3d_fullres": configuration}}
    folder = tmp_path / "Dataset004_Made"
    folder.mkdir()
    (folder / "nnUNetTopoMAEPlans.json").write_text(json.dumps(plans))
    replaced = {"nnUNet_preprocessed": tmp_path, "maybe_convert_to_dataset_name": lambda _: "Dataset004_Made"}
    run("small_plans", 4, "--crop", 16, 32, 16, **replaced)
    weights, ratios, rates = {}, {}, {}
    for file in folder.glob("Small*.json"):
        plans = json.loads(file.read_text())
        (written,) = plans["configurations"].values()
        assert plans["plans_name"] == file.stem
        assert (written["patch_size"], written["batch_size"]) == ([16, 32, 16], 2)
        if file.stem in networks:
            architecture = written["architecture"]
            names = ("network_class_name", "arch_kwargs", "_kw_requires_import")
            network = get_network_from_plans(*(architecture[name] for name in names), 1, 2, deep_supervision=False)
            assert network(torch.zeros(2, 1, 16, 32, 16)).shape == (2, 2, 16, 32, 16)
        if "TopoMAE" in file.stem:
            topology = written["pretraining"]["topology"]
            weights[file.stem] = topology["weight"] if topology["enabled"] else 0
            ratios[file.stem] = written["pretraining"]["mask_ratio"]
            rates["LowRate" in file.stem] = written["finetuning"]["base_lr"]
    expected = {"": (0.1, 0.5), "NoTopology": (0, 0.5), "FullTopology": (1, 0.5), "HighMask": (0.1, 0.75)}
    names = itertools.product(("", "FinePatches"), ("", "Slow", "Frozen", "LowRate"), expected)
    written = {f"SmallTopoMAE{patches}{recipe}{name}": expected[name] for patches, recipe, name in names}
    assert {name: (weights[name], ratios[name]) for name in weights} == written
    assert rates == {False: 0.256, True: 0.1}
    run("small_plans", 4, "--prefix", "Coarse", **replaced)
    names = {kind: sorted(file.stem.removeprefix(kind) for file in folder.glob(f"{kind}*")) for kind in prefixes}
    assert names["Coarse"] == names["Small"]


def test_pretraining_of_u_nets_takes_more_memory_than_fine_tuning(load, run):
    networks = {"default": load("unet_memory").NETWORKS["default"]}
    printed = run("unet_memory", "--crop", 64, 64, 64, "--batch_size", 1, NETWORKS=networks)
    needed = re.search(r"^default +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE).groups()
    finetuning, spark, anatomask, mim = map(float, needed)
    assert finetuning < spark < anatomask < mim
