"""Settings that all pre-training methods share, and those of fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_topomae.settings.schema import Flag, Identifiers, Name, Number, setting, with_default


@dataclass(frozen=True)
class StageConfig:
    """What pre-training and fine-tuning have in common."""

    num_epochs: int = setting(1000, Number(1, integer=True), "number of epochs", "nnU-Net; planners compute it")
    num_iterations_per_epoch: int = setting(250, Number(1, integer=True), "training steps per epoch", "nnU-Net")
    num_val_iterations_per_epoch: int = setting(50, Number(1, integer=True), "validation batches per epoch", "nnU-Net")
    base_lr: float = setting(
        6.4e-3, Number(0, low_open=True), "the learning rate is base_lr x batch size / 256", "paper, III-B"
    )
    weight_decay: float = setting(
        0.005, Number(0), "weight decay of AdamW; biases, norms and other 1D parameters have none", "paper, III-B"
    )
    warmup_epochs: float = setting(
        50,
        Number(0),
        "epochs in which the learning rate rises linearly; then it falls to 0 along a cosine",
        "MAE: 5 % of all epochs",
    )
    seed: int = setting(
        12345,
        Number(0, 2**31 - 1, integer=True),
        "seed of initial weights, crops, masks and dropout",
        "nnU-Net's split seed",
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


@dataclass(frozen=True)
class FinetuningConfig(StageConfig):
    """The ``finetuning`` block."""

    base_lr: float = setting(
        1e-1, Number(0, low_open=True), "the learning rate is base_lr x batch size / 256", "paper, III-B"
    )
    layer_decay: float = setting(
        0.75,
        Number(0, 1, low_open=True),
        "the learning rate is multiplied by this once for every ViT block between a parameter and the output",
        "SelfMedMAE",
    )
    drop_path: float = setting(
        0.1,
        Number(0, 1, high_open=True),
        "stochastic depth: how often the last ViT block is skipped in training; less for earlier blocks",
        "SelfMedMAE",
    )
    from_scratch: bool = setting(default=False, accepted=Flag(), meaning="train from random weights", source="ours")
    pretrainer: str | None = setting(
        None,
        Name(),
        "trainer whose checkpoint PretrainedFinetuneTrainer starts from; null: the only one that has left one",
        "ours",
    )


@dataclass(frozen=True)
class UNetFinetuningConfig(FinetuningConfig):
    """The ``finetuning`` block for nnU-Net's own networks."""

    base_lr: float = with_default(FinetuningConfig, "base_lr", 0.0128, "AnatoMask: 1e-4 at a batch of 2")
    weight_decay: float = with_default(StageConfig, "weight_decay", 1e-5, "AnatoMask")
