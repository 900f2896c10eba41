"""Fine-tuning of a pre-trained network: nnU-Net's training from other weights, with another optimiser and schedule."""

import inspect
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar

import numpy as np
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nnunet_topomae.networks.traits import encoder_parameters, no_weight_decay
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.splits import read_splits
from nnunet_topomae.nnunet.data.stream import CASE, AugmentedItems, StreamSampler, random_state
from nnunet_topomae.nnunet.planning.plans import FINETUNING, build_network
from nnunet_topomae.nnunet.training.checkpointing import FINAL
from nnunet_topomae.nnunet.training.distribution import world_size
from nnunet_topomae.nnunet.training.pretraining import external_folders, find_pretrainer, named_pretrainers
from nnunet_topomae.nnunet.training.schedule import learning_rate_factor
from nnunet_topomae.nnunet.training.skipping import NotFiniteError, agree
from nnunet_topomae.nnunet.training.stage import StageTrainer
from nnunet_topomae.nnunet.weights.checkpoints import FINETUNED_BY, cases_seen, drawn_from, is_pretrained
from nnunet_topomae.nnunet.weights.handover import HandOver
from nnunet_topomae.settings import FinetuningConfig
from nnunet_topomae.settings.recipes import recipe

_TRAINING, _VALIDATION = 0, 1  # tell the streams of batches of one seed apart
_NUM_WORKERS = "nnUNet_n_proc_DA"  # nnU-Net's environment variable
_FRESH = "fresh_parameters"  # key of checkpoints, and of the optimiser's groups
_OF_SAME_IMAGES = (
    "There is no pre-training of fold {}; starting from that of another fold, which drew from the same images"
)
_OF_ALL = (
    "WARNING: there is no pre-training of fold {}; starting from fold all, which has seen the images (not the labels) "
    "of this fold's validation cases, so their Dice may be a little too good; pre-train this fold to avoid that"
)
_SEEN = (
    "WARNING: {} has seen images (not labels) of cases that this fold holds out, such as {}, so their Dice may be a "
    "little too good; pre-train this fold to avoid that"
)


