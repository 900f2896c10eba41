"""The contract of a pre-training method: what it draws from the images, what it computes, its loss, what it shows.

Trainer, data loader, planner and report know a method through the two classes here and nothing else.
docs/adding_a_method.md builds one step by step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nnunet_topomae.networks.grids import GridTensor
from nnunet_topomae.networks.traits import constant_parameters
from nnunet_topomae.reporting.report import CaseReport
from nnunet_topomae.settings import PretrainingConfig

Batch = dict[str, Tensor]  # by name; the first dimension counts the items
_TRAITS = ("no_weight_decay", "constant_parameters", "resizing")
Output = Any  # tensors in whatever dictionaries, lists or named tuples a method likes; other objects pass as they are


class ImageSource(Protocol):
    """Preprocessed images, without their labels.

    Attributes:
        identifiers: names of the cases that items are about.
        partners: names of all cases that an item may use beside its own; in validation these are the training cases,
            too.
        spacing: mm per voxel and axis, the same for all.
        cache: a folder for what a method computes from these images and may use again; need not exist yet.
    """

    identifiers: Sequence[str]
    partners: Sequence[str]
    spacing: Sequence[float]
    cache: Path

    def load(self, case: str) -> Any:
        """The image of a case, an array (C, D, H, W); only the parts that are sliced are read from the disk."""


class Views(ABC):
    """What a method draws from the images for one item of a batch. It is pickled and sent to the loader's processes."""

    @abstractmethod
    def draw(self, images: ImageSource, case: str, rng: np.random.Generator, mirror: bool) -> dict[str, Tensor]:
        """Draw one item.

        Args:
            images: all that may be drawn from, should the item need other cases too.
            case: the case that the item is about.
            rng: the only source of randomness, so that an item can be drawn again.
            mirror: whether the item may be mirrored, which training does and validation does not.

        Returns:
            Tensors by name, without a batch dimension and of the same shapes for every item.
        """

    @abstractmethod
    def example(self, batch_size: int, num_channels: int) -> Batch:
        """A batch of the shapes and types that :meth:`draw` gives, made without any image.

        The planner measures memory with it.
        """


