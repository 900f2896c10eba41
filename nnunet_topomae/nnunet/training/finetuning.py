"""Fine-tuning of a pre-trained network: nnU-Net's training from other weights, with another optimiser and schedule."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from nnunet_topomae.networks.traits import no_weight_decay
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.splits import read_splits
from nnunet_topomae.nnunet.planning.plans import FINETUNING, build_network
from nnunet_topomae.nnunet.training.pretraining import external_folders, named_pretrainers
from nnunet_topomae.nnunet.training.stage import StageTrainer
from nnunet_topomae.nnunet.weights.checkpoints import drawn_from, is_pretrained, read_checkpoint
from nnunet_topomae.nnunet.weights.handover import hand_over
from nnunet_topomae.settings import FinetuningConfig

_PRETRAINED = "checkpoint_final.pth"
_OF_SAME_IMAGES = (
    "There is no pre-training of fold {}; starting from that of another fold, which drew from the same images"
)
_OF_ALL = (
    "WARNING: there is no pre-training of fold {}; starting from fold all, which has seen the images (not the labels) "
    "of this fold's validation cases, and of test cases if there are any"
)
_SEEN = "WARNING: {} has seen images (not labels) of cases that this fold now holds out, such as {}; pre-train again"


class FinetuneTrainer(StageTrainer):
    """Starts from the checkpoint that pre-training left for the same dataset, plans, configuration and fold.

    Attributes:
        pretrainers: names of the trainers whose checkpoints can be used; None for all pre-training trainers in the
            folders of ``nnUNet_extTrainer``.
    """

    block = FINETUNING
    config_class = FinetuningConfig
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
        """Make the network of the plans, with stochastic depth if it has any; see :meth:`StageTrainer.build`."""
        network_class: Any = locate(configuration.network_arch_class_name)
        has_drop_path = network_class is not None and "drop_path" in inspect.signature(network_class).parameters
        overrides = {"drop_path": config.drop_path} if has_drop_path else {}
        return build_network(configuration, num_channels, num_classes, deep_supervision=deep_supervision, **overrides)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups whose learning rate falls by the factor ``layer_decay`` from layer to layer towards the input.

        A network says which layers it has by a method ``group_matcher``, as in timm; parts that are in none of them
        have the full learning rate. In a network without this method, all parts have it.
        """
        exempt = no_weight_decay(self.module)
        if not hasattr(self.module, "group_matcher"):
            return param_groups_weight_decay(self.module, self.weight_decay, exempt)
        groups = param_groups_layer_decay(self.module, self.weight_decay, exempt, layer_decay=self.config.layer_decay)
        return [
            {"params": g["params"], "weight_decay": g["weight_decay"], "lr": self.initial_lr * g["lr_scale"]}
            for g in groups
        ]

    def on_train_start(self) -> None:
        """Load the pre-trained weights, unless nnU-Net has loaded weights already, then start."""
        if not self.was_initialized:
            self.initialize()
            self.load_pretrained_weights()
        super().on_train_start()

    def load_pretrained_weights(self) -> None:
        """Load the pre-trained checkpoint and report what became of every part of the network.

        Raises:
            ValueError: if there is none; names the command that makes it.
        """
        if self.config.from_scratch:
            self.print_to_log_file("Training from scratch, as finetuning.from_scratch in the plans asks for")
            return
        file = self.find_pretrained_checkpoint()
        result = hand_over(read_checkpoint(file), self.module, file)
        self.print_to_log_file(f"Pre-trained weights: {file}\n{result.report(self.module)}")

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
            self.print_to_log_file((_OF_SAME_IMAGES if same else _OF_ALL).format(self.fold))
        elif seen := drawn_from(file).intersection([*self.split.val, *self.split.test]):
            self.print_to_log_file(_SEEN.format(file, min(seen)))
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
        files = {name: Path(folder, _PRETRAINED) for name, folder in folders.items()}
        return {name: f for name, f in files.items() if f.is_file() and (wanted or is_pretrained(f))}

    def _how_to_pretrain(self) -> str:
        command = (
            f"nnUNetv2_train {self.plans_manager.dataset_name} {self.configuration_name} {self.fold} "
            f"-p {self.plans_manager.plans_name} -tr"
        )
        names = self._wanted() or named_pretrainers(external_folders())
        return (
            f"no pre-trained checkpoint of fold {self.fold}, of a fold with the same images, or of fold all beside "
            f"{self.output_folder_base}. Pre-train first (add --c to continue an interrupted run):\n\n"
            + "".join(f"    {command} {name}\n" for name in names)
            + "\nor pass -pretrained_weights FILE, or set finetuning.from_scratch to true in "
            f"{self.plans_manager.plans_name}.json to train without"
        )

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's training step, then a step of the learning rate."""
        result = super().train_step(batch)
        self.on_iteration_end()
        return result

    def checkpoint(self) -> dict[str, Any]:
        """Names nnU-Net's own trainer, so that ``nnUNetv2_predict`` works where ``nnUNet_extTrainer`` is not set.

        Prediction needs this package all the same, as the plans name its network.
        """
        name = nnUNetTrainer.__name__
        return {**super().checkpoint(), "trainer_name": name, "finetuned_by": type(self).__name__}
