"""``nnUNetv2_topomae inspect``: what is in a file from elsewhere, without running or importing anything in it."""

import hashlib
import io
import json
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from nnunet_topomae.files import read_json
from nnunet_topomae.nnunet.weights.checkpoints import (
    DRAWN_FROM,
    FINETUNED_BY,
    WEIGHTS,
    checked,
    load_plain,
    read_checkpoint,
)
from nnunet_topomae.nnunet.weights.exporting import TRAINED_ON, hashed, is_export, read_export

_UNKNOWN = "unknown"
_NAME = "plans_name"
_PROGRAMS = (".pkl", ".py", ".pyc", ".so", ".dll")
_MAX_GROWTH = 100  # of a member that is unpacked; trained weights hardly become smaller in a zip


def inspect_file(file: Path) -> list[tuple[str, str]]:
    """Describe a checkpoint, a plans file, a model that nnU-Net exported (zip), or a folder that ``export`` wrote.

    Returns:
        Names and values, as text.

    Raises:
        ValueError: if it is something else, damaged, or could run code.
        FileNotFoundError: if there is no such file.
    """
    return [(_printable(name), _printable(value)) for name, value in _describe(file)]


def _printable(text: str) -> str:
    """Text from elsewhere without line breaks and control characters, which could pass for a line of ours."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _describe(file: Path) -> list[tuple[str, str]]:
    if is_export(file):
        return [("kind", "weights exported as safetensors, which cannot hold code"), *_checkpoint(read_export(file))]
    if file.is_dir():
        raise ValueError(f"{file} is a folder that nnUNetv2_topomae export did not write; name a file in it")
    if not file.is_file():  # nor a pipe, which could be read for ever
        raise FileNotFoundError(f"{file} does not exist")
    described = [("SHA-256", hashlib.sha256(file.read_bytes()).hexdigest())]
    if file.suffix == ".json":
        plans = read_json(file)
        if _NAME not in plans:
            raise ValueError(f'{file} is no plans file: it has no "{_NAME}"')
        return [("kind", "plans"), *described, *_plans(plans)]
    if zipfile.is_zipfile(file) and not _is_checkpoint(file):
        return [("kind", "zip of a model"), *described, *_archive(file)]
    checkpoint = read_checkpoint(file)
    safe = "yes: it holds tensors and plain types only"
    return [("kind", "checkpoint"), *described, *_checkpoint(checkpoint), ("nnU-Net's own loaders may open it", safe)]


def _is_checkpoint(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(PurePosixPath(name).name == "data.pkl" for name in archive.namelist())


def _checkpoint(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    arguments = _mapping(checkpoint.get("init_args"))
    tensors = [tensor for tensor in checkpoint[WEIGHTS].values() if isinstance(tensor, Tensor)]
    hashes = [*_names(checkpoint.get(TRAINED_ON)), *map(hashed, _names(checkpoint.get(DRAWN_FROM)))]
    yield "trainer", str(checkpoint.get(FINETUNED_BY, checkpoint.get("trainer_name", _UNKNOWN)))
    yield "configuration", str(arguments.get("configuration", _UNKNOWN))
    yield "fold", str(arguments.get("fold", _UNKNOWN))
    yield "epochs", str(checkpoint.get("current_epoch", _UNKNOWN))
    yield "parameters", f"{sum(tensor.numel() for tensor in tensors):,} in {len(tensors)} tensors"
    yield "trained on", f"{len(hashes)} cases: {', '.join(hashes)}" if hashes else _UNKNOWN
    yield from _plans(_mapping(arguments.get("plans")))


def _plans(plans: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "plans", str(plans.get(_NAME, _UNKNOWN))
    yield "dataset", str(plans.get("dataset_name", _UNKNOWN))
    for name, configuration in _mapping(plans.get("configurations")).items():
        architecture = _mapping(_mapping(configuration).get("architecture"))
        yield f"network of {name}", str(architecture.get("network_class_name", "as in the configuration it inherits"))


def _archive(file: Path) -> Iterator[tuple[str, str]]:
    """What is in a zip; checkpoints in it are read as any other, without unpacking them."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        leaving = [member.filename for member in archive.infolist() if _leaves(member)]
        yield "members", str(len(names))
        yield "members that would leave their folder", ", ".join(leaving) or "none"
        for name in names:
            if name.lower().endswith(".pth"):
                held = load_plain(io.BytesIO(_read(archive, name, file)), f"{file}: {name}")
                yield f"{name}", "holds tensors and plain types only"
                if isinstance(held, dict) and isinstance(held.get(WEIGHTS), dict):
                    yield from _checkpoint(checked(held, f"{file}: {name}"))
            elif PurePosixPath(name).name == "plans.json":
                content = _read(archive, name, file)
                try:
                    yield from _plans(_mapping(json.loads(content)))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{file}: {name} is no valid JSON: {error}") from error
            elif name.lower().endswith(_PROGRAMS):
                yield f"{name}", "WARNING: can run code; a model that nnU-Net exported has no such file"


def _leaves(member: zipfile.ZipInfo) -> bool:
    """Whether a member, unpacked on whatever system, leads out of its folder: by its name, or as a symbolic link."""
    path = PureWindowsPath(member.filename)  # which takes both kinds of slashes
    return bool(path.anchor) or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16)


def _read(archive: zipfile.ZipFile, name: str, file: Path) -> bytes:
    """The content of a member.

    Raises:
        ValueError: if it is damaged or encrypted, or would fill the memory.
    """
    member = archive.getinfo(name)
    if member.file_size > _MAX_GROWTH * member.compress_size:
        raise ValueError(
            f"{file}: {name} would grow from {member.compress_size:,} to {member.file_size:,} bytes, as no model does"
        )
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: {name} cannot be read: {error}") from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list | tuple) else []
