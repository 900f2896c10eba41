"""Which classes plans may name: nnU-Net imports and calls whatever they name, so a plans file could run any code."""

import os
import re
from collections.abc import Mapping
from pydoc import locate
from types import FunctionType
from typing import Any

from torch import nn

TRUSTED = "nnUNet_topomae_networks"  # environment variable: packages of the user whose networks plans may name
_NETWORKS = ("dynamic_network_architectures", "nnunet_topomae.networks")
_PARTS = (*_NETWORKS, "torch.nn")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_class_names(architecture: Mapping[str, Any]) -> None:
    """Make sure that the classes in the ``architecture`` of a configuration are networks and parts of networks.

    The names are checked before anything is imported, and what is found under them before anything is called, as
    names such as ``torch.nn.parallel.distributed.os.system`` lead out of their package.

    Args:
        architecture: with ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``.

    Raises:
        ValueError: names the key, and the class that plans must not name.
    """
    for key in ("network_class_name", "arch_kwargs", "_kw_requires_import"):
        if key not in architecture:
            raise ValueError(f'architecture has no "{key}"; plan the dataset again')
    name, kwargs, imported = (architecture[key] for key in ("network_class_name", "arch_kwargs", "_kw_requires_import"))
    if not isinstance(kwargs, Mapping) or not isinstance(imported, list):
        raise ValueError("architecture.arch_kwargs must be an object, and architecture._kw_requires_import a list")
    if missing := [key for key in imported if key not in kwargs]:
        raise ValueError(
            f"architecture._kw_requires_import lists {missing[0]!r}, which is not in architecture.arch_kwargs"
        )
    trusted = tuple(package for package in os.environ.get(TRUSTED, "").split(os.pathsep) if package)
    named = {f"architecture.arch_kwargs.{key}": kwargs[key] for key in imported if kwargs[key] is not None}
    _check(f"architecture {name}", name, (*_NETWORKS, *trusted))
    for where, part in named.items():
        _check(where, part, (*_PARTS, *trusted))


def _check(where: str, name: Any, packages: tuple[str, ...]) -> None:
    refused = ValueError(
        f"{where}: {name!r} is no network or part of one in {', '.join(packages)}, and plans that name other things "
        f"could run any code; if you trust a package of your own, name it in the environment variable {TRUSTED}"
    )
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not _within(name, packages):
        raise refused
    found: Any = locate(name)
    if found is None:
        raise ValueError(f"{where}: there is no {name}")
    is_part = isinstance(found, FunctionType) or (isinstance(found, type) and issubclass(found, nn.Module))
    if not is_part or not _within(f"{found.__module__}.", packages):
        raise refused


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{package}.") for package in packages)
