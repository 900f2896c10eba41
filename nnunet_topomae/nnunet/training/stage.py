"""What pre-training and fine-tuning share: settings from the plans, AdamW with warm-up and cosine, exact resuming."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from nnunet_topomae.nnunet.data.preprocessed import JoinedCases
from nnunet_topomae.nnunet.data.splits import read_fold
from nnunet_topomae.nnunet.data.stream import check_finite
from nnunet_topomae.nnunet.planning.plans import check_plans, read_config
from nnunet_topomae.nnunet.training.schedule import learning_rate_factor
from nnunet_topomae.nnunet.weights.checkpoints import VERSIONS, WEIGHTS, read_checkpoint, write_checkpoint
from nnunet_topomae.nnunet.weights.handover import check_fits
from nnunet_topomae.settings import StageConfig

_LR_REFERENCE_BATCH = 256
_PACKAGES = ("nnunet-topomae", "nnunetv2", "torch")

_MUST_STAY = ("architecture", "patch_size", "normalization_schemes", "use_mask_for_norm")  # while a run goes on
_OTHER_PLANS = (
    "{} was written with other plans than the present ones, so the run cannot be continued; restore the plans or "
    "delete the folder: {}"
)


class StageTrainer(nnUNetTrainer, ABC):
    """An nnU-Net trainer that is configured by a block of its plans.

    Attributes:
        block: name of the block, set by subclasses.
        config_class: dataclass that describes the block, set by subclasses.
        betas: coefficients of AdamW's running averages.
    """

    block: str
    config_class: ClassVar[type[StageConfig]]
    betas = (0.9, 0.999)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature, which it stores by name
    ):
        self.config: Any = self.check_plans(plans, configuration)[self.block]
        self.split = read_fold(Path(nnUNet_preprocessed) / PlansManager(plans).dataset_name, fold)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.config.num_epochs
        self.num_iterations_per_epoch = self.config.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.config.num_val_iterations_per_epoch
        scale = self.configuration_manager.batch_size / _LR_REFERENCE_BATCH if self.config.scale_lr else 1
        self.initial_lr = self.config.base_lr * scale
        self.weight_decay = self.config.weight_decay
        self.progress = tqdm(disable=True)
        if self.config.warmup_epochs >= self.num_epochs:
            self.print_to_log_file(
                f"WARNING: {self.block}.warmup_epochs is {self.config.warmup_epochs:g}, num_epochs {self.num_epochs}, "
                f"so the learning rate will not reach its full value"
            )

    @classmethod
    def check_plans(cls, plans: dict[str, Any], configuration: str) -> dict[str, Any]:
        """Read the settings, and refuse plans that this trainer cannot train.

        Returns:
            The settings by the name of their block.

        Raises:
            ValueError: see :func:`nnunet_topomae.nnunet.planning.plans.check_plans`.
        """
        return check_plans(plans, configuration, cls.blocks(), lambda c, settings: cls.build(c, settings[cls.block], 1))

    @classmethod
    def blocks(cls) -> dict[str, type]:
        """Names and classes of the blocks of the plans that are checked before anything starts."""
        return {cls.block: cls.config_class}

    @classmethod
    @abstractmethod
    def build(
        cls,
        configuration: ConfigurationManager,
        config: Any,
        num_channels: int,
        num_classes: int = 1,
        *,
        deep_supervision: bool = True,
    ) -> nn.Module:
        """Make what is trained, with initial weights.

        Args:
            configuration: a configuration of the plans.
            config: the settings of the stage.
            num_channels: channels of the images.
            num_classes: classes of the segmentation.
            deep_supervision: whether the network gives outputs of several resolutions.
        """

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Make what nnU-Net trains; see :meth:`build`."""
        return cls.build(
            configuration_manager,
            read_config(configuration_manager, cls.block, cls.config_class),
            num_input_channels,
            num_output_channels,
            deep_supervision=enable_deep_supervision,
        )

    def initialize(self) -> None:
        """Build network and optimiser from the seed of the plans.

        A file given with ``-pretrained_weights`` is checked before nnU-Net loads it.
        """
        torch.manual_seed(self.config.seed + self.local_rank)
        super().initialize()
        file = requested_weights()
        if file is not None:
            check_fits(read_checkpoint(file), self.module, file)

    def on_train_start(self) -> None:
        """Make sure that no case holds NaN or inf, then start as nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        check_finite(JoinedCases(*self.get_tr_and_val_datasets()), show_progress=self.local_rank == 0)
        self.prepare()
        super().on_train_start()

    def prepare(self) -> None:
        """What is done after the checks and before nnU-Net starts the training and its data loaders."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, each with its own learning rate and weight decay."""

    def configure_optimizers(self) -> tuple[Optimizer, LambdaLR]:
        """An optimiser whose learning rates change in every iteration."""
        optimizer = self.make_optimizer(self.parameter_groups())
        return optimizer, LambdaLR(optimizer, [self.schedule(group) for group in optimizer.param_groups])

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """AdamW."""
        return AdamW(groups, lr=self.initial_lr, weight_decay=self.weight_decay, betas=self.betas)

    def schedule(self, group: dict[str, Any]) -> Callable[[int], float]:
        """How the learning rate of a group of parameters changes: it rises linearly, then falls to 0 along a cosine.

        Returns:
            The factor on the learning rate, by iteration.
        """
        per_epoch = self.num_iterations_per_epoch
        warmup, total = self.config.warmup_epochs * per_epoch, self.num_epochs * per_epoch
        return lambda iteration: learning_rate_factor(iteration, warmup, total)

    def on_train_epoch_start(self) -> None:
        """What nnU-Net does, but the learning rate is not changed here, and terminals show a progress bar."""
        self.network.train()
        learning_rate = max(self.lr_scheduler.get_last_lr())
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        self.print_to_log_file(f"Current learning rate: {learning_rate:.3g}")
        self.logger.log("lrs", learning_rate, self.current_epoch)
        hide = None if self.local_rank == 0 else True  # None: shown on terminals only
        self.progress = tqdm(
            total=self.num_iterations_per_epoch, desc=f"Epoch {self.current_epoch}", leave=False, disable=hide
        )

    def on_iteration_end(self) -> None:
        """Advance learning rate and progress bar."""
        self.lr_scheduler.step()
        self.progress.update()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Close the progress bar, then do what nnU-Net does."""
        self.progress.close()
        super().on_train_epoch_end(train_outputs)

    @property
    def module(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        return unwrap(self.network)

    def checkpoint(self) -> dict[str, Any]:
        """Everything that nnU-Net saves, versions of packages, and the state of schedule and random generators."""
        return {
            WEIGHTS: self.module.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            VERSIONS: {name: version(name) for name in _PACKAGES},
            "lr_scheduler_state": {"last_epoch": self.lr_scheduler.last_epoch},
            "random_state": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint that holds tensors and plain Python types only."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        write_checkpoint(self.checkpoint(), Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue a run of this trainer exactly where its checkpoint was written.

        Raises:
            ValueError: if the file is damaged, or was written with another network or by another trainer.
        """
        file = Path(filename_or_checkpoint)
        checkpoint = read_checkpoint(file, self.device)
        if "random_state" not in checkpoint:
            raise ValueError(f"{file} was not written by {type(self).__name__}; delete it to start a new training")
        if not self.was_initialized:
            self.initialize()
        self._check_written_with_these_plans(checkpoint, file)
        self.before_restoring(checkpoint)
        try:
            self.module.load_state_dict(checkpoint[WEIGHTS])
            self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(_OTHER_PLANS.format(file, str(error).splitlines()[0])) from error
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.my_init_kwargs = checkpoint["init_args"]
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        self._restore_schedule(checkpoint["lr_scheduler_state"]["last_epoch"])
        self._restore_random_state(checkpoint["random_state"])

    def before_restoring(self, checkpoint: dict[str, Any]) -> None:
        """What a stage has to know of a checkpoint before optimiser and schedule are restored from it."""

    def _check_written_with_these_plans(self, checkpoint: dict[str, Any], file: Path) -> None:
        """Refuse what tensors of the right shape cannot tell: another normalisation, other positions."""
        written = checkpoint["init_args"]
        before = PlansManager(written["plans"]).get_configuration(written["configuration"]).configuration
        for key in _MUST_STAY:
            if before[key] != self.configuration_manager.configuration[key]:
                raise ValueError(_OTHER_PLANS.format(file, f"{key} was {before[key]}"))

    def _restore_schedule(self, iteration: int) -> None:
        """Go on with the schedule at an iteration, with the learning rates of the present plans."""
        self.lr_scheduler.last_epoch = iteration
        rates = [
            base * f(iteration)
            for base, f in zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.lr_scheduler._last_lr = rates

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"].cpu())
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


def unwrap(network: nn.Module) -> Any:
    """The module inside DDP's and torch.compile's wrappers."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def requested_weights() -> Path | None:
    """The file after ``-pretrained_weights`` on the command line, which nnU-Net does not pass on to trainers."""
    if "-pretrained_weights" not in sys.argv[:-1]:
        return None
    return Path(sys.argv[sys.argv.index("-pretrained_weights") + 1])