class PretextTask(nn.Module, ABC):
    """A network to be fine-tuned later, and what pre-training adds to it.

    The parts of the network keep their names, so the state dict of a task is a superset of the network's. Parameters
    that a method does not train must be frozen with ``requires_grad_(False)``.

    Args:
        network: as the plans name it, built with as many classes as the images have channels.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.

    Attributes:
        config_class: dataclass that describes the method's ``pretraining`` block.
        headings: names of the branches as people read them in pictures and tables; a branch that is not among them is
            shown by its own name.
        yardstick: what a run must beat before it can be said to have learned, in words; see :meth:`baseline_error`.
            Empty if the method has none. If :meth:`shown` gives a row of this name with an ``MSE``, the report has the
            skill of all rows that have one.
        loss_follows: whether :meth:`loss_terms` will be called on what :meth:`forward` returns; see
            :meth:`without_loss`.
    """

    config_class: ClassVar[type[PretrainingConfig]] = PretrainingConfig
    headings: ClassVar[Mapping[str, str]] = {}
    yardstick: ClassVar[str] = ""
    loss_follows: bool = True
    _owners: Mapping[str, str] = {}  # of names that belong to the network: its class

    def __init__(self, network: nn.Module, config: PretrainingConfig, crop_size: Sequence[int]):
        super().__init__()
        self.config, self.crop_size = config, tuple(crop_size)
        self._take_over(network)

    def _take_over(self, network: nn.Module) -> None:
        """Hold all parts and tensors of the network under their names, and remember what it says of them."""
        tensors = (*network._modules, *network._parameters, *network._buffers)
        if taken := [name for name in tensors if hasattr(self, name)]:
            raise ValueError(self._said_of_two(taken[0], type(network).__name__))
        for name, part in network._modules.items():
            self.add_module(name, part)
        for name, parameter in network._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in network._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in network._non_persistent_buffers_set)
        self._of_network: dict[str, Any] = {trait: getattr(network, trait, dict)() for trait in _TRAITS}
        self._owners = dict.fromkeys(tensors, type(network).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        """As ``nn.Module`` does, but a part of the network is not replaced, as its weights would be lost."""
        self._check_free(name)
        super().__setattr__(name, value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As ``nn.Module`` does, but no part of the network is replaced."""
        self._check_free(name)
        super().register_buffer(name, tensor, persistent)

    def _check_free(self, name: str) -> None:
        if name in self._owners:
            raise ValueError(self._said_of_two(name, self._owners[name]))

    @classmethod
    def _said_of_two(cls, name: str, network: str) -> str:
        return (
            f'{network} has a part named "{name}", which is also an attribute of {cls.__name__}; rename it in the '
            f"network"
        )

    def no_weight_decay(self) -> set[str]:
        """What the network itself says; see :mod:`nnunet_topomae.networks.traits`."""
        return set(self._of_network["no_weight_decay"])

    def constant_parameters(self) -> set[str]:
        """What the network itself says; see :mod:`nnunet_topomae.networks.traits`."""
        return set(self._of_network["constant_parameters"])

    def resizing(self) -> dict[str, GridTensor]:
        """What the network itself says; see :mod:`nnunet_topomae.networks.traits`."""
        return dict(self._of_network["resizing"])

    @classmethod
    def build(cls, network: nn.Module, config: PretrainingConfig, crop_size: Sequence[int]) -> "PretextTask":
        """Make the task; methods that need a copy of themselves, such as a teacher, add it here."""
        return cls(network, config, crop_size)

    @abstractmethod
    def views(self) -> Views:
        """What is drawn from the images; called after :meth:`prepare`, or after a resumed run was loaded."""

    def prepare(self, images: ImageSource, device: torch.device, log: Callable[[str], None]) -> None:
        """What has to be done once before a new training starts, such as training a matcher of body parts.

        A resumed training calls :meth:`catch_up` in its place, so whatever this learns must lie in parameters or
        buffers, which checkpoints keep.

        Args:
            images: of the training cases; ``partners`` are the validation cases, too.
            device: where the task lies.
            log: writes a line into the training's log.
        """

    def catch_up(self, images: ImageSource, device: torch.device, log: Callable[[str], None]) -> None:
        """What has to be done before a training goes on, such as for images that were added since it began.

        Takes the place of :meth:`prepare`, whose arguments it has.
        """

    def choose(self, batch: Batch, progress: float) -> Batch:
        """Change a training batch before the step, without gradient, for example its masks.

        Args:
            batch: as drawn.
            progress: share of the training that is done at the start of the epoch, in [0, 1).
        """
        return batch

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Compute whatever the loss needs; runs in mixed precision, inside DDP and torch.compile."""

    @contextmanager
    def without_loss(self) -> Iterator[None]:
        """While it lasts, ``loss_follows`` is False: :meth:`forward` leaves out what only :meth:`loss_terms` needs."""
        before, self.loss_follows = self.loss_follows, False
        try:
            yield
        finally:
            self.loss_follows = before

    @abstractmethod
    def loss_terms(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Every term of the loss by name, and their weighted sum as ``total``; scalars.

        Args:
            output: of :meth:`forward`, in float32.
            batch: as given to :meth:`forward`.

        Raises:
            ValueError: if the output is not finite.
        """

    def after_step(self, output: Output, batch: Batch, progress: float) -> None:
        """What follows an optimiser step, without gradient, such as updating a moving average or a queue.

        Args:
            output: of :meth:`forward` in this step, in float32.
            batch: as given to :meth:`forward`.
            progress: share of the training that is done at the start of the epoch, in [0, 1).
        """

    def baseline_error(self, batch: Batch) -> Tensor:
        """Error of the ``yardstick``, a predictor that learns nothing, on a batch; a scalar.

        Validation computes it once a run, because its items are the same in every epoch, and logs for every branch
        the skill: 1 - (error of the branch) / (error of the yardstick). Only methods with a ``yardstick`` need it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no yardstick")

    def errors(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Errors by branch, to be compared with :meth:`baseline_error`; scalars. Needed with a ``yardstick``."""
        raise NotImplementedError(f"{type(self).__name__} has no yardstick")

    def warnings(self, terms: Mapping[str, float]) -> Sequence[str]:
        """What a user should be told after an epoch, a sentence each that says what to do; written into the log.

        Args:
            terms: means over the training steps of the epoch, by the names that :meth:`loss_terms` gives.
        """
        return ()

    @abstractmethod
    def shown(self, output: Output, batch: Batch) -> CaseReport:
        """Pictures and figures of one case.

        Args:
            output: of :meth:`forward` in evaluation mode, in float32.
            batch: one item, drawn without mirroring and the same in every report.
        """

    @classmethod
    def planned(cls, config: Any, crop_size: Sequence[int], spacing: Sequence[float]) -> Any:
        """The settings with those replaced that depend on the plan.

        The planners of this package call it; plans of nnU-Net's own planners take the defaults.

        Args:
            config: a ``config_class`` with the defaults of the method and the planned number of epochs.
            crop_size: voxels per axis.
            spacing: mm per voxel and axis.
        """
        return config

    @classmethod
    def for_memory(cls, config: Any) -> Any:
        """The settings without what is computed on the CPU; the planner traces the memory of a step with them.

        Args:
            config: a ``config_class``.
        """
        return config

    def untrained_parameters(self) -> list[str]:
        """Names of the parameters that pre-training leaves as they were."""
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    def fixed_parameters(self) -> list[str]:
        """Names of those untrained parameters that are meant to keep their initial values: sine-cosine positions."""
        constant = constant_parameters(self)
        return [name for name in self.untrained_parameters() if name in constant]


def to_float32(output: Output) -> Output:
    """An output with all its floating point tensors in float32; in dicts, lists, tuples and named tuples."""
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, output)
