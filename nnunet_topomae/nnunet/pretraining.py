"""The nnU-Net trainer of every pretext task."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import time
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_topomae.config import FinetuningConfig
from nnunet_topomae.masking import mask_to_voxels
from nnunet_topomae.nnunet.checkpoints import UNTRAINED
from nnunet_topomae.nnunet.data_loading import CropDataset, StreamSampler, endless_batches
from nnunet_topomae.nnunet.dataset import Cases, JoinedCases, PlannedDataset, open_cases
from nnunet_topomae.nnunet.plans import FINETUNING, PRETRAINING, build_network, read_config
from nnunet_topomae.nnunet.training import NO_WEIGHT_DECAY, StageTrainer
from nnunet_topomae.pretext.base import PretextOutput, PretextTask, compose
from nnunet_topomae.reporting.figures import Curve, Reconstruction, plane_names, save_progress, save_reconstructions
from nnunet_topomae.reporting.metrics import keypoint_error, mean_of, reconstruction_metrics
from nnunet_topomae.topology import TopologicalLoss
from nnunet_topomae.topology.loss import choose_grid

_MAX_GRADIENT_NORM = 12  # nnU-Net's
_FOLDS = 5  # nnU-Net's
_TRAINING_STREAM, _VALIDATION_STREAM, _REPORT_STREAM = 0, 1, 2
_PICTURED_CASES = 4
_HEADINGS = {"vit": "ViT", "unetrpp": "UNETR++", "unet": "U-Net"}


class Pretrainer(StageTrainer):
    """Pre-trains the network of the plans on the images of the training cases; labels are never used.

    Attributes:
        task_class: the pretext task, set by subclasses.
    """

    block = PRETRAINING
    betas = (0.9, 0.95)
    task_class: ClassVar[type[PretextTask]]

    def __init_subclass__(cls) -> None:
        cls.config_class = cls.task_class.config_class

    @classmethod
    def blocks(cls) -> dict[str, type]:
        """Also that of fine-tuning, for which it would be late after hours of pre-training."""
        return {**super().blocks(), FINETUNING: FinetuningConfig}

    def initialize(self) -> None:
        """Without labels: no oversampling of foreground, no deep supervision, a log of the task's own terms."""
        self.oversample_foreground_percent = 0.0
        self.enable_deep_supervision = False
        self.logger.local_logger = PretrainingLogger()
        if self.without_labels:
            self.preprocessed_dataset_folder = str(self.dataset.unlabelled_folder(self.configuration_name))
        super().initialize()

    @property
    def dataset(self) -> PlannedDataset:
        """The dataset that the plans were made for."""
        return PlannedDataset(Path(self.preprocessed_dataset_folder_base), self.plans_manager, self.dataset_json)

    @property
    def without_labels(self) -> bool:
        """Whether the dataset has unlabelled cases only."""
        labelled = self.dataset.labelled_folder(self.configuration_name)
        return not labelled.is_dir() and bool(self.dataset.unlabelled_cases(self.configuration_name))

    def do_split(self) -> tuple[list[str], list[str]]:
        """As nnU-Net; without labels the unlabelled cases are split in the same way, but no file is written."""
        if not self.without_labels or self.fold == "all":
            return super().do_split()
        cases = self.dataset.unlabelled_cases(self.configuration_name)
        if len(cases) < _FOLDS:
            raise ValueError(
                f"{self.preprocessed_dataset_folder} holds {len(cases)} cases, too few for {_FOLDS} folds; use fold all"
            )
        split = generate_crossval_split(cases, seed=12345, n_splits=_FOLDS)[int(self.fold) % _FOLDS]
        return list(split["train"]), list(split["val"])

    def get_tr_and_val_datasets(self) -> tuple[Cases, Cases]:
        """Cases to train on and to validate on.

        Training: the fold's labelled cases, all unlabelled ones, and every case of the other ``pretraining.datasets``.
        Validation: the fold's labelled cases.

        Raises:
            ValueError: if a case is there with and without labels, or another dataset was preprocessed differently.
        """
        training, validation = super().get_tr_and_val_datasets()
        name, parts = self.configuration_name, [training]
        unlabelled = [] if self.without_labels else self.dataset.unlabelled_cases(name)
        if unlabelled:
            folder = self.dataset.unlabelled_folder(name)
            if twice := sorted(set(unlabelled) & {*training.identifiers, *validation.identifiers}):
                raise ValueError(
                    f"{twice[0]} is a labelled case and lies in {folder} too; remove it there with "
                    f"nnUNetv2_topomae add_unlabelled --remove {twice[0]}"
                )
            parts.append(open_cases(folder, unlabelled))
        for number in self.config.datasets:
            other = PlannedDataset.of(number, self.plans_manager.plans_name)
            if other.folder != self.dataset.folder:
                self.dataset.check_same_preprocessing(other, name)
                parts += other.open_all(name)
        return (training if len(parts) == 1 else JoinedCases(*parts)), validation

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The pretext task around the network of the plans, which gets a class per input channel."""
        network = build_network(
            configuration_manager, num_input_channels, num_classes=num_input_channels, deep_supervision=False
        )
        config = read_config(configuration_manager, PRETRAINING, cls.config_class)
        return cls.task_class.build(network, config, configuration_manager.patch_size)

    @property
    def task(self) -> PretextTask:
        """The pretext task without the wrappers around it."""
        return self.module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """No weight decay on biases, norms, positions and the like."""
        return param_groups_weight_decay(self.network, self.weight_decay, NO_WEIGHT_DECAY)

    def _build_loss(self) -> None:
        """The loss belongs to the task."""

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        """Random crops of the training cases; fixed crops and masks of the validation cases."""
        training, validation = self.get_tr_and_val_datasets()
        others = [case for case in training.identifiers if "/" in case]
        unlabelled = len(set(training.identifiers) & set(self.dataset.unlabelled_cases(self.configuration_name)))
        self.print_to_log_file(
            f"Crops are drawn from {len(training.identifiers) - unlabelled - len(others)} labelled and {unlabelled} "
            f"unlabelled cases{f' and {len(others)} of other datasets' if others else ''}; "
            f"validation on {len(validation.identifiers)}"
        )
        world_size = dist.get_world_size() if self.is_ddp else 1
        global_batch = self.configuration_manager.batch_size
        seen = self.current_epoch * self.num_iterations_per_epoch * global_batch
        pin_memory = self.device.type == "cuda"
        return (
            endless_batches(
                self.crops_of(training, _TRAINING_STREAM, mirror=True),
                StreamSampler(seen, rank=self.local_rank, world_size=world_size),
                self.batch_size,
                pin_memory,
            ),
            endless_batches(
                self.crops_of(validation, _VALIDATION_STREAM, mirror=False),
                StreamSampler(
                    period=self.num_val_iterations_per_epoch * global_batch,
                    rank=self.local_rank,
                    world_size=world_size,
                ),
                self.batch_size,
                pin_memory,
            ),
        )

    def crops_of(self, cases: Cases, stream: int, mirror: bool) -> CropDataset:
        """The stream of crops of some cases."""
        return CropDataset(
            cases,
            self.configuration_manager.patch_size,
            self.task.mask_grid,
            self.config.mask_ratio,
            self.configuration_manager.spacing,
            (self.config.seed, stream),
            mirror,
        )

    def to_device(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Crops (B, C, D, H, W), masks (B, d, h, w) and key points (B, 9, 3) of a batch."""
        return tuple(batch[key].to(self.device, non_blocking=True) for key in ("data", "mask", "keypoints"))

    def autocast(self) -> AbstractContextManager:
        """Half precision on CUDA, as nnU-Net."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def train_step(self, batch: dict) -> dict[str, np.ndarray]:
        """One optimisation step; returns every loss term by name."""
        crop, mask, keypoints = self.to_device(batch)
        progress = self.current_epoch / self.num_epochs
        with self.autocast():
            mask = self.task.choose_mask(crop, mask, progress)
        terms = self.loss_terms(batch, crop, mask, keypoints)
        self.optimise(terms["total"])
        self.task.after_step(progress)
        self.on_iteration_end()
        return to_numpy(terms)

    def validation_step(self, batch: dict) -> dict[str, np.ndarray]:
        """Every loss term by name."""
        return to_numpy(self.loss_terms(batch, *self.to_device(batch)))

    def loss_terms(self, batch: dict, crop: Tensor, mask: Tensor, keypoints: Tensor) -> dict[str, Tensor]:
        """Forward pass in mixed precision, losses in float32.

        Raises:
            ValueError: names the cases of a batch whose reconstruction is not finite.
        """
        with self.autocast():
            output = self.network(crop, mask)
        try:
            return self.task.loss_terms(output.to_float32(), crop, mask, keypoints)
        except ValueError as error:
            raise ValueError(
                f"epoch {self.current_epoch}, cases {', '.join(batch['case'])}: {error}; if the images are sound, "
                f"training has diverged: lower pretraining.base_lr"
            ) from error

    def optimise(self, loss: Tensor) -> None:
        """Backward pass, gradient clipping and step, scaled in mixed precision."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.grad_scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), _MAX_GRADIENT_NORM)
            self.optimizer.step()
            return
        self.grad_scaler.scale(loss).backward()
        self.grad_scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), _MAX_GRADIENT_NORM)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the mean of every term."""
        self.progress.close()
        self.log_terms(train_outputs, "train")

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Log the mean of every term."""
        self.log_terms(val_outputs, "val")

    def log_terms(self, outputs: list[dict], split: str) -> None:
        """Means over batches and processes, under ``train_<term>`` and ``val_<term>``; totals under nnU-Net's names."""
        means = {name: float(np.mean([output[name] for output in outputs])) for name in outputs[0]}
        if self.is_ddp:
            gathered: list[dict] = [{}] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = {name: float(np.mean([each[name] for each in gathered])) for name in means}
        self.logger.log(f"{split}_losses", means.pop("total"), self.current_epoch)
        for name, value in means.items():
            self.logger.log(f"{split}_{name}", value, self.current_epoch)

    def on_epoch_end(self) -> None:
        """Print, draw and save; the best checkpoint has the lowest validation loss."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        latest = self.logger.local_logger.latest()
        for split in ("train", "val"):
            terms = "  ".join(
                f"{name[len(split) + 1 :]} {value:.4g}" for name, value in latest.items() if name.startswith(split)
            )
            self.print_to_log_file(f"{split}: {terms}")
        duration = latest["epoch_end_timestamps"] - latest["epoch_start_timestamps"]
        self.print_to_log_file(f"Epoch time: {duration:.2f} s")
        if self._best_ema is None or latest["val_losses"] < self._best_ema:
            self._best_ema = latest["val_losses"]
            self.print_to_log_file(f"New lowest validation loss: {self._best_ema:.4g}")
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_best.pth"))
        if (self.current_epoch + 1) % self.save_every == 0 and self.current_epoch + 1 != self.num_epochs:
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))
        if self.local_rank == 0:
            self.logger.plot_progress_png(self.output_folder)
        self.current_epoch += 1

    def checkpoint(self) -> dict[str, Any]:
        """Adds the names of parameters that pre-training leaves as they were."""
        return {**super().checkpoint(), UNTRAINED: self.task.untrained_parameters()}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Instead of segmentations: pictures and figures of reconstructed crops in ``validation/``.

        One fixed crop and mask per validation case; of all cases the first ones are pictured.
        """
        if self.local_rank != 0:
            return
        self.network.eval()
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(exist_ok=True)
        records, pictures = [], []
        for batch in tqdm(self._report_batches(), "Reconstructing", leave=False, disable=None):
            crop, mask, _ = self.to_device(batch)
            with torch.no_grad(), self.autocast():
                output = self.task(crop, mask).to_float32()
            hidden = mask_to_voxels(mask, self.task.patch_size)
            images = self.task.images(output, crop)
            records.append(self._measure(batch, crop, hidden, output, images))
            if len(pictures) < _PICTURED_CASES:
                pictures.append(self._picture(batch, crop, hidden, images))
        branches = records[0]["metrics"]
        summary = {
            "mean": {branch: mean_of([record["metrics"][branch] for record in records]) for branch in branches},
            "metric_per_case": records,
        }
        save_reconstructions(pictures, folder / "reconstructions.png")
        temporary = folder / ".summary.json"
        temporary.write_text(json.dumps(summary, indent=2))
        temporary.replace(folder / "summary.json")
        self.print_to_log_file(f"Validation complete: see {folder}")
        for branch, means in summary["mean"].items():
            values = "  ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in means.items())
            self.print_to_log_file(f"  {_HEADINGS[branch]:<8} {values}")

    def _report_batches(self) -> list[dict]:
        """A batch of one crop per validation case, always the same."""
        batches = []
        for index, case in enumerate(self.get_tr_and_val_datasets()[1].identifiers):
            only_this = self.dataset_class(self.preprocessed_dataset_folder, [case])
            crops = self.crops_of(only_this, _REPORT_STREAM, mirror=False)
            batches.append(torch.utils.data.default_collate([crops[index]]))
        return batches

    def _measure(
        self, batch: dict, crop: Tensor, hidden: Tensor, output: PretextOutput, images: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Metrics of every branch on one crop."""
        grid = choose_grid(self.configuration_manager.patch_size, self.configuration_manager.spacing)
        distances = TopologicalLoss(grid)(crop, *(compose(crop, image, hidden) for image in images.values()))
        metrics = {}
        for (branch, image), distance in zip(images.items(), distances, strict=True):
            metrics[branch] = reconstruction_metrics(*(t[0].cpu().numpy() for t in (crop, image, hidden)))
            metrics[branch]["topological_distance"] = distance.item()
            if branch in output.keypoints:
                metrics[branch]["keypoint_error_mm"] = keypoint_error(
                    output.keypoints[branch][0].cpu().numpy(),
                    batch["keypoints"][0].numpy(),
                    batch["extent"][0].tolist(),
                )
        return {"case": batch["case"][0], "metrics": metrics}

    def _picture(self, batch: dict, crop: Tensor, hidden: Tensor, images: dict[str, Tensor]) -> Reconstruction:
        """The crop, what the network saw of it, and the reconstructions with visible patches from the crop."""
        columns = {"input": crop, "masked": crop.masked_fill(hidden, torch.nan)}
        for branch, image in images.items():
            columns[_HEADINGS[branch]] = compose(crop, image, hidden)
        return Reconstruction(
            batch["case"][0],
            {heading: volume[0].cpu().numpy() for heading, volume in columns.items()},
            self.configuration_manager.spacing,
            plane_names(self.plans_manager.transpose_forward),
        )


class PretrainingLogger(LocalLogger):
    """nnU-Net's log of one value per epoch, with whatever terms a task has."""

    def __init__(self):
        super().__init__()
        self.my_fantastic_logging = {}

    def log(self, key: str, value: Any, epoch: int) -> None:
        """Add a value; a key may be new."""
        self.my_fantastic_logging.setdefault(key, [])
        super().log(key, value, epoch)

    def latest(self) -> dict[str, float]:
        """The last value of every key."""
        return {key: values[-1] for key, values in self.my_fantastic_logging.items()}

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw ``progress.png``: a panel per loss term, learning rate and epoch duration."""
        log = self.my_fantastic_logging
        terms = [key.removeprefix("train_") for key in log if key.startswith("train_")]
        times = zip(log["epoch_end_timestamps"], log["epoch_start_timestamps"], strict=True)
        save_progress(
            {("total" if t == "losses" else t): Curve(log[f"train_{t}"], log[f"val_{t}"]) for t in terms},
            log["lrs"],
            [end - start for end, start in times],
            Path(output_folder) / "progress.png",
        )


def to_numpy(terms: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Detached copies on the CPU."""
    return {name: term.detach().cpu().numpy() for name, term in terms.items()}
