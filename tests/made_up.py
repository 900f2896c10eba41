"""A small study with made-up results, in the form that studies leave behind."""

import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter, shift

from nnunet_topomae.commands.phantom import LABELS, make_case, write_dataset
from nnunet_topomae.files import write_json
from nnunet_topomae.reporting.figures import Geometry, plane_names
from nnunet_topomae.reporting.report import CaseReport, save_report
from nnunet_topomae.studies.definition import Row, Run, Study, predictions_folder
from nnunet_topomae.studies.measures import Measures
from nnunet_topomae.studies.records import Record, write_records
from nnunet_topomae.topology import persistence_diagrams

DATASET = "Dataset997_MadeUp"
ROWS = {  # title, trainer of pre-training, Dice with 5 and 10 labelled cases
    "scratch": ("UNETR++ with ViT from scratch", None, (0.70, 0.80)),
    "spark": ("SparK", "SparKPretrainer", (0.74, 0.82)),
    "topomae": ("TopoMAE", "TopoMAEPretrainer", (0.79, 0.84)),
}
COUNTS, SEEDS, NUM_CASES = (5, 10), (0, 1), 5
STRUCTURES = [name for name, value in LABELS.items() if value]
FINETUNER = "FusedFinetuneTrainer"


def write_study(folder: Path, *, with_runs: bool = True) -> Path:
    """Raw dataset, plans, study and the folds of its runs below ``folder``; returns the study's folder."""
    write_dataset(folder / "raw" / DATASET, NUM_CASES, 0)
    study = define(folder / "study")
    study.folder.mkdir(parents=True)
    study.write()
    write_records(_records(), study.folder / "results.csv")
    _write_predictions(folder / "raw" / DATASET / "labelsTr", study)
    if with_runs:
        for number, row in enumerate(study.rows):
            _write_runs(folder, row, 10 * number)
    return study.folder


def define(folder: Path) -> Study:
    """The study alone; nothing is written."""
    rows = [
        Row(
            name,
            title,
            pretrainer,
            FINETUNER,
            {"pretraining.mask_ratio": 0.6} if name == "spark" else {},
            pretrainer is None,
            "scratch" if pretrainer else None,
            [Run(count, seed, f"study_{name}_seed{seed}", fold) for seed in SEEDS for fold, count in enumerate(COUNTS)],
        )
        for name, (title, pretrainer, _) in ROWS.items()
    ]
    cases = [f"phantom_{case:03d}" for case in range(NUM_CASES)]
    return Study(folder, DATASET, "3d_fullres", COUNTS, SEEDS, cases, 1.0, rows)


def _records() -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for name, (_, _, means) in ROWS.items():
        for (count, mean), seed, case, structure in product(
            zip(COUNTS, means, strict=True), SEEDS, range(NUM_CASES), STRUCTURES
        ):
            dice = float(np.clip(mean + 0.02 * case - 0.04 + rng.normal(0, 0.02), 0, 1))
            hd95 = None if rng.random() < 0.1 else 12 * (1 - dice)
            measures = Measures(dice, hd95, dice + 0.05, *rng.integers(0, 4, 3).astype(float).tolist())
            yield Record(name, count, seed, f"phantom_{case:03d}", structure, measures)


def _write_predictions(labels: Path, study: Study) -> None:
    for index, row in enumerate(study.rows):
        for run in row.runs:
            target = predictions_folder(study.folder, row.name, run.labelled, run.seed)
            target.mkdir(parents=True)
            for file in labels.iterdir():
                label = sitk.ReadImage(str(file))
                moved = shift(sitk.GetArrayFromImage(label), (1, 2 - index, run.seed), order=0)
                prediction = sitk.GetImageFromArray(moved)
                prediction.CopyInformation(label)
                sitk.WriteImage(prediction, str(target / file.name))


def _write_runs(folder: Path, row: Row, number: int) -> None:
    """Plans of every seed, its pre-training, and all fine-tunings."""
    results, preprocessed = folder / "results" / DATASET, folder / "preprocessed" / DATASET
    preprocessed.mkdir(parents=True, exist_ok=True)
    for plans, seed in dict.fromkeys((run.plans, run.seed) for run in row.runs):
        write_json(planned(DATASET, plans, seed=seed), preprocessed / f"{plans}.json")
        if row.pretrainer:
            branches = ("vit", "unetrpp") if row.name == "topomae" else ("network",)
            fold = write_fold(results, row.pretrainer, plans, 0, pretraining_log(branches, number + seed))
            _write_validation(fold / "validation", branches)
    for run in row.runs:
        write_fold(results, FINETUNER, run.plans, run.fold, finetuning_log(number + run.seed + run.fold))


