"""Reads the settings that plans hold, and refuses plans that cannot be trained before anything is written."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_topomae.files import read_json
from nnunet_topomae.networks.geometry import grid_of
from nnunet_topomae.nnunet.planning.class_names import check_class_names
from nnunet_topomae.settings import read_block
from nnunet_topomae.settings.schema import Number, UnknownKeyError

_NO_ARCHITECTURE = 'there is no "architecture"; these plans are of an old nnU-Net, so plan the dataset again'
PRETRAINING, FINETUNING = "pretraining", "finetuning"


def read_config(configuration: ConfigurationManager, block: str, config_class: type) -> Any:
    """The ``pretraining`` or ``finetuning`` block of a configuration, defaults filled in.

    Raises:
        ValueError: names the key that is unknown or out of range.
    """
    return _read_once(config_class, json.dumps(configuration.configuration.get(block, {})), block)


@lru_cache
def _read_once(config_class: type, values: str, block: str) -> Any:
    return read_block(config_class, json.loads(values), block)


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
    if missing := [key for key in ("plans_name", "dataset_name", "configurations") if key not in plans]:
        raise ValueError(f'the plans have no "{missing[0]}"; plan the dataset again')
    _check_folder_names(plans, ("plans_name", "dataset_name"))
    named = plans["configurations"]
    objects = [named, *named.values()] if isinstance(named, Mapping) else [None]
    objects += [each.get("architecture", {}) for each in objects[1:] if isinstance(each, Mapping)]
    if not all(isinstance(each, Mapping) for each in objects):
        raise ValueError(
            "the configurations in the plans, and the architecture of each, must be JSON objects; plan the dataset "
            "again"
        )
    manager = PlansManager(plans)
    where = f'plans "{manager.plans_name}", configuration "{configuration_name}"'
    if configuration_name not in manager.available_configurations:
        raise ValueError(
            f"{where}: there is no such configuration; these plans have {', '.join(manager.available_configurations)} "
            f"(2D images and 2d configurations are not supported)"
        )
    try:
        configuration = manager.get_configuration(configuration_name)
    except KeyError as error:  # nnU-Net looks for the keys that the network had before
        raise ValueError(f"{where}: {_NO_ARCHITECTURE}") from error
    size = configuration.configuration.get("patch_size")
    if not isinstance(size, list) or not all(Number(1, integer=True).accepts(voxels) for voxels in size):
        raise ValueError(f"{where}: patch_size must be a list of whole numbers of at least 1, got {size!r}")
    if len(size) != 3:
        raise ValueError(
            f"{where}: only 3D configurations can be pre-trained and fine-tuned, this one is 2D; use 3d_fullres"
        )
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"{where}: the second stage of the cascade can be neither pre-trained nor fine-tuned; use 3d_fullres or "
            f"3d_lowres"
        )
    try:
        _check_sizes(configuration)
        _check_folder_names(configuration.configuration, ("data_identifier",))
        check_class_names(configuration.configuration["architecture"])
        settings = {block: read_config(configuration, block, config_class) for block, config_class in blocks.items()}
        with torch.device("meta"):
            build(configuration, settings)
    except UnknownKeyError as error:
        if refusal := _refusal(lambda: build(configuration, {block: blocks[block]() for block in blocks})):
            raise ValueError(f"{where}: {refusal}") from error
        raise ValueError(
            f"{where}: {error}; if the plans were written for another method (by {manager.experiment_planner_name}), "
            f"use the trainer of that method or take its keys out of a copy of the plans"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # constructors of networks raise whatever their libraries do
        said = error if isinstance(error, TypeError | ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: architecture {configuration.network_arch_class_name}: {said}") from error
    return settings


def _refusal(build: Callable[[], object]) -> ValueError | None:
    """Why a network cannot be trained whatever its settings, if so: with the default ones."""
    try:
        with torch.device("meta"):
            build()
    except ValueError as error:
        return error
    return None


def check_own_name(plans: dict[str, Any], folder: Path) -> None:
    """Make sure that plans are those of the file that has their name, as results are named by it.

    Args:
        plans: the content of a plans file.
        folder: the folder of the preprocessed dataset, which holds the plans files.

    Raises:
        ValueError: if they are a copy whose ``plans_name`` was left as it was, and which was edited since.
    """
    name = plans["plans_name"]
    file = folder / f"{name}.json"
    given = {key: value for key, value in plans.items() if key != "continue_training"}  # which nnU-Net puts in
    if file.is_file() and read_json(file) != given:
        raise ValueError(
            f'these plans say "plans_name": "{name}", but {file} holds other plans, whose results they would '
            f"overwrite; if they are a copy, set plans_name in it to the name of its file"
        )


def _check_folder_names(content: Mapping[str, Any], keys: Iterable[str]) -> None:
    """See that what folders are named by leads nowhere else."""
    for key in keys:
        name = content.get(key)
        if not isinstance(name, str) or name in ("", "..") or name != Path(name).name:
            raise ValueError(f"{key} must be a name, as folders are named by it, got {name!r}")


def _check_sizes(configuration: ConfigurationManager) -> None:
    spacing = configuration.configuration.get("spacing")
    if not isinstance(spacing, list) or not all(map(Number(0, low_open=True).accepts, spacing)) or len(spacing) != 3:
        raise ValueError(f"spacing must be a list of three numbers above 0, in mm, got {spacing!r}")
    if not Number(1, integer=True).accepts(configuration.batch_size):
        raise ValueError(f"batch_size must be {Number(1, integer=True)}, got {configuration.batch_size!r}")
    size = list(configuration.patch_size)
    crop_size = configuration.network_arch_init_kwargs.get("crop_size", size)  # which nnU-Net's networks have not
    if list(crop_size) != size:
        raise ValueError(f"patch_size {size} and architecture.arch_kwargs.crop_size {crop_size} must be equal")
    check_strides(configuration)


def check_strides(configuration: ConfigurationManager) -> None:
    """See that the strides of the plans' network divide its crop.

    Raises:
        ValueError: names both.
    """
    strides = configuration.network_arch_init_kwargs.get("strides", [])
    total = [math.prod(stride if isinstance(stride, int) else stride[axis] for stride in strides) for axis in range(3)]
    grid_of(configuration.patch_size, total, "the total stride of the network,")


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
