"""Several processes that share a batch compute what one with the whole batch does."""

import os

import pytest
import torch
import torch.distributed as dist
from processes import environment, make_trainer, process
from torch.utils._pytree import tree_map

from nnunet_topomae.nnunet.training import stage
from nnunet_topomae.nnunet.training.distribution import JoinedBatchNorm, alone
from tiny import PLANNED_CROP, PLANNED_NETWORK, SCHEDULE

ONE_STEP = {**SCHEDULE, "num_epochs": 1, "num_iterations_per_epoch": 1, "warmup_epochs": 0}
BATCH = 6
FINETUNER = "FusedFinetuneTrainer"
IN_DOUBLE = (FINETUNER, "SparKPretrainer")


def join(rank, world, rendezvous):
    """Make a process the ``rank``-th of those that work together."""
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)


def train(rank, world, rendezvous, variables, arguments, output):
    """Make one step and one validation; write losses and gradients."""
    os.environ.update(variables)
    join(rank, world, rendezvous)
    for dropout in (torch.nn.Dropout, torch.nn.Dropout3d):
        dropout.forward = lambda _, values: values  # it depends on the number of processes
    if arguments[1] in IN_DOUBLE:
        in_double(stage)
    trainer = make_trainer(torch.device("cpu"), *arguments)
    gradients = []
    clip = torch.nn.utils.clip_grad_norm_

    def noting(parameters, norm):
        gradients.extend(p.grad.clone() for p in trainer.module.parameters() if p.grad is not None)
        return clip(parameters, norm)

    torch.nn.utils.clip_grad_norm_ = noting
    trainer.run_training()
    log = trainer.logger.get_checkpoint()
    losses = {key: list(map(float, log[key])) for key in ("train_losses", "val_losses")}
    if rank == 0:
        torch.save({"gradients": gradients, "losses": losses, "buffers": list(trainer.module.buffers())}, output)
    dist.barrier()
    dist.destroy_process_group()


def in_double(module):
    """Let networks compute in float64.

    In float32 the gradient of a convolution before a norm, a sum over all voxels whose terms cancel each other, is
    rounded by 1e-4, and otherwise in batches of other sizes: in UNETR++, and with PyTorch 2.6 in U-Nets, too.
    """
    distribute = module.distribute

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def distribute_double(network, device, **options):
        network.register_forward_pre_hook(lambda _, inputs: tree_map(double, inputs))
        return distribute(network.double(), device, **options)

    module.distribute = distribute_double


def run(folder, target, world, *arguments):
    """Run a function in several processes; what the first of them has written."""
    rendezvous, output = folder / f"rendezvous{world}", folder / f"output{world}.pt"
    processes = [process(target, rank, world, rendezvous, environment(), *arguments, output) for rank in range(world)]
    try:
        for each in processes:
            each.start()
        for each in processes:
            each.join()
        assert [each.exitcode for each in processes] == [0] * world
    finally:
        for each in processes:
            each.kill()
    return torch.load(output)


def _no_chance(configuration):
    """Six items in a batch, and no stochastic depth."""
    configuration["batch_size"] = BATCH
    configuration["pretraining"] = {**configuration.get("pretraining", {}), **ONE_STEP}
    configuration["finetuning"] = {**ONE_STEP, "from_scratch": True, "drop_path": 0}


def _unetr(configuration):
    arguments = {"crop_size": PLANNED_CROP, "strides": [[1] * 3, *[[2] * 3] * 3], "vit": PLANNED_NETWORK["vit"]}
    network = "nnunet_topomae.networks.unetr.UNETR"
    configuration["architecture"].update(network_class_name=network, arch_kwargs={**arguments, "features": 4})
    configuration["pretraining"] = ONE_STEP
    _no_chance(configuration)


def _u_net(configuration):
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [4 * 2**n for n in range(arguments["n_stages"])]
    _no_chance(configuration)


def _spark(configuration):
    configuration["pretraining"] = {"decoder_width": 16}
    _u_net(configuration)


def _mim(configuration):
    _unetr(configuration)
    configuration["pretraining"].update(gamma=1, beta=2, projection_width=16)


def _alice(configuration):
    _unetr(configuration)
    configuration["pretraining"].update(matcher="position", head_width=16)


def _contrast(configuration):
    configuration["pretraining"] = {"temperature": 0.2}
    _u_net(configuration)