def _write_validation(folder: Path, branches) -> None:
    folder.mkdir()
    image = make_case(0, (24, 32, 32))[0].astype(np.float32)[None]
    rough = [gaussian_filter(image, (0, width, width, width)) for width in (2, 1, 0.7)]
    names = ["input", "masked", "harmonic inpainting", *branches]
    volumes = dict(zip(names, (image, rough[0], rough[0], *rough[1:]), strict=False))
    diagrams = {
        name: [diagram.numpy() for diagram in persistence_diagrams(torch.from_numpy(volumes[name][0, ::2, ::2, ::2]))]
        for name in ("input", *branches)
    }
    metrics = {branch: {"MSE": 0.2, "PSNR": None} for branch in branches} | {"harmonic inpainting": {"MSE": 0.4}}
    reports = [("phantom_000", CaseReport(volumes, metrics, diagrams))]
    save_report(reports, folder, Geometry((2, 2, 2), plane_names()), "harmonic inpainting")


def planned(dataset: str, plans: str, finetuning: dict | None = None, **pretraining) -> dict:
    """Plans as far as they are read."""
    configuration = {"batch_size": 2, "pretraining": {"seed": 3, **pretraining}, "finetuning": finetuning or {}}
    return {"dataset_name": dataset, "plans_name": plans, "configurations": {"3d_fullres": configuration}}


def write_fold(results: Path, trainer: str, plans: str, fold: int, log: dict, finetuning: dict | None = None) -> Path:
    """The folder of a fold with a checkpoint that holds a log."""
    folder = results / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}"
    folder.mkdir(parents=True)
    description = {"labels": LABELS, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    arguments = {"plans": planned(results.name, plans, finetuning or {"seed": fold}), "configuration": "3d_fullres",
                 "fold": fold, "dataset_json": description}  # fmt: skip
    versions = {"nnunet-topomae": "0.1", "nnunetv2": "2.8.1", "torch": "2.9.0"}
    if trainer == FINETUNER:
        written_by = {"trainer_name": "nnUNetTrainer", "finetuned_by": trainer}
    else:
        written_by = {"trainer_name": trainer, "untrained_parameters": []}
    checkpoint = {"network_weights": {}, "logging": log, "init_args": arguments, "versions": versions, **written_by}
    torch.save(checkpoint, folder / "checkpoint_final.pth")
    (folder / "debug.json").write_text(json.dumps({"device": "cuda", "gpu_name": "NVIDIA H100", "hostname": "ward-7"}))
    return folder


def _falling(first: float, last: float, seed: int, epochs: int = 40) -> list[float]:
    noise = gaussian_filter(np.random.default_rng(seed).normal(0, 0.08, epochs), 1)
    return ((last + (first - last) * np.exp(-np.arange(epochs) / 9)) * (1 + noise)).tolist()


def _times(epochs: int = 40) -> dict[str, list[float]]:
    now = time.mktime((2026, 1, 1, 0, 0, 0, 0, 0, 0))
    starts = [now + 95.0 * epoch for epoch in range(epochs)]
    return {"epoch_start_timestamps": starts, "epoch_end_timestamps": [start + 90 for start in starts]}


def pretraining_log(branches=("vit", "unetrpp"), seed=0) -> dict[str, list[float]]:
    """Terms of the loss and skills, as :class:`PretrainingLogger` leaves them."""
    terms = [f"{branch}_{term}" for branch in branches for term in ("mse", "topological", "spatial")]
    log = {
        f"{split}_{term}": _falling(1, 0.2, seed + len(split + term))
        for term in ("losses", *terms)
        for split in ("train", "val")
    }
    log |= {
        f"skill_{branch}": [1 - 1.4 * value for value in _falling(1.5, 0.5, seed + len(branch))] for branch in branches
    }
    return {**log, "lrs": _falling(1e-3, 1e-6, 5), **_times()}


def finetuning_log(seed: int) -> dict[str, list[float]]:
    """What nnU-Net logs."""
    dice = [1 - value for value in _falling(0.9, 0.2, seed)]
    return {
        "mean_fg_dice": dice,
        "ema_fg_dice": dice,
        "dice_per_class_or_region": [[value] * len(STRUCTURES) for value in dice],
        "train_losses": [value - 1 for value in _falling(1, 0.1, seed)],
        "val_losses": [value - 1 for value in _falling(1, 0.25, seed + 9)],
        "lrs": _falling(1e-2, 1e-5, 5),
        **_times(),
    }