class FinetuneTrainer(StageTrainer):
    """Starts from the checkpoint that pre-training left for the same dataset, plans, configuration and fold.

    Attributes:
        pretrainers: names of the trainers whose checkpoints can be used; None for all checkpoints of pre-training in
            the folders of results beside that of this trainer.
        starts_from_all: whether the checkpoint found is that of fold ``all``, which is warned of once.
    """

    block = FINETUNING
    config_class = FinetuningConfig
    starts_from_all = False
    fresh: Sequence[str] = ()  # names of the tensors that pre-training has not trained
    pretrainers: ClassVar[Sequence[str] | None] = None

    @classmethod
    def build(
        cls,
        configuration: ConfigurationManager,
        config: FinetuningConfig,
        num_channels: int,
        num_classes: int = 1,
        *,
        deep_supervision: bool = True,
    ) -> nn.Module:
        """Make the network of the plans, with stochastic depth if it has any; see :meth:`StageTrainer.build`.

        An encoder that is to stay as it was pre-trained has no gradients from the start, as DDP demands.
        """
        network_class: Any = locate(configuration.network_arch_class_name)
        has_drop_path = network_class is not None and "drop_path" in inspect.signature(network_class).parameters
        overrides = {"drop_path": config.drop_path} if has_drop_path else {}
        network = build_network(
            configuration, num_channels, num_classes, deep_supervision=deep_supervision, **overrides
        )
        for name in _frozen(network, config):
            network.get_parameter(name).requires_grad_(False)
        return network

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups whose learning rate falls by the factor ``layer_decay`` from layer to layer towards the input.

        A network says which layers it has by a method ``group_matcher``, as in timm; parts that are in none of them
        have the full learning rate. In a network without this method, all parts have it. Where some parts are frozen at
        first, or the encoder learns more slowly, these have groups of their own.
        """
        exempt = no_weight_decay(self.module)
        if hasattr(self.module, "group_matcher"):
            groups = param_groups_layer_decay(
                self.module, self.weight_decay, exempt, layer_decay=self.config.layer_decay
            )
        else:
            groups = param_groups_weight_decay(self.module, self.weight_decay, exempt)
        fresh = set(self.fresh) if self.config.freeze_epochs else set()
        slower = _slower(self.module, self.config)
        kinds = {id(p): (name in fresh, name in slower) for name, p in self.module.named_parameters()}
        return [
            {
                "params": members,
                "weight_decay": g["weight_decay"],
                "lr": self.initial_lr * g.get("lr_scale", 1) * (self.config.encoder_lr if is_slower else 1),
                _FRESH: is_fresh,
            }
            for g in groups
            for is_fresh, is_slower in sorted(set(kinds.values()))
            if (members := [p for p in g["params"] if kinds[id(p)] == (is_fresh, is_slower)])
        ]

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimiser that the plans name."""
        if self.config.optimizer == "sgd":
            return SGD(groups, self.initial_lr, self.config.momentum, weight_decay=self.weight_decay, nesterov=True)
        return AdamW(groups, self.initial_lr, self.betas, self.config.eps, weight_decay=self.weight_decay)

    def schedule(self, group: dict[str, Any]) -> Callable[[int], float]:
        """The schedule that the plans name; see :meth:`StageTrainer.schedule`.

        A frozen group has a learning rate of 0, not ``requires_grad`` of False, which DDP allows from the start to the
        end only.
        """
        config, per_epoch = self.config, self.num_iterations_per_epoch
        steps_per_epoch, every = (1, per_epoch) if config.schedule_step == "epoch" else (per_epoch, 1)
        freeze, warmup, total = (
            epochs * steps_per_epoch for epochs in (config.freeze_epochs, config.warmup_epochs, self.num_epochs)
        )

        def factor(iteration: int) -> float:
            step = iteration // every
            if step < freeze:
                return group[_FRESH] and learning_rate_factor(step, freeze / 2, freeze, config.schedule)
            return learning_rate_factor(step - freeze, warmup, total - freeze, config.schedule)

        return factor

    def on_train_start(self) -> None:
        """Load the pre-trained weights, unless nnU-Net has loaded weights already, then start."""
        if not self.was_initialized:
            self.initialize()
            self.load_pretrained_weights()
        super().on_train_start()

    def initialize(self) -> None:
        """As every stage does; at first everything is fresh."""
        super().initialize()
        self._print_recipe()
        self._set_fresh(list(self.module.state_dict()))

    def _print_recipe(self) -> None:
        """Say which recipe is followed, and which of its keys are overruled by the plans."""
        block = self.configuration_manager.configuration.get(FINETUNING, {})
        overruled = [key for key in recipe(block) if key in block]
        exceptions = f", except for what the plans say themselves: {', '.join(overruled)}" if overruled else ""
        self.print_to_log_file(f"Fine-tuning recipe: {self.config.recipe}{exceptions}")

    def load_pretrained_weights(self) -> None:
        """Load the pre-trained checkpoint and report what became of every part of the network.

        Raises:
            ValueError: if there is none; names the command that makes it.
        """
        if self.config.from_scratch:
            self.print_to_log_file("Training from scratch, as finetuning.from_scratch in the plans asks for")
            if self.config.encoder_lr != 1:
                self.print_to_log_file(
                    f"finetuning.encoder_lr of {self.config.encoder_lr:g} is not used from scratch: the encoder learns "
                    f"at the rate of all other parts"
                )
            return
        self.start_from(self.find_pretrained_checkpoint())

    def take_over(self, checkpoint: dict[str, Any], file: Path) -> HandOver:
        """As every stage does; what the checkpoint does not bring is fresh, what it should not know is warned of.

        Raises:
            ValueError: if the plans ask for a training from scratch; or see :meth:`StageTrainer.start_from`.
        """
        if self.config.from_scratch:
            raise ValueError(
                f"finetuning.from_scratch is true in {self.plans_manager.plans_name}.json, so {file} is not to be "
                f"loaded; set it to false, or leave -pretrained_weights out"
            )
        result = super().take_over(checkpoint, file)
        seen = cases_seen(checkpoint, self.plans_manager.dataset_name)
        leaked = seen.intersection([*self.split.val, *self.split.test])
        if leaked and not self.starts_from_all:
            self.print_to_log_file(_SEEN.format(file, min(leaked)))
        self._check_frozen(result.fresh, file)
        self._set_fresh(result.fresh)
        return result

    def _check_frozen(self, fresh: Sequence[str], file: Path) -> None:
        """An encoder that does not learn must have been pre-trained."""
        untrained = sorted(_frozen(self.module, self.config).intersection(fresh))
        if untrained:
            raise ValueError(
                f"{file} has not trained the whole encoder, for example not {untrained[0]}, but finetuning.encoder_lr "
                f"is 0 in {self.plans_manager.plans_name}.json or by its recipe, so it would stay random; set "
                f"finetuning.encoder_lr above 0, or pre-train the whole encoder"
            )

    def _set_fresh(self, names: list[str]) -> None:
        """Make the optimiser anew for the tensors that are fresh, all of them from scratch."""
        self.fresh = names
        if self.config.freeze_epochs:
            self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def before_restoring(self, checkpoint: dict[str, Any]) -> None:
        """The optimiser must have the groups that it had when the checkpoint was written."""
        self._set_fresh(checkpoint.get(_FRESH, []))

    def find_pretrained_checkpoint(self) -> Path:
        """The checkpoint of this fold, of a fold with the same images, or of fold ``all``: the first that there is.

        Fold ``all`` has seen the validation images.

        Raises:
            ValueError: if there is none, or there are several; names the command that makes one.
        """
        own = self._checkpoints(self.fold)
        same = {} if own else self._checkpoints_of_same_images()
        found = own or same or self._checkpoints("all")
        if len(found) > 1:
            raise ValueError(
                f"there are pre-trained checkpoints of {' and '.join(found)}; set finetuning.pretrainer in "
                f"{self.plans_manager.plans_name}.json to one of them"
            )
        if not found:
            raise ValueError(self._how_to_pretrain())
        (file,) = found.values()
        if not own:
            self.starts_from_all = not same
            self.print_to_log_file((_OF_SAME_IMAGES if same else _OF_ALL).format(self.fold))
        return file

    def _checkpoints_of_same_images(self) -> dict[str, Path]:
        """Pre-trained checkpoints of the first other fold that drew from the images of this one and no others."""
        folder = Path(self.preprocessed_dataset_folder_base)
        dataset = PlannedDataset(folder, self.plans_manager, self.dataset_json)
        images = self.split.images.union(dataset.unlabelled_cases(self.configuration_name))
        for fold in range(len(read_splits(folder)) if self.split.images else 0):
            files = self._checkpoints(fold)
            if same := {name: file for name, file in files.items() if drawn_from(file) == images}:
                return same
        return {}

    def _wanted(self) -> Sequence[str] | None:
        """Trainers whose checkpoints can be taken; None for all."""
        return [self.config.pretrainer] if self.config.pretrainer else self.pretrainers

    def _checkpoints(self, fold: int | str) -> dict[str, Path]:
        """Pre-trained checkpoints of a fold, by the name of their trainer."""
        plans, configuration, wanted = self.plans_manager, self.configuration_name, self._wanted()
        siblings = Path(self.output_folder_base).parent.glob(f"*__{plans.plans_name}__{configuration}")
        names = wanted or sorted(folder.name.split("__")[0] for folder in siblings)
        folders = {n: get_output_folder(plans.dataset_name, n, plans.plans_name, configuration, fold) for n in names}
        files = {name: Path(folder, FINAL) for name, folder in folders.items()}
        return {name: f for name, f in files.items() if f.is_file() and (wanted or self._is_pretrained(f, name))}

    def _is_pretrained(self, file: Path, trainer: str) -> bool:
        """Whether a checkpoint was left by pre-training; a damaged one of a trainer that does not pre-train was not.

        Raises:
            ValueError: if that of a pre-training trainer is damaged.
        """
        try:
            return is_pretrained(file)
        except ValueError as error:
            if find_pretrainer(trainer, external_folders()):
                raise
            self.print_to_log_file(f"WARNING: {error}; passed over, as {trainer} is no pre-training trainer")
            return False

    def _how_to_pretrain(self) -> str:
        command = (
            f"nnUNetv2_train {self.plans_manager.dataset_name} {self.configuration_name} {self.fold} "
            f"-p {shlex.quote(self.plans_manager.plans_name)} -tr"
        )
        names = self._wanted() or list(filter(self._can_pretrain, named_pretrainers(external_folders())))
        return (
            f"no pre-trained checkpoint of fold {self.fold}, of a fold with the same images, or of fold all beside "
            f"{self.output_folder_base}. Pre-train first (add --c to continue an interrupted run):\n\n"
            + "".join(f"    {command} {name}\n" for name in names)
            + "\nor pass -pretrained_weights FILE, or set finetuning.from_scratch to true in "
            f"{self.plans_manager.plans_name}.json to train without"
        )

    def _can_pretrain(self, name: str) -> bool:
        """Whether a pre-training trainer takes the plans."""
        trainer = find_pretrainer(name, external_folders())
        if trainer is None:
            return False
        try:
            trainer.check_plans(self.plans_manager.plans, self.configuration_name)
        except ValueError:
            return False
        return True

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        """nnU-Net's loaders, but what is drawn as item n depends on the seed and n alone."""
        with random_state((self.config.seed,)), _in_this_process():
            training, validation = super().get_dataloaders()
        whole, done = self.configuration_manager.batch_size, self._steps_done
        seen = (self.current_epoch * self.num_iterations_per_epoch + len(done)) * whole
        validated = self.current_epoch * self.num_val_iterations_per_epoch * whole
        world = {"rank": self.local_rank, "world_size": world_size()}
        drawn, fixed = (
            AugmentedItems(loader.data_loader, whole, (self.config.seed, number))
            for loader, number in ((training, _TRAINING), (validation, _VALIDATION))
        )
        return (
            self.batches(drawn, StreamSampler(seen, **world), done),
            self.batches(fixed, StreamSampler(validated, **world), validation=True),
        )

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss, which is looked at before anything follows from it."""
        loss = super()._build_loss()
        loss.register_forward_hook(lambda _, __, value: self.check_loss(value))
        return loss

    def step(self, batch: dict) -> dict:
        """nnU-Net's training step."""
        self._cases = batch[CASE]
        return super(StageTrainer, self).train_step(batch)

    def validate_batch(self, batch: dict) -> dict:
        """nnU-Net's validation step."""
        self._cases = batch[CASE]
        return super(StageTrainer, self).validation_step(batch)

    def check_loss(self, loss: Tensor) -> None:
        """Look at a loss before anything follows from it.

        Raises:
            NotFiniteError: names the cases of the batch if it is NaN or inf.
        """
        value = loss.item()
        said = f"epoch {self.current_epoch}, cases {', '.join(self._cases)}: the loss is {value}{self.diverged}"
        agree(None if math.isfinite(value) else NotFiniteError(said, {"total": value}), self.device)

    def log_training(self, outputs: list[dict]) -> None:
        """Log as nnU-Net does."""
        super(StageTrainer, self).on_train_epoch_end(outputs)

    def log_validation(self, outputs: list[dict]) -> None:
        """Log as nnU-Net does."""
        super(StageTrainer, self).on_validation_epoch_end(outputs)

    def no_output(self) -> dict:
        """A loss that is unknown."""
        return {"loss": np.float32(np.nan)}

    def checkpoint(self) -> dict[str, Any]:
        """Names nnU-Net's own trainer, so that ``nnUNetv2_predict`` works where ``nnUNet_extTrainer`` is not set.

        Prediction needs this package all the same, as the plans name its network.
        """
        name = nnUNetTrainer.__name__
        own = {"trainer_name": name, FINETUNED_BY: type(self).__name__, _FRESH: self.fresh}
        return {**super().checkpoint(), **own}


def _slower(network: nn.Module, config: FinetuningConfig) -> set[str]:
    """Names of the parameters whose learning rate is multiplied by ``encoder_lr``."""
    if config.from_scratch or config.encoder_lr == 1:
        return set()
    try:
        return encoder_parameters(network)
    except ValueError as error:
        raise ValueError(
            f"finetuning.encoder_lr is {config.encoder_lr:g}, but {error}, or set encoder_lr to 1"
        ) from error


def _frozen(network: nn.Module, config: FinetuningConfig) -> set[str]:
    """Names of the parameters that stay as they were pre-trained."""
    return _slower(network, config) if config.encoder_lr == 0 else set()


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Let nnU-Net make its loaders without processes of their own, through its own environment variable."""
    before = os.environ.get(_NUM_WORKERS)
    os.environ[_NUM_WORKERS] = "0"
    try:
        yield
    finally:
        del os.environ[_NUM_WORKERS]
        if before is not None:
            os.environ[_NUM_WORKERS] = before
