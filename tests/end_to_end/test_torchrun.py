"""Training that torchrun starts, on one machine and on two, of which a worker is lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow
CORES = sorted(os.sched_getaffinity(0))[:2]
TRAINER = "FusedFinetuneTrainer"
MODULE = "nnunet_topomae.distributed"
SHORT_STOCK_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerOfTwoSteps(nnUNetTrainer):
    def initialize(self):
        super().initialize()
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
"""


class Launcher:
    """``torchrun`` in the background, which starts processes that train.

    Args:
        log: file that all of them write to.
        arguments: of the training.
        options: of ``torchrun``.
        within: command that runs another one on a machine.
        interface: of the network.
        cores: of the machine. Each process has one, as with more it adds up in another order.
    """

    def __init__(self, log, arguments, options, within=(), interface="lo", cores=None):
        self.log = log
        environment = {
            **os.environ,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
            "nnUNet_n_proc_DA": "0",
        }
        command = [*within, sys.executable, "-m", "torch.distributed.run", *options, "-m", MODULE]
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [*command, *arguments, "-device", "cpu"],
                cwd=log.parent,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, cores or CORES),
            )

    def is_running(self):
        return self._process.poll() is None

    def workers(self):
        """IDs of the processes that train."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [int(child) for child in children if MODULE in Path(f"/proc/{child}/cmdline").read_text()]

    def wait(self):
        assert self._process.wait(900) == 0, self.log.read_text()

    def end(self):
        """End it if it is still there; it ends what it has started."""
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def launch(tmp_path):
    """Start launchers, which are ended with the test."""
    launchers = []

    def start(arguments, options, *machine):
        launchers.append(Launcher(tmp_path / f"{len(launchers)}.log", arguments, options, *machine))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.end()


@pytest.fixture
def machines():
    """Two network namespaces, joined by a cable: the address of each, and how a launcher is started on it."""
    names, interfaces = ([f"{kind}{os.getpid()}{n}" for n in "ab"] for kind in ("tm", "v"))
    addresses = ["10.213.17.1", "10.213.17.2"]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    if not shutil.which("ip") or os.geteuid():
        pytest.skip("making network namespaces needs iproute2 and root")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for name, interface, address in zip(names, interfaces, addresses, strict=True):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for each in (interface, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield [
            (address, ("ip", "netns", "exec", name), interface, [core])
            for name, interface, address, core in zip(names, interfaces, addresses, (CORES[0], CORES[-1]), strict=True)
        ]
    finally:
        for name in names:  # with a namespace its end of the cable goes, and with that the other end
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


ONE_MACHINE = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]


def _arguments(workspace, trainer, plans):
    return [workspace.dataset, "3d_fullres", "0", "-p", plans, "-tr", trainer, "--c"]


@pytest.fixture(scope="module")
def whole(workspace):
    """Plans of a run that nothing happens to, in two processes."""

    def edit(configuration):
        configuration["batch_size"] = 2
        configuration["finetuning"] |= {"from_scratch": True, "save_every": 1, "num_epochs": 4}

    plans = workspace.write_plans("Elastic", edit)
    launcher = Launcher(workspace.folder / "whole.log", _arguments(workspace, TRAINER, plans), ONE_MACHINE)
    try:
        launcher.wait()
    finally:
        launcher.end()
    return plans


def _kill_a_worker(workspace, plans, launcher):
    """Kill one as soon as there is a checkpoint to go on from."""
    latest = workspace.checkpoint(TRAINER, plans, name="latest")
    while not latest.exists() and launcher.is_running():
        time.sleep(0.05)
    os.kill(launcher.workers()[-1], signal.SIGKILL)


def _assert_equal(workspace, whole, killed):
    expected, found = (read_checkpoint(workspace.checkpoint(TRAINER, plans)) for plans in (whole, killed))
    for key, tensor in expected["network_weights"].items():
        assert torch.equal(found["network_weights"][key], tensor), key
    assert workspace.checkpoint(TRAINER, killed).with_name("validation").joinpath("summary.json").is_file()


def test_a_run_that_loses_a_worker_ends_as_one_that_does_not(workspace, whole, launch):
    plans = workspace.write_plans("ElasticKilled", like=whole)
    launcher = launch(_arguments(workspace, TRAINER, plans), ONE_MACHINE)
    _kill_a_worker(workspace, plans, launcher)
    launcher.wait()
    assert "Going on from" in launcher.log.read_text()
    _assert_equal(workspace, whole, plans)


def test_a_run_on_two_machines_of_which_one_loses_its_worker_ends_as_one_on_a_single_machine(
    workspace, whole, launch, machines
):
    plans = workspace.write_plans("ElasticMachines", like=whole)
    launchers = []
    for number, (address, *machine) in enumerate(machines):
        options = [
            *("--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_id=17", "--rdzv_backend=c10d"),
            f"--rdzv_endpoint={machines[0][0]}:29400",
            f"--rdzv_conf=is_host={int(number == 0)}",  # as both have the name of this machine
            f"--local_addr={address}",
        ]
        launchers.append(launch(_arguments(workspace, TRAINER, plans), options, *machine))
    _kill_a_worker(workspace, plans, launchers[1])
    for launcher in launchers:
        launcher.wait()
    assert "Going on from" in "".join(launcher.log.read_text() for launcher in launchers)
    _assert_equal(workspace, whole, plans)


def test_nnunets_own_trainer_is_trained_by_two_processes(workspace, launch, tmp_path, monkeypatch):
    def edit(configuration):
        arguments = configuration["architecture"]["arch_kwargs"]
        arguments["features_per_stage"] = [4 * 2**n for n in range(arguments["n_stages"])]
        configuration["batch_size"] = 2

    folder, name = tmp_path / "trainers", "nnUNetTrainerOfTwoSteps"
    folder.mkdir()
    (folder / "of_two_steps.py").write_text(SHORT_STOCK_TRAINER)
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    plans = workspace.write_plans("Stock", edit, like="nnUNetPlans")
    arguments = _arguments(workspace, name, plans)[:-1]  # nnU-Net's own --c may start anew, too, but warns
    launcher = launch(arguments, ONE_MACHINE)
    launcher.wait()
    final = workspace.checkpoint(name, plans)
    assert torch.load(final, weights_only=False)["trainer_name"] == name
    assert final.with_name("validation").joinpath("summary.json").is_file()
    assert "The world size is 2" in launcher.log.read_text()
