"""The checkpoints of a run: when they are written, and going on from one as if nothing had happened."""

from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nnunet_topomae.files import keep_as
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.weights.checkpoints import WEIGHTS, write_checkpoint
from nnunet_topomae.settings import StageConfig

CHECKPOINTS = FINAL, LATEST, BEST, PREVIOUS = (
    "checkpoint_final.pth",
    "checkpoint_latest.pth",
    "checkpoint_best.pth",
    "checkpoint_previous.pth",
)
OPTIMIZER = "optimizer_state"  # nnU-Net's key
_SHARE = 0.02  # of the time that may be spent on writing checkpoint_latest.pth
_OF_NETWORK = ("architecture", "patch_size")
_STEPS = "num_iterations_per_epoch"  # by which a schedule and the steps of an epoch that was interrupted are counted
_OTHER_PLANS = (
    "{} was written with other plans than the present ones, so the run cannot be continued; restore the plans or "
    "delete the folder: {}"
)


class Saving:
    """Writes checkpoints, and says how often ``checkpoint_latest.pth`` is written.

    Args:
        save_every: epochs between two writes; None: every epoch if writing takes under 2 % of the time, else as often
            as that allows.
    """

    def __init__(self, save_every: int | None):
        self._save_every = save_every
        self._seconds_to_write = 0.0
        self.start()

    def start(self) -> None:
        """Count the time since the last write from now on, when a training starts."""
        self._last_written = monotonic()

    def epochs_between(self, num_epochs: int) -> int:
        """At the end of an epoch: nnU-Net's ``save_every``, which is 1 if a checkpoint is due now.

        Args:
            num_epochs: of the whole training.
        """
        due = self._seconds_to_write <= _SHARE * (monotonic() - self._last_written)
        return self._save_every or (1 if due else num_epochs + 1)

    def write(self, checkpoint: Mapping[str, Any], file: Path) -> None:
        """Write a checkpoint; the ``checkpoint_latest.pth`` before it stays as ``checkpoint_previous.pth``.

        Raises:
            ValueError: if weights are NaN or inf.
            OSError: if the disk is full, or the folder must not be written to; older checkpoints stay as they are.
        """
        started = monotonic()
        if file.name == LATEST and file.exists():
            keep_as(file, file.with_name(PREVIOUS))
        write_checkpoint(checkpoint, file)
        if file.name == LATEST:
            self._last_written = monotonic()
            self._seconds_to_write = self._last_written - started


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, any of which it can go on from."""
    return [file for name in CHECKPOINTS if (file := folder / name).is_file()]


def check_plans_stayed(before: Mapping[str, Any], now: Mapping[str, Any], block: str, file: Path) -> None:
    """Refuse what tensors of the right shape cannot tell: other preprocessing, other positions, epochs of other length.

    Args:
        before: what the trainer was made with that wrote a checkpoint: plans, configuration and dataset_json.
        now: what the present one was made with.
        block: of the plans that the trainer reads.
        file: the checkpoint.

    Raises:
        ValueError: names what was otherwise.
    """
    written, present = (_must_stay(made_with, block, file.parent) for made_with in (before, now))
    for key, value in written.items():
        if value != present.get(key):
            raise ValueError(_OTHER_PLANS.format(file, f"{key} was {value}"))


def _must_stay(made_with: Mapping[str, Any], block: str, folder: Path) -> dict[str, Any]:
    """What must not change in the plans of a trainer while its run goes on."""
    plans, configuration = PlansManager(made_with["plans"]), made_with["configuration"]
    settings = plans.get_configuration(configuration).configuration
    preprocessing = PlannedDataset(folder, plans, made_with["dataset_json"]).preprocessing(configuration)
    steps = settings.get(block, {}).get(_STEPS, StageConfig.num_iterations_per_epoch)
    return {**{key: settings[key] for key in _OF_NETWORK}, f"{block}.{_STEPS}": steps, **preprocessing}


def restore_weights(checkpoint: Mapping[str, Any], network: nn.Module, optimizer: Optimizer, file: Path) -> None:
    """Load the network, and the optimiser's moments of it; its settings stay those of the present plans.

    Raises:
        ValueError: if the checkpoint is of another network or another optimiser; names its file.
    """
    before, present = checkpoint[OPTIMIZER], optimizer.state_dict()
    if _moments(before) != _moments(present):
        raise ValueError(_OTHER_PLANS.format(file, "the optimiser was another one"))
    settings = [{key: value for key, value in group.items() if key != "params"} for group in present["param_groups"]]
    try:
        network.load_state_dict(checkpoint[WEIGHTS])
        optimizer.load_state_dict(before)
    except (RuntimeError, ValueError) as error:
        raise ValueError(_OTHER_PLANS.format(file, str(error).splitlines()[0])) from error
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _moments(state: Mapping[str, Any]) -> set[str]:
    """Which moments an optimiser keeps, by the names of their settings: betas of AdamW, momentum of SGD."""
    return {"betas", "momentum"}.intersection(state["param_groups"][0])


def restore_schedule(scheduler: LambdaLR, optimizer: Optimizer, iteration: int) -> None:
    """Go on with the schedule at an iteration, with the learning rates of the present plans."""
    scheduler.last_epoch = iteration
    rates = [base * f(iteration) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of PyTorch's random generators, of the CPU and of the device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Let random generators go on from their states; see :func:`random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
