"""Recipes: named sets of defaults for fine-tuning, each as its source publishes it."""

from collections.abc import Callable, Mapping
from typing import Any

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "poly")
SCHEDULE_STEPS = ("iteration", "epoch")

_NUM_EPOCHS = 1000  # nnU-Net's
_LONGEST_PHASE = 50  # epochs


def _default(num_epochs: float) -> dict[str, Any]:
    """The paper's optimiser and rate; a warm-up of 5 %, as in MAE."""
    return {"warmup_epochs": min(_LONGEST_PHASE, num_epochs / 20)}


def _anatomask(_: float) -> dict[str, Any]:
    """AnatoMask's released code: AdamW at 1e-4 whatever the batch, no warm-up, a new rate every epoch."""
    return {
        "base_lr": 1e-4,
        "scale_lr": False,
        "weight_decay": 1e-5,
        "eps": 1e-4,
        "warmup_epochs": 0,
        "schedule_step": "epoch",
        "layer_decay": 1.0,
    }


def _nnssl(num_epochs: float) -> dict[str, Any]:
    """The released code of nnssl for CNNs (OpenMind): nnU-Net's SGD at a tenth of its rate, after a warm-up."""
    return {
        "base_lr": 1e-3,
        "scale_lr": False,
        "weight_decay": 3e-5,
        "optimizer": "sgd",
        "momentum": 0.99,
        "schedule": "poly",
        "schedule_step": "epoch",
        "warmup_epochs": min(_LONGEST_PHASE, num_epochs / 10),
        "layer_decay": 1.0,
    }


def _staged(num_epochs: float) -> dict[str, Any]:
    """The default after a phase in which only fresh parts learn, as long as in nnssl's "sawtooth" (OpenMind's best)."""
    phase = min(_LONGEST_PHASE, num_epochs / 10)
    return {"freeze_epochs": phase, "warmup_epochs": phase}


def _frozen(num_epochs: float) -> dict[str, Any]:
    """The default, but the pre-trained encoder keeps its weights."""
    return {**_default(num_epochs), "encoder_lr": 0.0}


_RECIPES: dict[str, Callable[[float], dict[str, Any]]] = {
    "default": _default,
    "anatomask": _anatomask,
    "nnssl": _nnssl,
    "staged": _staged,
    "frozen": _frozen,
}
RECIPES = tuple(_RECIPES)


def recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the recipe of a ``finetuning`` block sets; none where its name or ``num_epochs`` is wrong."""
    name, num_epochs = values.get("recipe", "default"), values.get("num_epochs", _NUM_EPOCHS)
    return _RECIPES[name](num_epochs) if name in RECIPES and isinstance(num_epochs, int) else {}
