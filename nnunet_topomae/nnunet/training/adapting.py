"""``nnUNetv2_topomae adapt``: a pre-trained checkpoint for another dataset, crop size or number of channels."""

from collections.abc import Mapping
from pathlib import Path

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_topomae.networks.resizing import adapt_weights
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.raw import check_description
from nnunet_topomae.nnunet.planning.plans import read_config
from nnunet_topomae.nnunet.training.pretraining import Pretrainer
from nnunet_topomae.nnunet.weights.checkpoints import (
    DRAWN_FROM,
    FIXED,
    UNTRAINED,
    WEIGHTS,
    cases_seen,
    read_checkpoint,
    write_checkpoint,
)
from nnunet_topomae.nnunet.weights.exporting import is_export, read_export
from nnunet_topomae.nnunet.weights.handover import HandOver, fixed_in


def read_pretrained(file: Path) -> dict:
    """Read a checkpoint of pre-training, or a folder that ``nnUNetv2_topomae export`` made of one.

    Raises:
        ValueError: if it is damaged, was not written by pre-training, or does not say by which trainer and plans.
    """
    checkpoint = read_export(file) if is_export(file) else read_checkpoint(file)
    if UNTRAINED not in checkpoint:
        raise ValueError(f"{file} was not written by a pre-training trainer of this package, so it cannot be adapted")
    name, made_with = checkpoint.get("trainer_name"), checkpoint.get("init_args")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{file} names no trainer, but {name!r}, so it cannot be adapted")
    if not isinstance(made_with, dict) or not all(
        isinstance(made_with.get(key), kind)
        for key, kind in (("plans", dict), ("configuration", str), ("dataset_json", dict))
    ):
        raise ValueError(f"{file} does not say which plans, configuration and dataset it was made with")
    return checkpoint


def adapt(
    file: Path, checkpoint: dict, trainer: type[Pretrainer], dataset: PlannedDataset, configuration: str, output: Path
) -> str:
    """Carry the weights of a checkpoint to the network that a dataset's plans name.

    Args:
        file: the file of the checkpoint.
        checkpoint: its content; see :func:`read_pretrained`.
        trainer: the trainer that wrote it.
        dataset: the dataset to be fine-tuned on, or pre-trained on further.
        configuration: name of a configuration of its plans.
        output: the file to write.

    Returns:
        A table that says how much was carried over, adapted and left fresh.

    Raises:
        ValueError: if the networks are of different classes or their ViTs have different kinds of positions, if nothing
            can be carried, or the output exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists already; delete it or choose another name")
    config = trainer.check_plans(dataset.plans.plans, configuration)[trainer.block]
    made_with = checkpoint["init_args"]
    trainer.check_plans(made_with["plans"], made_with["configuration"])  # which may come from anywhere
    check_description(made_with["dataset_json"], file)
    plans = PlansManager(made_with["plans"])
    source = PlannedDataset(file.parent, plans, made_with["dataset_json"])
    before, after = plans.get_configuration(made_with["configuration"]), dataset.plans.get_configuration(configuration)
    if before.network_arch_class_name != after.network_arch_class_name:
        raise ValueError(
            f"{file} holds a {before.network_arch_class_name}, but plans {dataset.plans.plans_name} of "
            f"{dataset.folder.name} name a {after.network_arch_class_name}"
        )
    started = [c.network_arch_init_kwargs.get("vit", {}).get("local_start", False) for c in (before, after)]
    if started[0] != started[1]:
        raise ValueError(
            f"{file} was pre-trained with local_start {started[0]} in arch_kwargs.vit, so its ViT knows other "
            f"positions than those of {dataset.plans.plans_name}; set local_start there to {started[0]}"
        )
    channels = source.num_channels, dataset.num_channels
    with torch.device("meta"):
        old = trainer.build(before, read_config(before, trainer.block, trainer.config_class), channels[0])
    _check_own_shapes(checkpoint[WEIGHTS], old, file)
    new = trainer.build(after, config, channels[1])
    fixed = fixed_in(checkpoint)
    result = adapt_weights(checkpoint[WEIGHTS], old, new, channels, fixed)
    if result.weights.keys() <= {*result.fresh, *fixed}:
        raise ValueError(f"{file} has nothing in common with the network of {dataset.plans.plans_name}")
    untrained = [name for name in result.weights if name in {*checkpoint[UNTRAINED], *result.fresh}]
    description = {"plans": dataset.plans.plans, "configuration": configuration, "dataset_json": dataset.description}
    adapted = {
        WEIGHTS: result.weights,
        UNTRAINED: untrained,
        FIXED: [name for name in fixed if name in result.weights],
        "trainer_name": checkpoint["trainer_name"],
        "init_args": {**made_with, **description},
        "adapted_from": file,
    }
    if DRAWN_FROM in checkpoint:  # which exports, and checkpoints of older versions, do not say
        adapted[DRAWN_FROM] = sorted(cases_seen(checkpoint, dataset.folder.name))
    write_checkpoint(adapted, output)
    others = {*result.fresh, *result.adapted}
    loaded = [name for name in result.weights if name not in others]
    return HandOver(loaded, result.fresh, result.adapted, "which cannot be carried over").report(new)


def _check_own_shapes(weights: Mapping[str, Tensor], network: nn.Module, file: Path) -> None:
    """See that weights have the shapes that the plans beside them say, on which resizing rests."""
    for name, tensor in network.state_dict().items():
        if name in weights and weights[name].shape != tensor.shape:
            raise ValueError(
                f"{file} holds {name} {tuple(weights[name].shape)}, but the plans in it say {tuple(tensor.shape)}"
            )
