"""Loads pre-trained weights into the network that is fine-tuned, and reports what became of every part."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from nnunet_topomae.nnunet.weights.checkpoints import FIXED, UNTRAINED, WEIGHTS

SEGMENTATION_HEADS = ".seg_layers."  # nnU-Net skips keys that hold this when it loads pre-trained weights


@dataclass(frozen=True)
class HandOver:
    """What became of the tensors of a network when pre-trained weights were loaded into it; their names.

    Attributes:
        loaded: tensors loaded as they were pre-trained.
        adapted: tensors that were resized, repeated or divided before.
        fresh: tensors left at their initial values.
        why_fresh: why tensors other than those of segmentation heads are fresh, worded so that it can follow
            "12 tensors of decoder, ".
    """

    loaded: list[str]
    fresh: list[str]
    adapted: list[str] = field(default_factory=list)
    why_fresh: str = "which pre-training does not train"

    def report(self, network: nn.Module) -> str:
        """A table: how many parameters per part of the network were loaded, adapted and left fresh."""
        tensors = (*network.named_parameters(), *network.named_buffers())  # each once, even if it has several names
        sizes = {name: tensor.numel() for name, tensor in tensors}
        columns = {"loaded": self.loaded, "adapted": self.adapted, "fresh": self.fresh}
        lines = [f"  {'part':<24}{''.join(f'{column:>14}' for column in columns)}   (parameters)"]
        for part in dict.fromkeys(_part(name) for name in sizes):
            counts = [sum(sizes.get(name, 0) for name in names if _part(name) == part) for names in columns.values()]
            lines.append(f"  {part:<24}{''.join(f'{count:>14,}' for count in counts)}")
        fresh = [name for name in self.fresh if name in sizes]
        heads = [name for name in fresh if SEGMENTATION_HEADS in name]
        others = Counter(_part(name) for name in fresh if SEGMENTATION_HEADS not in name)
        reasons = [f"{len(heads)} tensors of segmentation heads"] if heads else []
        reasons += [f"{count} tensors of {part}, {self.why_fresh}" for part, count in others.items()]
        return "\n".join([*lines, f"  fresh: {'; '.join(reasons) or 'nothing'}"])


def _part(name: str) -> str:
    return name.split(".")[0]


def hand_over(checkpoint: Mapping[str, Any], network: nn.Module, file: Path, *, with_heads: bool = False) -> HandOver:
    """Load pre-trained weights into the network to be fine-tuned, or pre-trained further.

    What pre-training has not trained stays fresh: the network may start these parts as the present plans say, such as
    with another fusion gain. So do segmentation heads.

    Args:
        checkpoint: to load from.
        network: to load into.
        file: of the checkpoint, for messages.
        with_heads: whether heads whose shapes fit are loaded, too: in pre-training they reconstruct.

    Raises:
        ValueError: if the checkpoint is of another architecture; names the first tensors that do not fit.
    """
    check_fits(checkpoint, network, file)
    fresh = fresh_names(checkpoint, network, with_heads=with_heads)
    loaded = [name for name in network.state_dict() if name not in fresh]
    network.load_state_dict({name: checkpoint[WEIGHTS][name] for name in loaded}, strict=False)
    return HandOver(loaded=loaded, fresh=fresh)


def fresh_names(checkpoint: Mapping[str, Any], network: nn.Module, *, with_heads: bool = False) -> list[str]:
    """Names of the tensors of a network that a pre-trained checkpoint does not bring: heads and untrained parts.

    With ``with_heads``, heads that the checkpoint has in the right shape are brought. Some blocks hold a tensor under
    several names, of which the checkpoint mentions one; all of them are returned.
    """
    tensors = network.state_dict(keep_vars=True)
    untrained = set(checkpoint.get(UNTRAINED, ())) - set(fixed_in(checkpoint))
    same = {id(tensors[name]) for name in untrained if name in tensors}
    shapes = {name: tensor.shape for name, tensor in checkpoint[WEIGHTS].items()} if with_heads else {}
    heads = {
        name for name, tensor in tensors.items() if SEGMENTATION_HEADS in name and shapes.get(name) != tensor.shape
    }
    return [name for name, tensor in tensors.items() if name in heads or id(tensor) in same]


def fixed_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the parameters that pre-training left at their initial values on purpose.

    Checkpoints of version 0.1 do not name them. There, only the sine-cosine positions of the ViT are such parameters.
    """
    if FIXED in checkpoint:
        return list(checkpoint[FIXED])
    return [name for name in checkpoint.get(UNTRAINED, ()) if name in ("vit.pos_embed", "teacher.vit.pos_embed")]


def check_fits(checkpoint: Mapping[str, Any], network: nn.Module, file: Path) -> None:
    """Make sure that a checkpoint has every tensor of the network, except segmentation heads, in the right shape.

    Raises:
        ValueError: names the file and the first tensors that are missing or of another shape.
    """
    weights = checkpoint[WEIGHTS]
    wanted = {name: tensor for name, tensor in network.state_dict().items() if SEGMENTATION_HEADS not in name}
    missing = [name for name in wanted if name not in weights]
    reshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if missing or reshaped:
        raise ValueError(
            f"{file} is of another architecture than the plans: {len(missing)} tensors are missing"
            f"{_some(missing)}, {len(reshaped)} have another shape{_some(reshaped)}; "
            f"use a checkpoint that was pre-trained with these plans, or carry one of a network of the same class over "
            f"with nnUNetv2_topomae adapt"
        )


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return f" ({', '.join(names[:count])}{', ...' if len(names) > count else ''})" if names else ""
