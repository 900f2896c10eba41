"""Fine-tuning of a pre-trained network: nnU-Net's own training with another start, optimiser and schedule."""

from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from timm.optim import param_groups_layer_decay
from torch import nn

from nnunet_topomae.nnunet.checkpoints import hand_over, read_checkpoint
from nnunet_topomae.nnunet.plans import FINETUNING, build_network, read_config
from nnunet_topomae.nnunet.training import NO_WEIGHT_DECAY, StageTrainer

_PRETRAINED = "checkpoint_final.pth"


class FinetuneTrainer(StageTrainer):
    """Starts from the checkpoint that ``pretrainer`` left for the same dataset, plans, configuration and fold.

    Attributes:
        pretrainer: name of the pre-training trainer.
    """

    block = FINETUNING
    pretrainer: str

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of the plans, with stochastic depth in its ViT."""
        return build_network(
            configuration_manager,
            num_input_channels,
            num_output_channels,
            deep_supervision=enable_deep_supervision,
            drop_path=read_config(configuration_manager, FINETUNING).drop_path,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The learning rate falls by ``layer_decay`` per ViT block towards the input; other parts have it in full."""
        groups = param_groups_layer_decay(
            self.module, self.weight_decay, NO_WEIGHT_DECAY, layer_decay=self.config.layer_decay
        )
        return [
            {"params": g["params"], "weight_decay": g["weight_decay"], "lr": self.initial_lr * g["lr_scale"]}
            for g in groups
        ]

    def on_train_start(self) -> None:
        """Hand the pre-trained weights over, unless nnU-Net has loaded weights already."""
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
        """The checkpoint of this fold, else that of fold ``all``, which has seen the validation images.

        Raises:
            ValueError: if there is neither.
        """
        folder = self._pretraining_folder()
        own, of_all = (folder / f"fold_{fold}" / _PRETRAINED for fold in (self.fold, "all"))
        if own.is_file():
            return own
        if of_all.is_file():
            self.print_to_log_file(
                f"WARNING: there is no pre-training of fold {self.fold}; starting from fold all, which has seen the "
                f"images (not the labels) of this fold's validation cases"
            )
            return of_all
        raise ValueError(
            f"no pre-trained checkpoint at {own}. Pre-train first (add --c to continue an interrupted run):\n\n"
            f"    nnUNetv2_train {self.plans_manager.dataset_name} {self.configuration_name} {self.fold} "
            f"-p {self.plans_manager.plans_name} -tr {self.pretrainer}\n\n"
            f"or pass -pretrained_weights FILE, or set finetuning.from_scratch to true in "
            f"{self.plans_manager.plans_name}.json to train without"
        )

    def _pretraining_folder(self) -> Path:
        own = Path(self.output_folder_base)
        return own.with_name(own.name.replace(type(self).__name__, self.pretrainer, 1))

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, then one of the schedule."""
        result = super().train_step(batch)
        self.on_iteration_end()
        return result

    def checkpoint(self) -> dict[str, Any]:
        """As nnU-Net's trainer would write it, so that prediction needs the package but no variable of its user."""
        name = nnUNetTrainer.__name__
        return {**super().checkpoint(), "trainer_name": name, "finetuned_by": type(self).__name__}
