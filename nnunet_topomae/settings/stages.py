"""Settings that all pre-training methods share, and those of fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_topomae.settings.recipes import OPTIMIZERS, RECIPES, SCHEDULE_STEPS, SCHEDULES, recipe
from nnunet_topomae.settings.schema import Choice, Flag, Identifiers, Name, Number, PlansName, setting, with_default


@dataclass(frozen=True)
class StageConfig:
    """What pre-training and fine-tuning have in common."""

    num_epochs: int = setting(1000, Number(1, integer=True), "number of epochs", "nnU-Net; planners compute it")
    num_iterations_per_epoch: int = setting(250, Number(1, integer=True), "training steps per epoch", "nnU-Net")
    num_val_iterations_per_epoch: int = setting(50, Number(1, integer=True), "validation batches per epoch", "nnU-Net")
    base_lr: float = setting(
        6.4e-3,
        Number(0, low_open=True),
        "the learning rate is base_lr x batch size / 256, unless scale_lr is false",
        "paper, III-B",
    )
    scale_lr: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="false: base_lr is the learning rate itself",
        source="as MAE; the paper does not say",
    )
    weight_decay: float = setting(
        0.005,
        Number(0),
        "weight decay of the optimiser; biases, norms and other 1D parameters have none",
        "paper, III-B",
    )
    warmup_epochs: float = setting(
        50,
        Number(0),
        "epochs in which the learning rate rises linearly; then it falls to 0, in pre-training along a cosine",
        "MAE: 5 % of all epochs",
    )
    seed: int = setting(
        12345,
        Number(0, 2**31 - 1, integer=True),
        "seed of initial weights, crops, masks and dropout",
        "nnU-Net's split seed",
    )
    deterministic: bool = setting(
        default=False,
        accepted=Flag(),
        meaning="true: a GPU computes every training in the same order, as far as PyTorch can, which is slower; a CPU "
        "always does",
        source="ours",
    )
    save_every: int | None = setting(
        None,
        Number(1, integer=True, optional=True),
        "epochs between two writes of checkpoint_latest.pth; null: every epoch if writing takes under 2 % of the time, "
        "else as often as that allows",
        "ours; nnU-Net: 50",
    )
    timeout: float = setting(
        300, Number(0, low_open=True), "seconds after which a run stops because the disk gives no batch", "ours"
    )
    sync_batch_norm: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="several processes: whether BatchNorm, which UNETR++ has, sees the whole batch as a single process "
        "would; false: each process its share, which is faster, and other weights come out",
        source="nnU-Net",
    )


@dataclass(frozen=True)
class PretrainingConfig(StageConfig):
    """What the ``pretraining`` blocks of all methods have in common."""

    datasets: Sequence[int] = setting(
        (),
        Identifiers(),
        "IDs of other datasets whose images take part; they must be preprocessed with the same plans",
        "ours",
    )
    datasets_plans: str | None = setting(
        None,
        PlansName(),
        "name of the plans that the other datasets were preprocessed with; null: that of these plans",
        "ours",
    )


@dataclass(frozen=True)
class FinetuningConfig(StageConfig):
    """The ``finetuning`` block.

    Raises:
        ValueError: if warm-up and frozen phase leave no epoch to train in.
    """

    recipe: str = setting(
        "default", Choice(RECIPES), "named set of defaults for the keys that the plans do not have, see below", "ours"
    )
    base_lr: float = setting(
        1e-1,
        Number(0, low_open=True),
        "the learning rate is base_lr x batch size / 256, unless scale_lr is false",
        "paper, III-B",
    )
    optimizer: str = setting(
        "adamw", Choice(OPTIMIZERS), "AdamW, or stochastic gradient descent with Nesterov momentum", "paper, III-B"
    )
    eps: float = setting(1e-8, Number(0, low_open=True), "AdamW: added to the denominator", "PyTorch")
    momentum: float = setting(0.99, Number(0, 1, high_open=True), "sgd: momentum", "nnU-Net")
    schedule: str = setting(
        "cosine", Choice(SCHEDULES), "how the learning rate falls to 0 after the warm-up", "SelfMedMAE"
    )
    schedule_step: str = setting(
        "iteration", Choice(SCHEDULE_STEPS), "when the learning rate changes: after which of these", "SelfMedMAE"
    )
    freeze_epochs: float = setting(
        0,
        Number(0),
        "first epochs, in which only those parts learn that pre-training has not trained; their learning rate rises "
        "in the first half of these epochs and falls in the second; then the whole network starts with its own warm-up",
        "ours; OpenMind",
    )
    encoder_lr: float = setting(
        1.0,
        Number(0, 1),
        "factor on the learning rate of the pre-trained encoder; at 0 its weights stay as pre-training left them, and "
        "only the other parts learn, while its batch norms still follow the images, and its dropout and drop_path "
        "still act; not used from scratch",
        "ours",
    )
    layer_decay: float = setting(
        0.75,
        Number(0, 1, low_open=True),
        "where a network names its layers, as a ViT does: the learning rate is multiplied by this once for every layer "
        "between a parameter and the output",
        "SelfMedMAE",
    )
    drop_path: float = setting(
        0.1,
        Number(0, 1, high_open=True),
        "stochastic depth, where a network has it: how often the last ViT block is skipped in training; less for "
        "earlier blocks",
        "SelfMedMAE",
    )
    from_scratch: bool = setting(
        default=False,
        accepted=Flag(),
        meaning="train from random weights, with the same recipe as from pre-trained ones",
        source="ours",
    )
    pretrainer: str | None = setting(
        None,
        Name(),
        "trainer whose checkpoint PretrainedFinetuneTrainer starts from; null: the only one that has left one",
        "ours",
    )

    def __post_init__(self) -> None:
        if self.freeze_epochs and self.freeze_epochs + self.warmup_epochs >= self.num_epochs:
            raise ValueError(
                f"finetuning.freeze_epochs ({self.freeze_epochs:g}) and warmup_epochs ({self.warmup_epochs:g}) in the "
                f"plans must leave some of the {self.num_epochs} epochs (num_epochs)"
            )

    @classmethod
    def fill_in(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Add what the recipe says to the keys that the plans have; see :func:`read_block`.

        Raises:
            ValueError: if keys contradict each other.
        """
        filled = {**values, **{key: value for key, value in recipe(values).items() if key not in values}}
        for key, optimizer in (("eps", "adamw"), ("momentum", "sgd")):
            chosen = filled.get("optimizer", cls.optimizer)
            is_set = values.get(key, getattr(cls, key)) != getattr(cls, key)
            if is_set and chosen in OPTIMIZERS and chosen != optimizer:
                raise ValueError(
                    f"finetuning.{key} in the plans belongs to the optimizer {optimizer}, but the optimizer is "
                    f"{chosen}; remove the key or set finetuning.optimizer to {optimizer}"
                )
        return filled


@dataclass(frozen=True)
class UNetFinetuningConfig(FinetuningConfig):
    """The ``finetuning`` block for nnU-Net's own networks."""

    base_lr: float = with_default(FinetuningConfig, "base_lr", 0.0128, "AnatoMask: 1e-4 at a batch of 2")
    weight_decay: float = with_default(StageConfig, "weight_decay", 1e-5, "AnatoMask")
