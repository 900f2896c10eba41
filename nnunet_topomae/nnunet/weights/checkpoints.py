"""Reading and writing checkpoints that hold tensors and plain types only, no code, and are never half-written."""

import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from nnunet_topomae.files import write_file

WEIGHTS = "network_weights"  # nnU-Net's key
UNTRAINED = "untrained_parameters"  # names, written by pre-training
DRAWN_FROM = "drawn_from"  # names of the cases, written by pre-training
VALIDATED_ON = "validated_on"  # the same
FINETUNED_BY = "finetuned_by"  # name of our trainer, written by fine-tuning; nnU-Net predicts with its own
FIXED = "fixed_parameters"  # those of the untrained ones whose first values are meant to stay
STEPS_DONE = "steps_of_epoch"  # what the steps of an epoch that is not complete have returned
VERSIONS = "versions"  # of the packages that a run was continued with last
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # of a module that NumPy 2 has renamed
_PLAIN: list[Any] = [  # of checkpoints of nnU-Net's own trainers; none of it runs code from a file
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    torch.device,
]
_REAL = {  # types of weights
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
_DAMAGES = (RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError, LookupError, AttributeError)


def write_checkpoint(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Save tensors and plain Python types; see :func:`nnunet_topomae.files.write_file`.

    Raises:
        ValueError: if weights are NaN or inf; nothing is written then.
        OSError: if the disk is full, or the folder must not be written to.
    """
    plain = to_plain(checkpoint)
    check_finite_weights(plain.get(WEIGHTS, {}), f"{file} is not written: the network")
    write_file(file, lambda stream: torch.save(plain, stream))


def check_finite_weights(weights: Mapping[str, Any], what: str) -> None:
    """Refuse weights of a training that has diverged.

    Args:
        weights: tensors by name.
        what: the beginning of the sentence.

    Raises:
        ValueError: says how many tensors hold NaN or inf, and names the first.
    """
    broken = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(
            f"{what} holds NaN or inf in {len(broken)} of {len(weights)} tensors, such as {broken[0]}; its training "
            f"has diverged, so use a checkpoint from before, or train with a lower base_lr"
        )


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


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
    """Load a checkpoint, of this package or of nnU-Net's own trainers, without executing anything it might hold.

    Raises:
        ValueError: if the file is missing, truncated or changed, holds more than tensors and plain types, no network,
            or a network whose training has diverged.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    _check_sums(file)
    return checked(load_plain(file, file, device), file)


def checked(checkpoint: Any, file: Path | str) -> dict[str, Any]:
    """A checkpoint, once it is known that it holds what the rest of the package expects of one.

    Args:
        checkpoint: what a file holds.
        file: its name, for messages.

    Raises:
        ValueError: if it holds no network, weights that are no plain tensors, or a network whose training has diverged.
    """
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(WEIGHTS), dict):
        raise ValueError(f'{file} is no nnU-Net checkpoint: it has no "{WEIGHTS}"')
    for name, value in checkpoint[WEIGHTS].items():
        if not isinstance(name, str) or not _is_plain_tensor(value):
            raise ValueError(f"{file} is no nnU-Net checkpoint: {name!r} names no dense tensor of real numbers")
    for key in (UNTRAINED, FIXED, DRAWN_FROM, VALIDATED_ON):
        _names(checkpoint, key, file)
    made_with = checkpoint.get("init_args", {})
    if not isinstance(made_with, dict) or not isinstance(made_with.get("plans", {}), dict):
        raise ValueError(f'{file} is no nnU-Net checkpoint: "init_args" must be an object that holds the plans')
    check_finite_weights(checkpoint[WEIGHTS], f"{file}: the network")
    return checkpoint


def _is_plain_tensor(value: Any) -> bool:
    """Whether all numbers of a tensor are in the file, each for itself: a small file may describe a tensor of any size.

    Types of fewer bits, quantised and complex ones are no weights of nnU-Net's networks.
    """
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or value.dtype not in _REAL:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _names(checkpoint: Mapping[str, Any], key: str, file: Path | str) -> list[str]:
    """A list of names in a checkpoint, empty if it has none of that key."""
    names = checkpoint.get(key, [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{file} is no nnU-Net checkpoint: "{key}" must be a list of names')
    return list(names)


def load_plain(
    stream: Path | IO[bytes], file: Path | str, device: torch.device | str = "cpu", *, mmap: bool = False
) -> Any:
    """What a file holds, if it holds nothing but tensors and plain types.

    Args:
        stream: the file, or what it can be read from.
        file: its name, for messages.
        device: where tensors are put.
        mmap: leave tensors unread until they are used.

    Raises:
        ValueError: if it is damaged, or holds more than that.
    """
    try:
        return _load(stream, file, device, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is no checkpoint, or holds more than tensors and plain Python types, which is not loaded "
            f"because it could execute code: {_reason(error)}"
        ) from error


def most_trained_first(files: Iterable[Path]) -> list[Path]:
    """Sort the checkpoints of a fold by how far its training had come, without reading their tensors.

    A training that was begun anew comes before the one it replaces. Files that cannot be read come first, so that they
    are named and not passed over.
    """
    return sorted(files, key=_progress, reverse=True)


def _progress(file: Path) -> tuple[float, ...]:
    """When the training was begun, its epochs, the steps of the next one; at last the file's time stamp.

    Copying may change time stamps, so they count only where all else is the same.
    """
    try:
        record = read_record(file)
        begun = [*record.get("logging", {}).get("epoch_start_timestamps", ()), 0.0][0]
        epochs, steps = record.get("current_epoch", 0), len(record.get(STEPS_DONE, ()))
        return float(begun), float(epochs), steps, file.stat().st_mtime_ns
    except (ValueError, TypeError, AttributeError):
        return (math.inf,)


def most_trained(files: Iterable[Path], device: torch.device | str = "cpu") -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that a run goes on from: of those that can be read the one that was trained most.

    Args:
        files: checkpoints of a run.
        device: where tensors are put.

    Returns:
        The file, its content, and what is wrong with those that come before it.

    Raises:
        ValueError: if none can be read; says what is wrong with each.
    """
    problems: list[str] = []
    for file in most_trained_first(files):
        try:
            return file, read_checkpoint(file, device), problems
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))


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
    return {case for case in _names(_peek(file), DRAWN_FROM, file) if "/" not in case}


def cases_seen(checkpoint: Mapping[str, Any], dataset: str) -> set[str]:
    """The cases that a pre-training drew from, none if its checkpoint does not say.

    Args:
        checkpoint: of any dataset.
        dataset: whose own cases have their plain names; those of others are ``DatasetXXX_Name/CASE``.
    """
    own = checkpoint.get("init_args", {}).get("plans", {}).get("dataset_name", dataset)
    full = (case if "/" in case else f"{own}/{case}" for case in checkpoint.get(DRAWN_FROM, ()))
    return {case.removeprefix(f"{dataset}/") for case in full}


def read_record(file: Path) -> dict[str, Any]:
    """What a checkpoint, of this package or of nnU-Net's own trainers, says of its run; its tensors are not read.

    Raises:
        ValueError: if the file is damaged, could execute code, or is no checkpoint.
    """
    record = load_plain(file, file, mmap=True)
    if not isinstance(record, dict):
        raise ValueError(f"{file} is no nnU-Net checkpoint: it holds {type(record).__name__}")
    return {key: value for key, value in record.items() if key != WEIGHTS}


def _peek(file: Path) -> dict[str, Any]:
    """What a file holds, its tensors unread; nothing if that could execute code."""
    try:
        checkpoint = _load(file, file, mmap=True)
    except pickle.UnpicklingError:
        return {}
    return checkpoint if isinstance(checkpoint, dict) else {}


def _check_sums(file: Path) -> None:
    """Compare the content with the check sums that PyTorch wrote beside it, which it does not do when it reads."""
    if not zipfile.is_zipfile(file):
        return  # cut off, or of a PyTorch before 1.6, which knew no check sums
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except _DAMAGES as error:
        damaged = _reason(error)
    if damaged:
        raise ValueError(f"{file} is damaged, truncated or no checkpoint: bytes have changed in {damaged}")


def _load(stream: Any, file: Path | str, device: torch.device | str = "cpu", *, mmap: bool = False) -> Any:
    """What a file holds; with ``mmap`` tensors are not read before they are used.

    Raises:
        pickle.UnpicklingError: if it holds more than tensors and plain types, or no pickle at all.
        ValueError: if it is damaged.
    """
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(stream, map_location=device, weights_only=True, mmap=mmap)
    except _DAMAGES as error:
        raise ValueError(f"{file} is damaged, truncated or no checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, LookupError | AttributeError):  # their text is a mere key, or is about the reader
        return "its parts do not fit together"
    return next(iter(str(error).splitlines()), type(error).__name__)
