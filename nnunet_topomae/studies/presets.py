"""The rows that a study can have: which plans, which trainers, which settings; and named lists of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_topomae.methods.alice.settings import AliceConfig

TOPOMAE_PLANS = "nnUNetTopoMAEPlans"
_FUSED, _ANY = "FusedFinetuneTrainer", "PretrainedFinetuneTrainer"
_RESENC = "nnUNetResEncUNetMPlans"
_UNETR = "nnUNetTopoMAEUNETRPlans"
_HYBRID = "nnUNetTopoMAEHybridPlans"
_VIT_ONLY: dict[str, Any] = {"pretraining.branches": ["vit"]}
_OWN_RATE_OF_ALICE = {key: getattr(AliceConfig, key) for key in ("base_lr", "scale_lr", "weight_decay")}  # defaults
_NO_TOPOLOGY: dict[str, Any] = {"pretraining.topology.enabled": False}
_NO_SPATIAL: dict[str, Any] = {"pretraining.spatial.enabled": False}


@dataclass(frozen=True)
class RowKind:
    """A row before it is planned for a dataset.

    Attributes:
        title: what stands in tables.
        finetuner: trainer of the segmentation.
        pretrainer: trainer of the pre-training; None for a row from scratch.
        plans: plans that the row starts from; None for those that the study is made with.
        settings: changes of the plans' configuration, by dotted key.
        without_vit: whether the fused network is replaced by its UNETR++.
        baselines: rows that this one is compared with: the first of them that is in the study, otherwise the first row
            from scratch.
    """

    title: str
    finetuner: str
    pretrainer: str | None = None
    plans: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    without_vit: bool = False
    baselines: Sequence[str] = ()


def _topomae(title: str, baselines: Sequence[str], **settings: Any) -> RowKind:
    return RowKind(title, _FUSED, "TopoMAEPretrainer", settings=settings, baselines=baselines)


def _mim(title: str, **settings: Any) -> RowKind:
    """A row of MiM on the hybrid network, with settings of the ``pretraining`` block."""
    keys = {f"pretraining.{key}": value for key, value in settings.items()}
    return RowKind(title, _ANY, "MiMPretrainer", _HYBRID, keys, baselines=["hybrid"])


def _alice(title: str, **settings: Any) -> RowKind:
    """A row of Alice on plans whose ``pretraining`` block is that of MAE, but for these settings."""
    settings = {**_OWN_RATE_OF_ALICE, **settings}
    named = {f"pretraining.{key}": value for key, value in settings.items()}
    return RowKind(title, _ANY, "AlicePretrainer", _UNETR, named, baselines=["unetr"])


KINDS: dict[str, RowKind] = {
    "scratch": RowKind("UNETR++ with ViT from scratch", _FUSED),
    "topomae": _topomae("TopoMAE", ["scratch"]),
    "unetrpp": RowKind("UNETR++ from scratch", _FUSED, without_vit=True),
    "vit": _topomae("ViT pre-trained", ["unetrpp", "scratch"], **_VIT_ONLY, **_NO_SPATIAL, **_NO_TOPOLOGY),
    "spatial": _topomae("ViT pre-trained, with spatial task", ["unetrpp", "scratch"], **_VIT_ONLY, **_NO_TOPOLOGY),
    "topology": _topomae("ViT pre-trained, with spatial task and topology", ["unetrpp", "scratch"], **_VIT_ONLY),
    "copretrained": _topomae("ViT and UNETR++ co-pre-trained (TopoMAE)", ["unetrpp", "scratch"]),
    "nnunet": RowKind("nnU-Net from scratch", _ANY, plans="nnUNetPlans"),
    "resenc": RowKind("nnU-Net ResEnc M from scratch", _ANY, plans=_RESENC),
    "spark": RowKind("SparK, ResEnc M", _ANY, "SparKPretrainer", _RESENC, baselines=["resenc"]),
    "anatomask": RowKind("AnatoMask, ResEnc M", _ANY, "AnatoMaskPretrainer", _RESENC, baselines=["resenc"]),
    "unetr": RowKind("UNETR from scratch", _ANY, plans=_UNETR),
    "mae": RowKind("MAE + UNETR", _ANY, "MAEPretrainer", _UNETR, baselines=["unetr"]),
    "hybrid": RowKind("MiM's hybrid network from scratch", _ANY, plans=_HYBRID),
    "mim": _mim("MiM"),
    "mimr1": _mim("MiM, level 1 only", levels=1),
    "mimr2": _mim("MiM, levels 1 and 2, no alignment", levels=2, alignment="off"),
    "mimr3": _mim("MiM, no alignment", alignment="off"),
    "mimc12": _mim("MiM, alignment of levels 1 and 2 only", alignment_weights=[0.1, 0.0]),
    "mimtwolevels": _mim("MiM, levels 1 and 2", levels=2),
    "mimvisible": _mim("MiM, volumes cut from visible patches", children="visible"),
    "mimbyol": _mim("MiM, no negatives", alignment="byol"),
    "mimcoarse": _mim("MiM, coarse to fine", weight_schedule="coarse_to_fine"),
    "mimfine": _mim("MiM, fine to coarse", weight_schedule="fine_to_coarse"),
    "alice": _alice("Alice + UNETR"),
    "aliceposition": _alice("Alice, pairs by position", matcher="position"),
    "aliceonevolume": _alice("Alice, without pairs", matcher="same_volume", l_dv=False),
    "alicewithoutcasa": _alice("Alice, without CASA", casa=False),
}
PRESETS = {  # labels: any row against its baseline
    "table6": ["unetrpp", "vit", "spatial", "topology", "copretrained"],
    "methods": ["nnunet", "resenc", "spark", "anatomask", "mae", "scratch", "topomae"],
    "mim": [  # Tables 10, 11, 12 and 14 and Fig. 7 of the paper of MiM
        *("hybrid", "mimr1", "mimr2", "mimr3", "mimc12", "mimtwolevels"),
        *("mimvisible", "mimbyol", "mimcoarse", "mimfine", "mim"),
    ],
    "alice": ["unetr", "mae", "alice", "aliceposition", "aliceonevolume", "alicewithoutcasa"],
    "labels": ["topomae"],
}
LABEL_COUNTS = (5, 10, 20, 40)  # of the preset labels


def kinds_of(names: Sequence[str], preset: str | None) -> dict[str, RowKind]:
    """The rows of a study by name.

    Args:
        names: of ``KINDS``, or rows of one's own: ``NAME=PLANS:FINETUNER`` or ``NAME=PLANS:FINETUNER:PRETRAINER``.
        preset: a key of ``PRESETS``, whose rows come first; with ``labels``, ``names`` take the place of its row, and
            each row's baseline is added.

    Raises:
        ValueError: names a row that there is not, or that is there twice.
    """
    if preset == "labels":
        names = [each for name in names or PRESETS[preset] for each in (*_parse(name)[1].baselines[:1], name)]
        names = list(dict.fromkeys(names))
    elif preset:
        names = [*PRESETS[preset], *names]
    kinds: dict[str, RowKind] = {}
    for text in names:
        name, kind = _parse(text)
        if name in kinds:
            raise ValueError(f"the row {name} is there twice; give one of them another name")
        kinds[name] = kind
    if not kinds:
        raise ValueError(
            f"a study needs --rows or --preset {', '.join(PRESETS)}; there are the rows {', '.join(KINDS)}"
        )
    return kinds


def _parse(text: str) -> tuple[str, RowKind]:
    """Name and kind of a row as it stands on the command line."""
    if text in KINDS:
        return text, KINDS[text]
    name, _, definition = text.partition("=")
    plans, *trainers = definition.split(":")
    if not (name.isalnum() and plans and len(trainers) in (1, 2) and all(trainers)):
        raise ValueError(
            f"there is no row {text}; there are {', '.join(KINDS)}, and rows of your own, written as "
            f"NAME=PLANS:FINETUNER or NAME=PLANS:FINETUNER:PRETRAINER, with a NAME of letters and digits"
        )
    pretrainer = trainers[1] if len(trainers) == 2 else None
    title = f"{name} ({pretrainer or 'from scratch'})"
    return name, RowKind(title, trainers[0], pretrainer, plans)


def baseline_of(name: str, kinds: Mapping[str, RowKind]) -> str | None:
    """The row from scratch that a pre-trained row is compared with; None for rows from scratch."""
    if kinds[name].pretrainer is None:
        return None
    scratch = [other for other, kind in kinds.items() if kind.pretrainer is None]
    same_network = [
        other for other in scratch if kinds[name].plans is not None and kinds[other].plans == kinds[name].plans
    ]
    wanted = [other for other in kinds[name].baselines if other in scratch]
    return next(iter([*wanted, *same_network, *scratch]), None)
