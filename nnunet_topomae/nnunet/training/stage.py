"""What pre-training and fine-tuning share: settings from the plans, AdamW, warm-up and cosine, the loop of steps."""

import gc
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from nnunet_topomae.files import lock, remove_leftovers
from nnunet_topomae.nnunet.data.preprocessed import JoinedCases, cases_in
from nnunet_topomae.nnunet.data.raw import check_description
from nnunet_topomae.nnunet.data.splits import read_fold
from nnunet_topomae.nnunet.data.stream import CASE, Batches, Stream, StreamSampler
from nnunet_topomae.nnunet.planning.plans import check_own_name, check_plans, read_config
from nnunet_topomae.nnunet.training import command
from nnunet_topomae.nnunet.training.cases import check_together, present
from nnunet_topomae.nnunet.training.checkpointing import (
    LATEST,
    OPTIMIZER,
    PREVIOUS,
    Saving,
    check_plans_stayed,
    checkpoints_in,
    random_state,
    restore_random_state,
    restore_schedule,
    restore_weights,
)
from nnunet_topomae.nnunet.training.determinism import deterministic_algorithms
from nnunet_topomae.nnunet.training.distribution import (
    distribute,
    in_any_process,
    place,
    seed_step,
    unwrap,
    world_size,
)
from nnunet_topomae.nnunet.training.schedule import learning_rate_factor
from nnunet_topomae.nnunet.training.skipping import FiniteSteps
from nnunet_topomae.nnunet.training.stopping import STOPPED, StopRequest
from nnunet_topomae.nnunet.weights.checkpoints import (
    STEPS_DONE,
    UNTRAINED,
    VERSIONS,
    WEIGHTS,
    most_trained,
    read_checkpoint,
)
from nnunet_topomae.nnunet.weights.handover import HandOver, hand_over
from nnunet_topomae.settings import StageConfig

_LR_REFERENCE_BATCH = 256
_PACKAGES = ("nnunet-topomae", "nnunetv2", "torch")

_ELSEWHERE = "a signal to another process"
_RANDOM_STATE = "random_state"  # key of checkpoints


class StepDone(dict):
    """Stands for a batch whose step was made before the run was interrupted: what that step returned."""


