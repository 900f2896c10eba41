"""What a plans file may say about pre-training and fine-tuning, and how it is checked.

The planner writes a ``pretraining`` and a ``finetuning`` block into each configuration; users edit them as they edit
the rest of their plans. A key left out takes the default given here; an unknown or out-of-range one is an error.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

BRANCHES = ("vit", "unetrpp")
MASK_SOURCES = ("random", "anatomask")
HARDNESS_SCORES = ("denormalised", "normalised", "mixed")


@dataclass(frozen=True)
class Number:
    """Accepts numbers from ``low`` to ``high``; a bound may be open."""

    low: float
    high: float = float("inf")
    integer: bool = False
    low_open: bool = False
    high_open: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is a number (not a bool) in range, whole if asked."""
        kind = int if self.integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        low = f"{'above' if self.low_open else 'of at least'} {self.low:g}"
        if self.high == float("inf"):
            return f"{kind} {low}"
        return f"{kind} {low} and {'below' if self.high_open else 'at most'} {self.high:g}"


@dataclass(frozen=True)
class Flag:
    """Accepts true and false."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is a bool."""
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Subset:
    """Accepts a non-empty list of distinct names."""

    names: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` lists some of the names, each once."""
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and len(value) > 0 and len(set(value)) == len(value) and set(value) <= set(self.names)

    def __str__(self) -> str:
        return f"a list of one or more of {', '.join(self.names)}"


@dataclass(frozen=True)
class Grid:
    """Accepts null or three positive whole numbers."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is None or three positive integers."""
        cell = Number(1, integer=True)
        return value is None or (isinstance(value, Sequence) and len(value) == 3 and all(map(cell.accepts, value)))

    def __str__(self) -> str:
        return "null or three whole numbers of at least 1"


@dataclass(frozen=True)
class Identifiers:
    """Accepts a list of distinct dataset IDs."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` lists whole numbers of at least 0, each once."""
        number = Number(0, integer=True)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(map(number.accepts, value)) and len(set(value)) == len(value)

    def __str__(self) -> str:
        return "a list of dataset IDs"


@dataclass(frozen=True)
class Choice:
    """Accepts one of some names."""

    names: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is one of the names."""
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


@dataclass(frozen=True)
class Name:
    """Accepts null or the name of a class."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is None or an identifier."""
        return value is None or (isinstance(value, str) and value.isidentifier())

    def __str__(self) -> str:
        return "null or the name of a trainer"


Accepted = Number | Flag | Subset | Grid | Identifiers | Choice | Name


def setting(default: Any, accepted: Accepted, meaning: str, source: str) -> Any:
    """A dataclass field that knows what it accepts and how the reference describes it."""
    return dataclasses.field(default=default, metadata={"accepted": accepted, "meaning": meaning, "source": source})


def block(kind: type) -> Any:
    """A dataclass field that is itself a block of settings."""
    return dataclasses.field(default_factory=kind, metadata={"block": kind})


def changed(config_class: type, name: str, default: Any, source: str) -> Any:
    """A field of a parent class with another default."""
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return setting(default, field.metadata["accepted"], field.metadata["meaning"], source)


@dataclass(frozen=True)
class SpatialConfig:
    """``pretraining.spatial``."""

    enabled: bool = setting(True, Flag(), "predict the nine key points of a crop", "paper, II-B; off: Table VI")


@dataclass(frozen=True)
class TopologyConfig:
    """``pretraining.topology``."""

    enabled: bool = setting(True, Flag(), "compare persistence diagrams of crop and reconstruction", "paper, II-A")
    weight: float = setting(
        0.1, Number(0), "factor on the topological terms, whose size grows with the crop", "ours, see docs/losses.md"
    )
    grid: Sequence[int] | None = setting(
        None, Grid(), "cells a crop is averaged to before the filtration; null: every voxel", "ours; paper: null"
    )
    tolerance: float = setting(
        0.0, Number(0, 1, high_open=True), "relative gap allowed to the optimal matching; 0: exact", "ours; paper: 0"
    )


@dataclass(frozen=True)
class AnatoMaskPolicyConfig:
    """``pretraining.anatomask``: which patches a teacher hides, and how it follows its student."""

    first_share: float = setting(
        0.0, Number(0, 1), "share of hidden patches that are the hardest, at the start", "AnatoMask, 3.3"
    )
    last_share: float = setting(0.5, Number(0, 1), "the same at the end; linear between", "AnatoMask, 3.3")
    first_momentum: float = setting(0.999, Number(0, 1), "of the teacher at the start", "AnatoMask")
    last_momentum: float = setting(0.9999, Number(0, 1), "of the teacher after a quarter; linear before", "AnatoMask")
    hardness: str = setting(
        "denormalised",
        Choice(HARDNESS_SCORES),
        "what is compared where targets are normalised per patch",
        "ours, see docs/methods/anatomask.md",
    )


@dataclass(frozen=True)
class StageConfig:
    """What pre-training and fine-tuning have in common."""

    num_epochs: int = setting(1000, Number(1, integer=True), "epochs", "planner: passes of SelfMedMAE, at most 1000")
    num_iterations_per_epoch: int = setting(250, Number(1, integer=True), "training steps per epoch", "nnU-Net")
    num_val_iterations_per_epoch: int = setting(50, Number(1, integer=True), "validation batches per epoch", "nnU-Net")
    base_lr: float = setting(
        6.4e-3, Number(0, low_open=True), "learning rate = base_lr x batch size / 256", "paper, III-B"
    )
    weight_decay: float = setting(
        0.005, Number(0), "of AdamW; none on biases, norms and other 1D parameters", "paper, III-B"
    )
    warmup_epochs: float = setting(
        50, Number(0), "linear warm-up, then cosine to 0, per iteration", "MAE: 5 % of all epochs"
    )
    seed: int = setting(
        12345, Number(0, 2**31 - 1, integer=True), "of weights, crops, masks and dropout", "nnU-Net's split seed"
    )


