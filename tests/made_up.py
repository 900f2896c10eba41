"""A small study with made-up results, in the form that studies leave behind."""

import csv
import json
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter, shift

from nnunet_topomae.commands.phantom import LABELS, make_case, write_dataset
from nnunet_topomae.reporting.figures import Geometry, plane_names
from nnunet_topomae.reporting.report import CaseReport, save_report
from nnunet_topomae.reporting.study import MEASURES
from nnunet_topomae.topology import persistence_diagrams

DATASET = "Dataset997_MadeUp"
ROWS = {  # title, trainer of pre-training, Dice with 5 and 10 labelled cases
    "scratch": ("UNETR++ and ViT, from scratch", None, (0.70, 0.80)),
    "spark": ("SparK", "SparKPretrainer", (0.74, 0.82)),
    "topomae": ("TopoMAE", "TopoMAEPretrainer", (0.79, 0.84)),
}
COUNTS, SEEDS, NUM_CASES = (5, 10), (0, 1), 5
STRUCTURES = [name for name, value in LABELS.items() if value]
FINETUNER = "FusedFinetuneTrainer"
SENTENCE = "With 5 labelled cases, TopoMAE is as good as 8 from scratch (95 % interval 6 to 11)."


def write_study(folder: Path, *, with_runs: bool = True) -> Path:
    """Raw dataset, study and the folds of its runs below ``folder``; returns the study's folder."""
    write_dataset(folder / "raw" / DATASET, NUM_CASES, 0)
    study = folder / "study"
    study.mkdir(parents=True)
    (study / "study.json").write_text(json.dumps(_description(), indent=1))
    (study / "answer.json").write_text(json.dumps(_answer(), indent=1))
    _write_scores(study / "results.csv")
    _write_predictions(folder / "raw" / DATASET / "labelsTr", study / "predictions")
    if with_runs:
        for name, row in ROWS.items():
            _write_runs(folder / "results" / DATASET, name, row[1])
    return study


def _description() -> dict:
    rows = [
        {
            "name": name,
            "title": title,
            "pretrainer": pretrainer,
            "finetuner": FINETUNER,
            "differs": {"pretraining.mask_ratio": 0.6} if name == "spark" else {},
            "baseline": name == "scratch",
            "runs": [
                {"labelled": count, "seed": seed, "plans": f"study_{name}", "fold": fold * len(SEEDS) + seed}
                for fold, count in enumerate(COUNTS)
                for seed in SEEDS
            ],
        }
        for name, (title, pretrainer, _) in ROWS.items()
    ]
    return {"version": 1, "dataset": DATASET, "configuration": "3d_fullres", "label_counts": COUNTS, "seeds": SEEDS,
            "rows": rows}  # fmt: skip


def _answer() -> dict:
    comparisons = [
        {"row": row, "baseline": "scratch", "labelled": count, "difference": 0.05, "low": 0.02, "high": 0.08,
         "t_p": 0.0004, "wilcoxon_p": 0.03, "holm_p": 0.06}
        for row in ("spark", "topomae")
        for count in COUNTS
    ]  # fmt: skip
    labels = [{"row": "topomae", "labelled": 5, "equivalent": 8.0, "low": 6.0, "high": 11.0},
              {"row": "spark", "labelled": 5, "equivalent": None, "low": None, "high": None}]  # fmt: skip
    return {"sentence": SENTENCE, "measure": "dice", "comparisons": comparisons, "equivalent_labels": labels}


def _write_scores(file: Path) -> None:
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "labelled", "seed", "case", "structure", *MEASURES])
        for name, (_, _, means) in ROWS.items():
            for count, mean in zip(COUNTS, means, strict=True):
                for seed in SEEDS:
                    for case in range(NUM_CASES):
                        for structure in STRUCTURES:
                            dice = np.clip(mean + 0.02 * case - 0.04 + rng.normal(0, 0.02), 0, 1)
                            hd95 = "" if rng.random() < 0.1 else f"{12 * (1 - dice):.3f}"
                            writer.writerow([name, count, seed, f"phantom_{case:03d}", structure, f"{dice:.4f}", hd95,
                                             f"{dice + 0.05:.4f}", *rng.integers(0, 4, 3)])  # fmt: skip


def _write_predictions(labels: Path, folder: Path) -> None:
    for index, row in enumerate(ROWS):
        for count in COUNTS:
            for seed in SEEDS:
                target = folder / f"{row}_{count}_seed{seed}"
                target.mkdir(parents=True)
                for file in labels.iterdir():
                    label = sitk.ReadImage(str(file))
                    moved = shift(sitk.GetArrayFromImage(label), (1, 2 - index, seed), order=0)
                    prediction = sitk.GetImageFromArray(moved)
                    prediction.CopyInformation(label)
                    sitk.WriteImage(prediction, str(target / file.name))


def _write_runs(results: Path, name: str, pretrainer: str | None) -> None:
    seed = 10 * list(ROWS).index(name)
    if pretrainer:
        branches = ("vit", "unetrpp") if name == "topomae" else ("network",)
        folder = write_fold(results, pretrainer, f"study_{name}", 0, pretraining_log(branches, seed))
        _write_validation(folder / "validation", branches)
    for fold in range(len(COUNTS) * len(SEEDS)):
        write_fold(results, FINETUNER, f"study_{name}", fold, finetuning_log(seed + fold))


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


def write_fold(results: Path, trainer: str, plans: str, fold: int, log: dict, **settings) -> Path:
    """The folder of a fold with a checkpoint that holds a log."""
    folder = results / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}"
    folder.mkdir(parents=True)
    configuration = {"batch_size": 2, "pretraining": {"seed": 3, **settings}, "finetuning": {"seed": fold}}
    planned = {"dataset_name": results.name, "plans_name": plans, "configurations": {"3d_fullres": configuration}}
    description = {"labels": LABELS, "channel_names": {"0": "CT"}}
    arguments = {"plans": planned, "configuration": "3d_fullres", "fold": fold, "dataset_json": description}
    versions = {"nnunet-topomae": "0.1", "nnunetv2": "2.8.1", "torch": "2.9.0"}
    checkpoint = {"network_weights": {}, "logging": log, "init_args": arguments, "trainer_name": trainer,
                  "versions": versions}  # fmt: skip
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