def _teacher(configuration):
    configuration["pretraining"]["mask_source"] = "anatomask"
    configuration["pretraining"]["anatomask"] = {"first_share": 0.5}
    _no_chance(configuration)


OURS, UNET = "nnUNetTopoMAEPlans", "nnUNetPlans"
TOLERANCES = {
    "TopoMAEPretrainer": 3e-5,  # of a norm of 13 in float32, in which diagrams are matched anew
    "CropContrastPretrainer": 3e-5,  # cosines near 1 lose digits in float32
    FINETUNER: 1e-8,  # in float64, though nnU-Net's Dice sums up in float32
}
METHODS = {
    "TopoMAE": ("TopoMAEPretrainer", OURS, _no_chance),
    "TopoMAE, AnatoMask's masks": ("TopoMAEPretrainer", OURS, _teacher),
    "MAE": ("MAEPretrainer", OURS, _unetr),
    "MiM": ("MiMPretrainer", OURS, _mim),
    "Alice": ("AlicePretrainer", OURS, _alice),
    "SparK": ("SparKPretrainer", UNET, _spark),
    "AnatoMask": ("AnatoMaskPretrainer", UNET, _spark),
    "CropContrast": ("CropContrastPretrainer", UNET, _contrast),
    "fine-tuning": (FINETUNER, OURS, _no_chance),
}


@pytest.mark.parametrize(("trainer", "like", "edit"), METHODS.values(), ids=METHODS)
def test_losses_and_gradients_are_those_of_one_process(workspace, tmp_path, trainer, like, edit):
    plans = workspace.write_plans(f"Shared{trainer}{edit.__name__}", edit, like=like)
    alone, *together = (run(tmp_path, train, world, (workspace.dataset, trainer, plans)) for world in (1, 2, 3))
    assert alone["gradients"]
    tolerance = TOLERANCES.get(trainer, 1e-5)
    for each in together:
        for name, losses in alone["losses"].items():
            assert each["losses"][name] == pytest.approx(losses, rel=1e-5), name
        expected, found = (torch.cat([g.flatten() for g in run["gradients"]]) for run in (alone, each))
        assert (found - expected).norm() <= tolerance * expected.norm()
        for expected, found in zip(alone["buffers"], each["buffers"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def normalise(rank, world, rendezvous, _, whole, output):
    """Normalise a share of a batch; write output, gradient and running means, all of the whole batch."""
    join(rank, world, rendezvous)
    norm = JoinedBatchNorm(3)
    share = whole[rank::world].clone().requires_grad_()
    result = norm(share)
    (result * share.detach().cos()).sum().backward()
    without = JoinedBatchNorm(3, track_running_stats=False).eval()
    evaluated = without(share.detach())
    if rank == 0:
        values = {"result": result.detach(), "gradient": share.grad, "mean": norm.running_mean, "var": norm.running_var}
        with alone(without):  # the others do nothing of the kind
            values["alone"] = without(share.detach())
        torch.save({**values, "evaluated": evaluated}, output)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_over_all_processes_is_that_of_the_whole_batch(tmp_path, world):
    whole = (torch.randn(6, 3, 2, 4, 5) * 3 + 7).requires_grad_()
    norm = torch.nn.BatchNorm3d(3)
    result = norm(whole)
    (result * whole.detach().cos()).sum().backward()
    found = run(tmp_path, normalise, world, whole.detach())
    torch.testing.assert_close(found["result"], result[::world].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["gradient"], whole.grad[::world], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["mean"], norm.running_mean)
    torch.testing.assert_close(found["var"], norm.running_var)
    without = torch.nn.BatchNorm3d(3, track_running_stats=False).eval()
    torch.testing.assert_close(found["evaluated"], without(whole)[::world].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["alone"], without(whole[::world]).detach(), rtol=1e-5, atol=1e-5)


def test_a_batch_that_cannot_be_divided_is_refused(workspace, monkeypatch):
    def odd(configuration):
        configuration["batch_size"] = 3

    trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("OddBatch", odd))
    monkeypatch.setattr("nnunet_topomae.nnunet.training.stage.world_size", lambda: 2)
    with pytest.raises(ValueError, match="batch_size 3 in the plans cannot be divided among 2 processes"):
        trainer.initialize()