class StageTrainer(nnUNetTrainer, ABC):
    """An nnU-Net trainer that is configured by a block of its plans.

    Attributes:
        stop: whether the process was asked to stop.
        block: name of the block, set by subclasses.
        needs_labels: whether labels are read.
        keeps_heads: whether heads that pre-training has trained are loaded if they fit.
        config_class: dataclass that describes the block, set by subclasses.
        betas: coefficients of AdamW's running averages.
    """

    block: str
    current_epoch: int
    is_ddp: bool
    network: nn.Module
    needs_labels: ClassVar[bool] = True
    keeps_heads: ClassVar[bool] = False
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
        if not nnUNet_results.is_set():
            raise ValueError("nnUNet_results is not set; export it as the folder that results are written to")
        is_asked_to_go_on = bool(plans.get("continue_training"))  # --c; nnU-Net takes the key out
        self.config: Any = self.check_plans(plans, configuration)[self.block]
        folder = Path(nnUNet_preprocessed) / PlansManager(plans).dataset_name
        check_own_name(plans, folder)
        check_description(dataset_json, folder / "dataset.json")
        self.split = read_fold(folder, fold)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._goes_on = is_asked_to_go_on and bool(checkpoints_in(Path(self.output_folder)))  # --c may be a first start
        if self.is_ddp:
            place(self, device)
        command.register(self)
        self.num_epochs = self.config.num_epochs
        self.num_iterations_per_epoch = self.config.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.config.num_val_iterations_per_epoch
        scale = self.configuration_manager.batch_size / _LR_REFERENCE_BATCH if self.config.scale_lr else 1
        self.initial_lr = self.config.base_lr * scale
        self.weight_decay = self.config.weight_decay
        self.progress = tqdm(disable=True)
        self.stop = StopRequest()
        self._steps_done: list[dict] = []  # what the steps of the present epoch have returned
        self._validated = 0  # batches of the present epoch
        self._saving = Saving(self.config.save_every)
        self._lock: BinaryIO | None = None
        self._loaders: list[Batches] = []
        self._plot_progress = self.logger.plot_progress_png
        self.logger.plot_progress_png = self._try_to_plot_progress
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
        """Build network and optimiser from the seed of the plans, the same in all processes."""
        self._check_preprocessed()
        torch.manual_seed(self.config.seed)
        distributed, self.is_ddp = self.is_ddp, False  # nnU-Net would distribute among the GPUs of one machine only
        super().initialize()
        self.is_ddp = distributed
        if distributed:
            self.network = distribute(self.network, self.device, sync_batch_norm=self.config.sync_batch_norm)
            self.loss = self._build_loss()
        self._finite_steps = FiniteSteps(self.module, Path(self.output_folder), self.print_to_log_file)

    def _set_batch_size_and_oversample(self) -> None:
        """The share of the batch that this process makes; shares are equal, so that means over them are means over all.

        Raises:
            ValueError: if the batch cannot be divided.
        """
        whole, processes = self.configuration_manager.batch_size, world_size()
        if whole % processes:
            raise ValueError(
                f"batch_size {whole} in the plans cannot be divided among {processes} processes; use a number of "
                f"processes that divides it, or another batch_size"
            )
        self.batch_size = whole // processes

    @property
    def num_expected(self) -> int:
        """Number of cases that nnU-Net must have preprocessed."""
        return self.dataset_json["numTraining"]

    def _check_preprocessed(self) -> None:
        """See that all cases were preprocessed; a run that goes on may do without some, see :meth:`present`."""
        found = len(cases_in(Path(self.preprocessed_dataset_folder)))
        if found == 0 or (found < self.num_expected and not self._goes_on):
            raise ValueError(
                f"{self.preprocessed_dataset_folder} holds {found} preprocessed cases, but the dataset has "
                f"{self.dataset_json['numTraining']}; preprocess it with nnUNetv2_preprocess "
                f"-d {self.plans_manager.dataset_name} -plans_name {shlex.quote(self.plans_manager.plans_name)} "
                f"-c {self.configuration_name}, or correct numTraining in dataset.json beside that folder"
            )

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, without cases whose files were deleted since the run was begun; see :meth:`present`.

        Raises:
            ValueError: if there is no case left to train or to validate on.
        """
        training, validation = map(self.present, super().do_split())
        if not training or not validation:
            raise ValueError(
                f"fold {self.fold} has {len(training)} cases to train and {len(validation)} to validate on"
            )
        return training, validation

    def present(self, cases: Iterable[str]) -> list[str]:
        """Those of some cases that are in the preprocessed folder, see ``present`` in ``cases.py``."""
        folder = Path(self.preprocessed_dataset_folder)
        return present(list(cases), folder, goes_on=self._goes_on, log=self.print_to_log_file)

    def start_from(self, file: Path) -> None:
        """Load a file given with ``-pretrained_weights``; see ``register`` in ``command.py``.

        Raises:
            ValueError: if it is damaged, could execute code, or is of another network.
        """
        self.take_over(read_checkpoint(file), file)

    def take_over(self, checkpoint: dict[str, Any], file: Path) -> HandOver:
        """Load pre-trained weights, and report what became of every part of the network."""
        result = hand_over(checkpoint, self.module, file, with_heads=self.keeps_heads and UNTRAINED in checkpoint)
        self.print_to_log_file(f"Pre-trained weights: {file}\n{result.report(self.module)}")
        return result

    def run_training(self) -> None:
        """nnU-Net's training; what ends it names the case that it is about."""
        try:
            with self.stop.listening(), self._computing():
                super().run_training()
        except RuntimeError as error:  # PyTorch raises it wherever the program is when a loader's process dies
            explained = (loader.explained(error) for loader in self._loaders)
            raise next((better for better in explained if better is not error), error) from error

    def _computing(self) -> AbstractContextManager:
        """On GPUs deterministically, if the plans ask for it; a CPU always computes so."""
        on_gpu = self.device.type == "cuda"
        return deterministic_algorithms() if self.config.deterministic and on_gpu else nullcontext()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate with the final checkpoint; a signal ends that, and ``--c`` begins it again."""
        if self.is_ddp:
            for buffer in self.module.buffers():  # which differ where BatchNorm is not synchronised
                dist.broadcast(buffer, 0)
        with self.stop.listening():
            self.validate(save_probabilities)

    def validate(self, save_probabilities: bool) -> None:
        """nnU-Net's validation, of whole cases."""
        super().perform_actual_validation(save_probabilities)

    def on_train_start(self) -> None:
        """Lock the fold, make sure that no case holds NaN or inf, then start as nnU-Net does."""
        if self.local_rank == 0:
            folder = Path(self.output_folder)
            self._lock = lock(folder / ".lock", lambda said: self.print_to_log_file(f"WARNING: {said}"))
            for file in remove_leftovers(folder):
                self.print_to_log_file(f"Removed {file}, which an interrupted run had not finished writing")
        if not self.was_initialized:
            self.initialize()
        self._check_cases()
        self.prepare()
        super().on_train_start()
        self._saving.start()
        self.stop.training = True

    def _check_cases(self) -> None:
        """Make sure that no case holds NaN or inf; each process reads its share of those that were not read before."""
        if self.is_ddp and self.local_rank > 0:
            dist.barrier()  # the first process writes the split if there is none yet
        cases = JoinedCases(*self.get_tr_and_val_datasets())
        if self.is_ddp and self.local_rank == 0:
            dist.barrier()
        folder, log = Path(self.preprocessed_dataset_folder_base), self.print_to_log_file
        check_together(cases, folder, self.config.timeout, with_labels=self.needs_labels, log=log)

    def on_train_end(self) -> None:
        """Write the final checkpoint, as nnU-Net does, end the data loaders, and remove what is for going on."""
        super().on_train_end()
        self.dataloader_train = self.dataloader_val = None
        self._loaders.clear()
        if self.local_rank == 0:
            (Path(self.output_folder) / PREVIOUS).unlink(missing_ok=True)
        if in_any_process(bool(self.stop.name), self.device):
            self._leave(f"{self.stop.name or _ELSEWHERE} received; the training is complete, --c validates")

    def batches(
        self, stream: Stream, sampler: StreamSampler, done: Sequence[dict] = (), *, validation: bool = False
    ) -> Iterator[dict]:
        """Batches of a stream; before them, what was returned by the steps that an interrupted epoch had made."""
        loader = Batches(
            stream,
            sampler,
            self.batch_size,
            validation=validation,
            timeout=self.config.timeout,
            pin_memory=self.device.type == "cuda",
        )
        self._loaders.append(loader)
        return chain(map(StepDone, list(done)), loader)

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

    def train_step(self, batch: dict) -> dict:
        """One training step; a step whose loss is NaN or inf is not made, but noted.

        Returns:
            What the step returns; nothing for a step that was not made.

        Raises:
            ValueError: after ten such steps in a row.
        """
        if isinstance(batch, StepDone):
            self.progress.update()
            return dict(batch)
        if self.is_ddp:
            seed_step(self.config.seed, self.lr_scheduler.last_epoch, self.local_rank)
        where = {"epoch": self.current_epoch, "step": len(self._steps_done), "cases": batch[CASE]}
        output = self._finite_steps.make(partial(self.step, batch), **where)
        self.on_iteration_end()
        self._steps_done.append(output)
        self.stop_if_asked()
        return output

    @abstractmethod
    def step(self, batch: dict) -> dict:
        """One step of the optimiser.

        Raises:
            NotFiniteError: if the loss is NaN or inf, before anything is changed.
        """

    def on_validation_epoch_start(self) -> None:
        """Start, and count the batches of the epoch from 0."""
        super().on_validation_epoch_start()
        self._validated = 0

    def validation_step(self, batch: dict) -> dict:
        """Validate on one batch; one whose loss is NaN or inf does not count, but is noted.

        Returns:
            What :meth:`validate_batch` returns; nothing for a batch that does not count.
        """
        where = {"epoch": self.current_epoch, "batch": self._validated, "cases": batch[CASE]}
        output = self._finite_steps.validate(partial(self.validate_batch, batch), **where)
        self._validated += 1
        self.stop_if_asked()
        return output

    @abstractmethod
    def validate_batch(self, batch: dict) -> dict:
        """The loss of a batch, and what else is logged.

        Raises:
            NotFiniteError: if the loss is NaN or inf.
        """

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Log the means over the batches that count.

        Raises:
            ValueError: if there is none.
        """
        counted = [output for output in val_outputs if output]
        if not counted:
            raise ValueError(
                f"epoch {self.current_epoch}: the loss of every batch of validation is NaN or inf, see "
                f"{self._finite_steps.file}{self.diverged}"
            )
        self.log_validation(counted)

    @abstractmethod
    def log_validation(self, outputs: list[dict]) -> None:
        """Log an epoch of validation.

        Args:
            outputs: what :meth:`validate_batch` returned; at least one.
        """

    @property
    def diverged(self) -> str:
        """What to do where a loss is NaN or inf, the end of a sentence."""
        return f"; if the images are sound, training has diverged: lower {self.block}.base_lr"

    def on_iteration_end(self) -> None:
        """Advance learning rate and progress bar."""
        self.lr_scheduler.step()
        self.progress.update()

    def stop_if_asked(self) -> None:
        """After a step, write a checkpoint and end the process if a signal asked for that, or asked another one."""
        if self.stop.training and in_any_process(bool(self.stop.name), self.device):
            self.save_checkpoint(str(Path(self.output_folder) / LATEST))
            self._leave(f"{self.stop.name or _ELSEWHERE} received; go on with --c")

    def _leave(self, said: str) -> None:
        self.print_to_log_file(f"Stopped: {said} (exit status {STOPPED})")
        sys.exit(STOPPED)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Close the progress bar, then log the means over the steps that were made."""
        self.progress.close()
        self.log_training([output for output in train_outputs if output] or [self.no_output()])

    @abstractmethod
    def log_training(self, outputs: list[dict]) -> None:
        """Log an epoch of training.

        Args:
            outputs: what the steps returned; at least one.
        """

    @abstractmethod
    def no_output(self) -> dict:
        """What stands for the steps of an epoch of which none was made."""

    def on_epoch_end(self) -> None:
        """Do what nnU-Net does, and decide whether that writes ``checkpoint_latest.pth``."""
        self.plan_saving()
        super().on_epoch_end()
        self.end_epoch()

    def plan_saving(self) -> None:
        """At the end of an epoch, set ``save_every``: that of the plans, or whether a checkpoint is due now."""
        self._steps_done = []
        self.save_every = self._saving.epochs_between(self.num_epochs)

    def end_epoch(self) -> None:
        """After an epoch and its checkpoints, stop if that was asked for while it was validated."""
        if self.current_epoch < self.num_epochs:
            self.current_epoch -= 1  # checkpoints are written by nnU-Net before it counts the epoch
            self.stop_if_asked()
            self.current_epoch += 1

    def _try_to_plot_progress(self, output_folder: str) -> None:
        """Draw ``progress.png``; a training does not end because that cannot be written."""
        try:
            self._plot_progress(output_folder)
        except OSError as error:
            self.print_to_log_file(f"WARNING: {error}")
        gc.collect()  # figures refer to themselves; nnU-Net's takes 65 MB, and Python would keep those of many epochs

    @property
    def module(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        return unwrap(self.network)

    def checkpoint(self) -> dict[str, Any]:
        """Everything that nnU-Net saves, versions of packages, and the state of schedule and random generators.

        Within an epoch it holds what the steps of that epoch have returned.
        """
        return {
            WEIGHTS: self.module.state_dict(),
            OPTIMIZER: self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + (not self._steps_done),
            STEPS_DONE: self._steps_done,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            VERSIONS: {name: version(name) for name in _PACKAGES},
            "lr_scheduler_state": {"last_epoch": self.lr_scheduler.last_epoch},
            _RANDOM_STATE: random_state(self.device),
        }

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint that holds tensors and plain Python types only.

        Raises:
            ValueError: if weights are NaN or inf.
            OSError: if the disk is full, or the folder must not be written to; older checkpoints stay as they are.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        self._saving.write(self.checkpoint(), Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue a run of this trainer exactly where its checkpoint was written.

        With ``--c``, nnU-Net names the first checkpoint that it finds; the most trained one that can be read is taken.

        Raises:
            ValueError: if the file is damaged, or was written with another network or by another trainer.
        """
        file = Path(filename_or_checkpoint)
        if self._goes_on and self.current_epoch == 0:
            file, checkpoint, problems = most_trained(checkpoints_in(file.parent), self.device)
            for problem in problems:
                self.print_to_log_file(f"WARNING: {problem}")
            self.print_to_log_file(f"Going on from {file}")
        else:
            checkpoint = read_checkpoint(file, self.device)
        if _RANDOM_STATE not in checkpoint:
            raise ValueError(f"{file} was not written by {type(self).__name__}; delete it to start a new training")
        self._goes_on = True  # with --val, too, cases may have been deleted since
        if not self.was_initialized:
            self.initialize()
        check_plans_stayed(checkpoint["init_args"], self.my_init_kwargs, self.block, file)
        self.before_restoring(checkpoint)
        restore_weights(checkpoint, self.module, self.optimizer, file)
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.current_epoch = checkpoint["current_epoch"]
        self._steps_done = [
            {name: np.asarray(value, np.float32) for name, value in step.items()}
            for step in checkpoint.get(STEPS_DONE, ())
        ]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        restore_schedule(self.lr_scheduler, self.optimizer, checkpoint["lr_scheduler_state"]["last_epoch"])
        restore_random_state(checkpoint[_RANDOM_STATE], self.device)

    def before_restoring(self, checkpoint: dict[str, Any]) -> None:
        """What a stage has to know of a checkpoint before optimiser and schedule are restored from it."""


command.answer_in_one_sentence(StageTrainer)
