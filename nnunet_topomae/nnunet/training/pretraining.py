"""The nnU-Net trainer of every pre-training method."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import time
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from tqdm import tqdm

from nnunet_topomae.methods.base import Batch, Output, PretextTask, to_float32
from nnunet_topomae.networks.traits import no_weight_decay
from nnunet_topomae.nnunet.data.preprocessed import Cases, PlannedDataset
from nnunet_topomae.nnunet.data.pretraining_cases import PretrainingCases
from nnunet_topomae.nnunet.data.stream import CaseImages, ItemStream, StreamSampler
from nnunet_topomae.nnunet.finding import find_class
from nnunet_topomae.nnunet.planning.plans import FINETUNING, PRETRAINING, build_network
from nnunet_topomae.nnunet.training.checkpointing import BEST, LATEST
from nnunet_topomae.nnunet.training.distribution import alone, unwrap, world_size
from nnunet_topomae.nnunet.training.logger import SKILL, PretrainingLogger
from nnunet_topomae.nnunet.training.skipping import NotFiniteError, agree
from nnunet_topomae.nnunet.training.stage import StageTrainer
from nnunet_topomae.nnunet.weights.checkpoints import DRAWN_FROM, FIXED, UNTRAINED, VALIDATED_ON, cases_seen
from nnunet_topomae.nnunet.weights.handover import HandOver
from nnunet_topomae.reporting.figures import Geometry, plane_names
from nnunet_topomae.reporting.report import CaseReport, metrics_table, save_report
from nnunet_topomae.settings import FinetuningConfig

_DEFINITION = re.compile(r"^class (\w+)\(Pretrainer\):", re.MULTILINE)
_MAX_GRADIENT_NORM = 12  # nnU-Net's
_TOTAL = "total"
_ERROR, _BASELINE = "error of ", "error of the yardstick"  # in validation, beside the names of loss terms
_WARNING = (
    "WARNING: {} does worse than {}, which learns nothing (skill {:.2f} in the last epoch): train longer "
    "(pretraining.num_epochs) or try another pretraining.base_lr, and look at progress.png"
)
_FINAL = "final_val"  # nnU-Net's word for figures of the whole run, in Weights & Biases
_TRAINING_STREAM, _VALIDATION_STREAM, _REPORT_STREAM = 0, 1, 2


class Pretrainer(StageTrainer):
    """Pre-trains the network of the plans on the images of the training cases; labels are never used.

    Attributes:
        task_class: the pre-training method, set by subclasses.
    """

    block = PRETRAINING
    needs_labels = False
    keeps_heads = True
    betas = (0.9, 0.95)
    task_class: ClassVar[type[PretextTask]]

    def __init_subclass__(cls) -> None:
        cls.config_class = cls.task_class.config_class

    @classmethod
    def blocks(cls) -> dict[str, type]:
        """The ``finetuning`` block is checked too, so that no mistake in it shows only after hours of training."""
        return {**super().blocks(), FINETUNING: FinetuningConfig}

    @classmethod
    def build(
        cls,
        configuration: ConfigurationManager,
        config: Any,
        num_channels: int,
        num_classes: int = 1,
        *,
        deep_supervision: bool = False,
    ) -> PretextTask:
        """Make the task around the plans' network, which gets as many classes as there are channels.

        See :meth:`StageTrainer.build`.
        """
        network = build_network(configuration, num_channels, num_channels, deep_supervision=False)
        return cls.task_class.build(network, config, configuration.patch_size)

    def initialize(self) -> None:
        """Switch off what needs labels (oversampling of foreground, deep supervision), and log the task's own terms."""
        self.oversample_foreground_percent = 0.0
        self.enable_deep_supervision = False
        self.logger.local_logger = PretrainingLogger(self.task_class.headings)
        self._baseline_errors: dict[int, Tensor] = {}  # by the number of the batch
        self.drawn_from: set[str] = set()
        self.validated_on: list[str] = []
        if self.cases.without_labels:
            self.preprocessed_dataset_folder = str(self.cases.dataset.unlabelled_folder(self.configuration_name))
        self.build_network_architecture = super().build_network_architecture  # type: ignore[method-assign]
        super().initialize()

    @classmethod
    def build_network_architecture(cls, *_: Any, **__: Any) -> nn.Module:
        """What nnU-Net's prediction asks the class of a checkpoint's trainer for; a pre-training has nothing to give.

        Raises:
            ValueError: says what to predict with.
        """
        raise ValueError(
            f"checkpoints of {cls.__name__} are of a pre-training, which cannot segment: fine-tune first, and predict "
            f"with -tr and the name of the trainer that fine-tuned"
        )

    @property
    def num_expected(self) -> int:
        """Number of cases that nnU-Net must have preprocessed; none for a dataset without labels."""
        return 0 if self.cases.without_labels else super().num_expected

    def take_over(self, checkpoint: dict[str, Any], file: Path) -> HandOver:
        """Go on from another pre-training, of which also those tensors are loaded that had no gradient: a teacher's."""
        all_trained: dict[str, list[str]] = {UNTRAINED: []} if UNTRAINED in checkpoint else {}
        result = super().take_over({**checkpoint, **all_trained}, file)
        self._add_seen(checkpoint)
        return result

    def before_restoring(self, checkpoint: dict[str, Any]) -> None:
        """Keep the cases drawn from until then, and the validation cases: the split may have changed since."""
        self._add_seen(checkpoint)
        self.validated_on = checkpoint.get(VALIDATED_ON, [])  # older versions do not name them

    def _add_seen(self, checkpoint: dict[str, Any]) -> None:
        """The weights of a checkpoint have seen what it drew from, whatever is drawn from now on."""
        self.drawn_from |= cases_seen(checkpoint, self.plans_manager.dataset_name)

    @property
    def cases(self) -> PretrainingCases:
        """All cases of the dataset that the plans were made for."""
        folder = Path(self.preprocessed_dataset_folder_base)
        dataset = PlannedDataset(folder, self.plans_manager, self.dataset_json)
        return PretrainingCases(dataset, self.configuration_name, self.split)

    @property
    def task(self) -> PretextTask:
        """The method, without the wrappers of DDP and torch.compile."""
        return unwrap(self.network)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, and the cases that it keeps as unlabelled beside those to train on.

        A dataset without labels is split in the same way, but no file is written; a run that goes on keeps its split.
        """
        if self.cases.without_labels and self.fold != "all":
            return self.cases.split_unlabelled(int(self.fold), self.validated_on)
        training, validation = super().do_split()
        return [*training, *self.present(self.split.unlabelled)], validation

    def get_tr_and_val_datasets(self) -> tuple[Cases, Cases]:
        """All cases to train on, with unlabelled ones and those of other datasets, and the fold's validation cases."""
        training, validation = super().get_tr_and_val_datasets()
        return self.cases.training(training, self.config.datasets, self.config.datasets_plans), validation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """No weight decay on biases, norms, positions and the like."""
        return param_groups_weight_decay(self.network, self.weight_decay, no_weight_decay(self.network))

    def _build_loss(self) -> None:
        """Nothing to build: the loss is part of the task."""

    def prepare(self) -> None:
        """Let the method prepare itself, and at the start of a new training see that its report can be drawn."""
        training, validation = self.get_tr_and_val_datasets()
        images, log = self._images(training, validation), self.print_to_log_file
        if self.current_epoch > 0 or self._steps_done:
            self.task.catch_up(images, self.device, log)
            return
        self.task.prepare(images, self.device, log)
        if self.is_ddp:
            for tensor in (*self.task.parameters(), *self.task.buffers()):
                dist.broadcast(tensor.data, 0)
        if self.local_rank == 0:
            self.report_on(validation.identifiers[0], self._validation_stream(training, validation, _REPORT_STREAM))

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        """Random items of the training cases; fixed items of the validation cases."""
        training, validation = self.get_tr_and_val_datasets()
        self.drawn_from.update(training.identifiers)
        self.validated_on = validation.identifiers
        global_batch = self.configuration_manager.batch_size
        draws = self.num_epochs * self.num_iterations_per_epoch * global_batch / len(training.identifiers)
        self.print_to_log_file(
            f"Crops are drawn from {self.cases.count(training)}; validation on {len(validation.identifiers)}. "
            f"In {self.num_epochs} epochs each image is drawn about {draws:,.1f} times"
        )
        world = {"rank": self.local_rank, "world_size": world_size()}
        done = self._steps_done
        seen = (self.current_epoch * self.num_iterations_per_epoch + len(done)) * global_batch
        repeated = self.num_val_iterations_per_epoch * global_batch
        drawn = self.stream(training, _TRAINING_STREAM, mirror=True)
        fixed = self._validation_stream(training, validation, _VALIDATION_STREAM)
        return (
            self.batches(drawn, StreamSampler(seen, **world), done),
            self.batches(fixed, StreamSampler(period=repeated, **world), validation=True),
        )

    def _images(self, cases: Cases, others: Cases | None = None) -> CaseImages:
        cache = self.cases.dataset.cache_folder(self.configuration_name)
        return CaseImages(cases, self.configuration_manager.spacing, cache, others)

    def _validation_stream(self, training: Cases, validation: Cases, number: int) -> ItemStream:
        """Items about validation cases, which are the same in every epoch; they may use training cases beside them."""
        return self.stream(validation, number, mirror=False, others=training)

    def stream(self, cases: Cases, number: int, *, mirror: bool, others: Cases | None = None) -> ItemStream:
        """The items that the method draws from some cases.

        Args:
            cases: that the items are about.
            number: tells streams of one seed apart.
            mirror: whether items may be mirrored.
            others: cases that the items may use beside their own.
        """
        return ItemStream(self.task.views(), self._images(cases, others), (self.config.seed, number), mirror=mirror)

    def to_device(self, batch: dict) -> Batch:
        """The tensors of a batch, on the device."""
        return {
            name: value.to(self.device, non_blocking=True) for name, value in batch.items() if isinstance(value, Tensor)
        }

    def autocast(self) -> AbstractContextManager:
        """Mixed precision on CUDA, as nnU-Net does."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def step(self, batch: dict) -> dict[str, np.ndarray]:
        """One step of the optimiser; returns every loss term by name."""
        progress = self.current_epoch / self.num_epochs
        inputs = self.to_device(batch)
        with torch.no_grad(), self.autocast():
            inputs = self.task.choose(inputs, progress)
        output = self.predict(inputs)
        loss, values = self._finite_loss(output, inputs, batch["case"])
        self.optimise(loss)
        with torch.no_grad():
            self.task.after_step(output, inputs, progress)
        return values

    def _finite_loss(self, output: Output, inputs: Batch, cases: list[str]) -> tuple[Tensor, dict[str, np.ndarray]]:
        """The loss, and every term by name."""
        failed, terms, values = None, {}, {}
        try:
            terms = self.loss_terms(output, inputs, cases)
            values = self._to_numpy(terms, cases)
        except NotFiniteError as error:
            failed = error
        agree(failed, self.device)
        return terms[_TOTAL], values

    def validate_batch(self, batch: dict) -> dict[str, np.ndarray]:
        """Every loss term by name, and where the method has a yardstick, the errors of its branches and of that."""
        inputs = self.to_device(batch)
        output = self.predict(inputs)
        _, values = self._finite_loss(output, inputs, batch["case"])
        if self.task.yardstick:
            errors = {f"{_ERROR}{branch}": error for branch, error in self.task.errors(output, inputs).items()}
            errors[_BASELINE] = self._baseline_error(inputs)
            values |= {name: error.detach().cpu().numpy() for name, error in errors.items()}
        return values

    def _baseline_error(self, inputs: Batch) -> Tensor:
        """Error of the yardstick on the present validation batch, which is the same in every epoch."""
        if self._validated not in self._baseline_errors:
            self._baseline_errors[self._validated] = self.task.baseline_error(inputs)
        return self._baseline_errors[self._validated]

    def predict(self, inputs: Batch) -> Output:
        """Forward pass in mixed precision; the output is in float32."""
        with self.autocast():
            output: Output = self.network(inputs)
        return to_float32(output)

    def loss_terms(self, output: Output, inputs: Batch, cases: list[str]) -> dict[str, Tensor]:
        """Every loss term by name.

        Raises:
            ValueError: names the cases of a batch for which the method cannot compute its loss; a
                :class:`NotFiniteError` if that is because the output is NaN or inf.
        """
        try:
            terms = self.task.loss_terms(output, inputs)
        except ValueError as error:
            if _is_finite(output):
                raise ValueError(f"{self._where(cases)}: {error}") from error
            raise NotFiniteError(f"{self._where(cases)}: {error}{self.diverged}") from error
        if _TOTAL not in terms or any(term.ndim for term in terms.values()):
            shapes = ", ".join(f"{name} {tuple(term.shape)}" for name, term in terms.items())
            raise ValueError(f'{type(self.task).__name__}.loss_terms must give scalars and a "{_TOTAL}", got {shapes}')
        return terms

    def _where(self, cases: list[str]) -> str:
        return f"epoch {self.current_epoch}, cases {', '.join(cases)}"

    def _to_numpy(self, terms: dict[str, Tensor], cases: list[str]) -> dict[str, np.ndarray]:
        """Detached copies on the CPU.

        Raises:
            NotFiniteError: names the cases of a batch whose loss is not finite.
        """
        values = {name: term.detach().cpu().numpy() for name, term in terms.items()}
        if not np.isfinite(values[_TOTAL]):
            said = f"{self._where(cases)}: the loss is {values[_TOTAL]}{self.diverged}"
            raise NotFiniteError(said, {name: float(value) for name, value in values.items()})
        return values

    def optimise(self, loss: Tensor) -> None:
        """Backward pass, gradient clipping and optimiser step; losses are scaled in mixed precision."""
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

    def log_training(self, outputs: list[dict]) -> None:
        """Log the mean of every term."""
        self.log_terms(outputs, "train")

    def no_output(self) -> dict:
        """A loss that is unknown."""
        return {_TOTAL: np.float32(np.nan)}

    def log_validation(self, outputs: list[dict]) -> None:
        """Log the mean of every term, and the skill of every branch."""
        self.log_terms(outputs, "val")

    def log_terms(self, outputs: list[dict], split: str) -> None:
        """Log means over batches and processes as ``train_<term>`` and ``val_<term>``; totals under nnU-Net's names.

        Errors become ``skill_<branch>``: 1 - (error of the branch) / (error of the yardstick).
        """
        means = {name: float(np.mean([float(output[name]) for output in outputs])) for name in outputs[0]}
        if self.is_ddp:
            gathered: list[dict] = [{}] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = {name: float(np.mean([each[name] for each in gathered])) for name in means}
        self.logger.log(f"{split}_losses", means.pop(_TOTAL), self.current_epoch)
        baseline = means.pop(_BASELINE, 0.0)
        for name, value in means.items():
            if not name.startswith(_ERROR):
                self.logger.log(f"{split}_{name}", value, self.current_epoch)
            elif baseline > 0:
                self.logger.log(f"{SKILL}{name.removeprefix(_ERROR)}", 1 - value / baseline, self.current_epoch)

    def on_epoch_end(self) -> None:
        """Print, draw and save; the best checkpoint has the lowest validation loss."""
        self.plan_saving()
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        latest = self.logger.local_logger.latest()
        for split in ("train", "val"):
            terms = "  ".join(
                f"{name[len(split) + 1 :]} {value:.4g}" for name, value in latest.items() if name.startswith(split)
            )
            self.print_to_log_file(f"{split}: {terms}")
        of_training = {name[len("train_") :]: value for name, value in latest.items() if name.startswith("train_")}
        for warning in self.task.warnings(of_training):
            self.print_to_log_file(f"WARNING: {warning}")
        skills = self.logger.local_logger.skills()
        if skills:
            values = "  ".join(f"{self._heading(branch)} {values[-1]:.3f}" for branch, values in skills.items())
            self.print_to_log_file(f"skill (0: as {self.task.yardstick}, 1: perfect): {values}")
        duration = latest["epoch_end_timestamps"] - latest["epoch_start_timestamps"]
        self.print_to_log_file(f"Epoch time: {duration:.2f} s")
        if self._best_ema is None or latest["val_losses"] < self._best_ema:
            self._best_ema = latest["val_losses"]
            self.print_to_log_file(f"New lowest validation loss: {self._best_ema:.4g}")
            self.save_checkpoint(os.path.join(self.output_folder, BEST))
        if (self.current_epoch + 1) % self.save_every == 0 and self.current_epoch + 1 != self.num_epochs:
            self.save_checkpoint(os.path.join(self.output_folder, LATEST))
        if self.local_rank == 0:
            self.logger.plot_progress_png(self.output_folder)
        self.current_epoch += 1
        self.end_epoch()

    def _heading(self, branch: str) -> str:
        return self.task.headings.get(branch, branch)

    def checkpoint(self) -> dict[str, Any]:
        """Adds the cases of the run, and the names of parameters that are not trained and of those meant not to be."""
        return {
            **super().checkpoint(),
            DRAWN_FROM: sorted(self.drawn_from),
            VALIDATED_ON: self.validated_on,
            UNTRAINED: self.task.untrained_parameters(),
            FIXED: self.task.fixed_parameters(),
        }

    def validate(self, save_probabilities: bool) -> None:
        """Write pictures and figures of every validation case into ``validation/``, where nnU-Net segments cases.

        Means go to nnU-Net's loggers, too.
        """
        if self.local_rank != 0:
            return
        self.network.eval()
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(exist_ok=True)
        geometry = Geometry(self.configuration_manager.spacing, plane_names(self.plans_manager.transpose_forward))
        summary = save_report(self._reports(), folder, geometry, self.task.yardstick)
        self.print_to_log_file(f"Validation complete: see {folder}")
        for row, figures in summary["mean"].items():
            for name, value in figures.items():
                self.logger.log_summary(f"{_FINAL}/{row}/{name}", value)
        for line in metrics_table(summary["mean"], self.task.headings):
            self.print_to_log_file(f"  {line}")
        for branch, (*_, skill) in self.logger.local_logger.skills().items():
            if skill < 0:
                self.print_to_log_file(_WARNING.format(self._heading(branch), self.task.yardstick, skill))

    def _reports(self) -> Iterator[tuple[str, CaseReport]]:
        """What the method shows of one item per validation case, always the same items."""
        stream = self._validation_stream(*self.get_tr_and_val_datasets(), _REPORT_STREAM)
        for case in tqdm(stream.images.identifiers, "Validating", leave=False, disable=None):
            yield case, self.report_on(case, stream)

    @torch.no_grad()
    def report_on(self, case: str, stream: ItemStream) -> CaseReport:
        """What the method shows of a case."""
        self.network.eval()
        inputs = self.to_device(default_collate([stream.of_case(case)]))
        with self.autocast(), alone(self.task), self.task.without_loss():
            output = self.task(inputs)
        return self.task.shown(to_float32(output), inputs)


def external_folders() -> list[Path]:
    """The folders that ``nnUNet_extTrainer`` names."""
    return [Path(folder) for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder.strip()]


def find_pretrainer(name: str, folders: Iterable[Path]) -> type[Pretrainer] | None:
    """The pre-training trainer of a name, found in the first folder that has it, as nnU-Net finds trainers."""
    found = (find_class(name, folder, Pretrainer) for folder in folders)
    return next((trainer for trainer in found if trainer and trainer is not Pretrainer), None)


def named_pretrainers(folders: Iterable[Path]) -> list[str]:
    """Names of the pre-training trainers that files in some folders define, read without running the files."""
    texts = (file.read_text(errors="replace") for folder in folders for file in folder.glob("*.py"))
    return sorted({name for text in texts for name in _DEFINITION.findall(text)})


def _is_finite(output: Output) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
