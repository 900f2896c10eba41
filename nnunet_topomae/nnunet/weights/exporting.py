"""``nnUNetv2_topomae export``: weights as safetensors, a format that cannot hold code, with a card."""

import hashlib
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nnunet_topomae import __version__
from nnunet_topomae.files import read_json, write_file, write_json
from nnunet_topomae.nnunet.weights.checkpoints import (
    DRAWN_FROM,
    FINETUNED_BY,
    FIXED,
    UNTRAINED,
    WEIGHTS,
    checked,
    read_checkpoint,
    to_plain,
)

CARD, _TENSORS, _README = "card.json", "weights.safetensors", "README.md"
TRAINED_ON = "trained_on_sha256"  # key of the card
_KEPT = (
    UNTRAINED,
    FIXED,
    "trainer_name",
    FINETUNED_BY,
    "current_epoch",
    "inference_allowed_mirroring_axes",
)
_DESCRIPTION = (  # keys of dataset.json; nnU-Net's "dataset" names cases and files, and others may hold any text
    "channel_names",
    "modality",
    "labels",
    "regions_class_order",
    "numTraining",
    "file_ending",
    "overwrite_image_reader_writer",
)
_PACKAGES = ("nnunet-topomae", "nnunetv2", "torch", "dynamic-network-architectures", "timm")
_CARD_TEXT = """# {trainer} of {dataset}

Weights that [nnunet_topomae](https://pypi.org/project/nnunet-topomae/) {version} exported, {parameters:,} parameters.
`{tensors}` holds the tensors, `{card}` the plans, the settings and the versions of the packages. Neither can run code.

    nnUNetv2_topomae inspect FOLDER
    nnUNetv2_topomae adapt FOLDER -d ID -p PLANS -c CONFIGURATION -o OUT.pth

Names of cases are left out; their SHA-256 is in `{card}`, so whoever has the names can tell what was trained on.

Licence: the weights are under the licence of the images that they were trained on, which is not known here. The package
is under Apache-2.0.
"""


def export(file: Path, folder: Path) -> Path:
    """Write the weights of a checkpoint as safetensors, with a card for people (README.md) and one for programs (JSON).

    Names of cases are left out: those that were drawn from are hashed, and of dataset.json the card has only what
    describes images and labels.

    Args:
        file: a checkpoint; the states of its optimiser and of the random generators are left out.
        folder: to write; must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        ValueError: if the checkpoint cannot be read, or the folder holds something.
    """
    checkpoint = read_checkpoint(file)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; name a new folder")
    tensors = {
        name: value.detach().cpu().contiguous().clone()  # blocks that share a tensor get one each
        for name, value in checkpoint[WEIGHTS].items()
        if isinstance(value, Tensor)
    }
    card = {
        **{key: to_plain(checkpoint[key]) for key in _KEPT if key in checkpoint},
        "init_args": _without_cases(checkpoint.get("init_args", {})),
        TRAINED_ON: sorted(map(hashed, checkpoint.get(DRAWN_FROM, ()))),
        "versions": {package: _version(package) for package in _PACKAGES},
    }
    plans = card["init_args"].get("plans", {})
    text = _CARD_TEXT.format(
        trainer=card.get(FINETUNED_BY, card.get("trainer_name")),
        dataset=plans.get("dataset_name"),
        version=__version__,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        tensors=_TENSORS,
        card=CARD,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as unfinished:
        whole = Path(unfinished, folder.name)
        whole.mkdir()
        write_file(whole / _TENSORS, lambda stream: stream.write(save(tensors)))
        write_json(card, whole / CARD)
        write_file(whole / _README, lambda stream: stream.write(text.encode()))
        whole.replace(folder)
    return folder


def _without_cases(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer was made with; of dataset.json those keys alone that describe images and labels."""
    plain = to_plain(arguments)
    description = plain.pop("dataset_json", None)
    if isinstance(description, dict):
        plain["dataset_json"] = {key: description[key] for key in _DESCRIPTION if key in description}
    return plain


def is_export(folder: Path) -> bool:
    """Whether a folder was written by :func:`export`."""
    return (folder / CARD).is_file()


def read_export(folder: Path) -> dict[str, Any]:
    """Read a folder that :func:`export` wrote, as a checkpoint.

    Raises:
        ValueError: if a file in it is missing or damaged, or the network's training has diverged.
    """
    card, file = read_json(folder / CARD), folder / _TENSORS
    try:
        tensors: Mapping[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or missing: {error}") from error
    return checked({**card, WEIGHTS: dict(tensors)}, folder)


def hashed(case: str) -> str:
    """The SHA-256 of the name of a case."""
    return hashlib.sha256(case.encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
