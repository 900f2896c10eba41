"""Reading and writing checkpoints that hold tensors and plain types only, no code, and are never half-written."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_topomae.files import write_file

WEIGHTS = "network_weights"  # nnU-Net's key
UNTRAINED = "untrained_parameters"  # names, written by pre-training
DRAWN_FROM = "drawn_from"  # names of the cases, written by pre-training
FIXED = "fixed_parameters"  # those of them whose first values are meant to stay
VERSIONS = "versions"  # of the packages that a run was continued with last
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [  # of NumPy, whose module has moved between its versions 1 and 2
    np.dtype,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "bool")),
]
_DAMAGES = (RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError, LookupError, AttributeError)


def write_checkpoint(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Save tensors and plain Python types; see :func:`nnunet_topomae.files.write_file`."""
    plain = to_plain(checkpoint)
    write_file(file, lambda stream: torch.save(plain, stream))


def to_plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays, devices and paths inside nested containers into plain Python types.

    Raises:
        TypeError: for anything else that a checkpoint must not hold.
    """
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, torch.device | Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain types only, got {type(value).__name__}: {value!r}")


def read_checkpoint(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint without executing anything it might hold.

    Raises:
        ValueError: if the file is missing, truncated, holds more than tensors and plain types, or no network.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    try:
        checkpoint = _load(file, device)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is no checkpoint, or holds more than tensors and plain Python types, which is not loaded "
            f"because it could execute code: {_first_line(error)}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(WEIGHTS), dict):
        raise ValueError(f'{file} is no nnU-Net checkpoint: it has no "{WEIGHTS}"')
    return checkpoint


def is_pretrained(file: Path) -> bool:
    """Whether a checkpoint was left by pre-training; those of nnU-Net's own trainers are recognised and left alone.

    Raises:
        ValueError: if the file is damaged.
    """
    return UNTRAINED in _peek(file)


def drawn_from(file: Path) -> set[str]:
    """The cases that a pre-training drew from, those of other datasets aside; none if its checkpoint does not say.

    Raises:
        ValueError: if the file is damaged.
    """
    return {case for case in _peek(file).get(DRAWN_FROM, ()) if "/" not in case}


def read_record(file: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; its tensors are not read.

    Checkpoints of nnU-Net's own trainers are read too: beside plain types these hold numbers of NumPy and a device,
    which can be read without executing code.

    Raises:
        ValueError: if the file is damaged, holds anything else, or is no checkpoint.
    """
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            record = _load(file, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is not read, because it could execute code: {_first_line(error)}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is no nnU-Net checkpoint: it holds {type(record).__name__}")
    return {key: value for key, value in record.items() if key != WEIGHTS}


def _peek(file: Path) -> dict[str, Any]:
    """What a file holds, its tensors unread; nothing if that could execute code, as in files of nnU-Net's trainers."""
    try:
        checkpoint = _load(file, mmap=True)
    except pickle.UnpicklingError:
        return {}
    return checkpoint if isinstance(checkpoint, dict) else {}


def _load(file: Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> Any:
    """What a file holds; with ``mmap`` tensors are not read before they are used.

    Raises:
        pickle.UnpicklingError: if it holds more than tensors and plain types, or no pickle at all.
        ValueError: if it is damaged.
    """
    try:
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    except _DAMAGES as error:
        raise ValueError(f"{file} is damaged, truncated or no checkpoint: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