@dataclass(frozen=True)
class PretrainingConfig(StageConfig):
    """What the ``pretraining`` blocks of all methods have in common."""

    mask_ratio: float = setting(
        0.5, Number(0, 1, low_open=True, high_open=True), "share of patches hidden", "paper, II-A"
    )
    mask_source: str = setting(
        "random",
        Choice(MASK_SOURCES),
        "who chooses the hidden patches: chance, or a teacher more and more",
        "AnatoMask",
    )
    anatomask: AnatoMaskPolicyConfig = block(AnatoMaskPolicyConfig)
    datasets: Sequence[int] = setting(
        (), Identifiers(), "other datasets whose images take part, preprocessed with the same plans", "ours"
    )


@dataclass(frozen=True)
class TopoMAEConfig(PretrainingConfig):
    """The ``pretraining`` block of TopoMAE."""

    branches: Sequence[str] = setting(BRANCHES, Subset(BRANCHES), "networks to pre-train", "paper, II-C; Table VI")
    lambda1: float = setting(0.5, Number(0, 1), "weight of UNETR++ against the ViT", "paper, II-C")
    lambda2: float = setting(0.1, Number(0, 0.5), "weight of the topological and of the spatial loss", "paper, II-C")
    lambda3: float = setting(0.1, Number(0), "weight of both consistency losses", "paper, II-C")
    spatial: SpatialConfig = block(SpatialConfig)
    topology: TopologyConfig = block(TopologyConfig)


@dataclass(frozen=True)
class MAEConfig(PretrainingConfig):
    """The ``pretraining`` block of MAE."""

    mask_ratio: float = changed(PretrainingConfig, "mask_ratio", 0.75, "SelfMedMAE")


@dataclass(frozen=True)
class SparKConfig(PretrainingConfig):
    """The ``pretraining`` block of SparK and AnatoMask."""

    mask_ratio: float = changed(PretrainingConfig, "mask_ratio", 0.6, "AnatoMask")
    weight_decay: float = changed(StageConfig, "weight_decay", 1e-5, "AnatoMask")
    warmup_epochs: float = changed(StageConfig, "warmup_epochs", 20, "AnatoMask")
    decoder_width: int = setting(
        512,
        Number(8, integer=True),
        "channels of the light decoder at the fifth scale and beyond, halved at each finer one",
        "AnatoMask",
    )


@dataclass(frozen=True)
class AnatoMaskConfig(SparKConfig):
    """The ``pretraining`` block of AnatoMask: SparK's with another default."""

    mask_source: str = changed(PretrainingConfig, "mask_source", "anatomask", "AnatoMask")


@dataclass(frozen=True)
class FinetuningConfig(StageConfig):
    """The ``finetuning`` block."""

    base_lr: float = setting(
        1e-1, Number(0, low_open=True), "learning rate = base_lr x batch size / 256", "paper, III-B"
    )
    layer_decay: float = setting(
        0.75,
        Number(0, 1, low_open=True),
        "factor on the learning rate per ViT block, from output to input",
        "SelfMedMAE",
    )
    drop_path: float = setting(
        0.1, Number(0, 1, high_open=True), "stochastic depth of the last ViT block", "SelfMedMAE"
    )
    from_scratch: bool = setting(False, Flag(), "train without a pre-trained checkpoint", "ours")
    pretrainer: str | None = setting(
        None, Name(), "trainer whose checkpoint PretrainedFinetuneTrainer takes; null: the only one there is", "ours"
    )


@dataclass(frozen=True)
class UNetFinetuningConfig(FinetuningConfig):
    """The ``finetuning`` block for nnU-Net's own networks."""

    base_lr: float = changed(FinetuningConfig, "base_lr", 0.0128, "AnatoMask: 1e-4 at a batch of 2")
    weight_decay: float = changed(StageConfig, "weight_decay", 1e-5, "AnatoMask")


Config = TypeVar("Config")


def read_block(config_class: type[Config], values: Mapping[str, Any], name: str) -> Config:
    """Check a block of a plans file and fill in defaults.

    Args:
        config_class: :class:`PretrainingConfig` or :class:`FinetuningConfig`.
        values: the block as read from JSON.
        name: where it stands, for messages: ``pretraining``.

    Raises:
        ValueError: names the unknown or out-of-range key and what would be accepted.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a block of settings, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(fields)}"
            raise ValueError(f"unknown key {name}.{key} in the plans; {hint}")
    return config_class(**{key: _read_value(fields[key], value, f"{name}.{key}") for key, value in values.items()})


def _read_value(field: dataclasses.Field, value: Any, name: str) -> Any:
    if "block" in field.metadata:
        return read_block(field.metadata["block"], value, name)
    accepted = field.metadata["accepted"]
    if not accepted.accepts(value):
        raise ValueError(f"{name} in the plans must be {accepted}, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def to_block(config: Any) -> dict[str, Any]:
    """The block of a plans file that :func:`read_block` turns into ``config``: plain JSON types."""
    return {
        key: list(value) if isinstance(value, tuple) else to_block(value) if dataclasses.is_dataclass(value) else value
        for key, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    }
