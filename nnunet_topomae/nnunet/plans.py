"""Reads our part of nnU-Net's plans, and refuses plans that cannot work before anything is written."""

from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_topomae.config import FinetuningConfig, Number, PretrainingConfig, read_block
from nnunet_topomae.topology.loss import pool_to_grid

PRETRAINING, FINETUNING = "pretraining", "finetuning"
CONFIG_CLASSES = {PRETRAINING: PretrainingConfig, FINETUNING: FinetuningConfig}

_OUR_NETWORKS = "nnunet_topomae.networks."


def read_config(configuration: ConfigurationManager, block: str) -> Any:
    """The ``pretraining`` or ``finetuning`` block of a configuration, defaults filled in.

    Raises:
        ValueError: names the key that is unknown or out of range.
    """
    return read_block(CONFIG_CLASSES[block], configuration.configuration.get(block, {}), block)


def check_plans(plans: dict[str, Any], configuration_name: str) -> None:
    """Refuse plans and configurations that this plugin cannot train.

    Raises:
        ValueError: one sentence that names plans, configuration and key, and says what to do.
    """
    manager = PlansManager(plans)
    where = f'plans "{manager.plans_name}", configuration "{configuration_name}"'
    if configuration_name not in manager.available_configurations:
        raise ValueError(
            f"{where}: there is no such configuration; these plans have {', '.join(manager.available_configurations)} "
            f"(2D images and 2d configurations are not supported)"
        )
    configuration = manager.get_configuration(configuration_name)
    size = configuration.configuration["patch_size"]
    if not isinstance(size, list) or not all(Number(1, integer=True).accepts(voxels) for voxels in size):
        raise ValueError(f"{where}: patch_size must be a list of whole numbers of at least 1, got {size!r}")
    if len(size) != 3:
        raise ValueError(f"{where}: only 3D configurations can be pre-trained, this one is 2D; use 3d_fullres")
    if configuration.previous_stage_name is not None:
        raise ValueError(f"{where}: the second stage of the cascade cannot be pre-trained; use 3d_fullres or 3d_lowres")
    if not configuration.network_arch_class_name.startswith(_OUR_NETWORKS):
        raise ValueError(
            f"{where}: these plans were made by {manager.experiment_planner_name} for "
            f"{configuration.network_arch_class_name}; plan this dataset with nnUNetv2_topomae plan_and_preprocess "
            f"and pass -p nnUNetTopoMAEPlans"
        )
    try:
        _check_sizes(configuration)
        for block in CONFIG_CLASSES:
            read_config(configuration, block)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_sizes(configuration: ConfigurationManager) -> None:
    """Batch, crop, patches, strides and topology grid must fit each other."""
    if not Number(1, integer=True).accepts(configuration.batch_size):
        raise ValueError(f"batch_size must be {Number(1, integer=True)}, got {configuration.batch_size!r}")
    crop_size = configuration.network_arch_init_kwargs.get("crop_size")
    if list(crop_size or ()) != list(configuration.patch_size):
        raise ValueError(
            f"patch_size {list(configuration.patch_size)} and architecture.arch_kwargs.crop_size {crop_size} "
            f"must be equal"
        )
    with torch.device("meta"):
        try:
            build_network(configuration, input_channels=1, num_classes=1)
        except (TypeError, ImportError) as error:
            raise ValueError(f"architecture {configuration.network_arch_class_name}: {error}") from error
        pool_to_grid(torch.empty(1, 1, *crop_size), read_config(configuration, PRETRAINING).topology.grid)


def build_network(
    configuration: ConfigurationManager, input_channels: int, num_classes: int, **overrides: Any
) -> torch.nn.Module:
    """The network that a configuration names, with initial weights; ``overrides`` replace its keyword arguments."""
    return get_network_from_plans(
        configuration.network_arch_class_name,
        {**configuration.network_arch_init_kwargs, **overrides},
        configuration.network_arch_init_kwargs_req_import,
        input_channels,
        num_classes,
        allow_init=True,
    )
