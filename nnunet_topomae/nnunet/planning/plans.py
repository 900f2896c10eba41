"""Reads the settings that plans hold, and refuses plans that cannot be trained before anything is written."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_topomae.settings import read_block
from nnunet_topomae.settings.schema import Number

PRETRAINING, FINETUNING = "pretraining", "finetuning"


def read_config(configuration: ConfigurationManager, block: str, config_class: type) -> Any:
    """The ``pretraining`` or ``finetuning`` block of a configuration, defaults filled in.

    Raises:
        ValueError: names the key that is unknown or out of range.
    """
    return read_block(config_class, configuration.configuration.get(block, {}), block)


def check_plans(
    plans: dict[str, Any],
    configuration_name: str,
    blocks: Mapping[str, type],
    build: Callable[[ConfigurationManager, Mapping[str, Any]], nn.Module],
) -> dict[str, Any]:
    """Read the settings of a training, and refuse plans and configurations that cannot be trained.

    Args:
        plans: the content of a plans file.
        configuration_name: name of a configuration of these plans.
        blocks: names and classes of the blocks that are read.
        build: makes the network from the configuration and the settings; called on the meta device, to find out
            whether it can be built.

    Returns:
        The settings by the name of their block.

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
    try:
        _check_sizes(configuration)
        settings = {block: read_config(configuration, block, config_class) for block, config_class in blocks.items()}
        with torch.device("meta"):
            build(configuration, settings)
    except (TypeError, ImportError) as error:
        raise ValueError(f"{where}: architecture {configuration.network_arch_class_name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return settings


def _check_sizes(configuration: ConfigurationManager) -> None:
    if not Number(1, integer=True).accepts(configuration.batch_size):
        raise ValueError(f"batch_size must be {Number(1, integer=True)}, got {configuration.batch_size!r}")
    size = list(configuration.patch_size)
    crop_size = configuration.network_arch_init_kwargs.get("crop_size", size)  # which nnU-Net's networks have not
    if list(crop_size) != size:
        raise ValueError(f"patch_size {size} and architecture.arch_kwargs.crop_size {crop_size} must be equal")


def build_network(
    configuration: ConfigurationManager,
    input_channels: int,
    num_classes: int,
    *,
    deep_supervision: bool,
    **overrides: Any,
) -> nn.Module:
    """The network that a configuration names, with initial weights.

    Args:
        configuration: a configuration of the plans.
        input_channels, num_classes: channels that go in, and classes that come out.
        deep_supervision: whether the network gives outputs of several resolutions.
        overrides: keyword arguments of the network, in place of those in the plans.
    """
    return get_network_from_plans(
        configuration.network_arch_class_name,
        {**configuration.network_arch_init_kwargs, **overrides},
        configuration.network_arch_init_kwargs_req_import,
        input_channels,
        num_classes,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
