"""A pre-training method in one file: two crops of one place in a volume must look alike to the encoder.

There is no mask and no reconstruction. It is the worked example of docs/adding_a_method.md, and the tests train it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.methods import Batch, CaseReport, ImageSource, PretextTask, Views
from nnunet_topomae.methods.crops import random_crop
from nnunet_topomae.methods.gathering import gather
from nnunet_topomae.settings import PretrainingConfig
from nnunet_topomae.settings.schema import Number, setting

REGION = 1.25  # edge of the region that both crops are cut from, in edges of a crop


@dataclass(frozen=True)
class CropContrastConfig(PretrainingConfig):
    """The ``pretraining`` block: what all methods have, and one key of this method."""

    temperature: float = setting(0.1, Number(0, low_open=True), "divides the cosines of the contrast", "SimCLR")


class CropPairs(Views):
    """Two crops that are cut at random from one region of a volume, so that they overlap.

    Args:
        crop_size: voxels per axis.
    """

    def __init__(self, crop_size: Sequence[int]):
        self.crop_size = tuple(crop_size)

    def draw(self, images: ImageSource, case: str, rng: np.random.Generator, mirror: bool) -> dict[str, Tensor]:
        """``first`` and ``second``, (C, D, H, W) each; see :meth:`Views.draw`."""
        region_size = [round(size * REGION) for size in self.crop_size]
        region, _ = random_crop(images.load(case), region_size, rng, mirror)
        crops = [random_crop(region.numpy(), self.crop_size, rng, mirror=False)[0] for _ in range(2)]
        return {"first": crops[0], "second": crops[1]}

    def example(self, batch_size: int, num_channels: int) -> Batch:
        """See :meth:`Views.example`."""
        shape = (batch_size, num_channels, *self.crop_size)
        return {"first": torch.rand(shape), "second": torch.rand(shape)}


class CropContrast(PretextTask):
    """Trains the encoder of a U-Net to recognise a crop among those of a batch (InfoNCE, as in SimCLR).

    Args:
        network: with an ``encoder`` that gives a list of feature maps, as nnU-Net's U-Nets have.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.

    Raises:
        ValueError: for another network.
    """

    config_class = CropContrastConfig
    config: CropContrastConfig
    headings = {"encoder": "Encoder"}  # noqa: RUF012 - a constant
    yardstick = "guessing"

    def __init__(self, network: nn.Module, config: CropContrastConfig, crop_size: Sequence[int]):
        channels = getattr(getattr(network, "encoder", None), "output_channels", None)
        if channels is None:
            raise ValueError(
                f"CropContrast trains the encoder of nnU-Net's U-Nets, but the plans name {type(network).__name__}; "
                f"use plans of nnUNetv2_plan_experiment"
            )
        super().__init__(network, config, crop_size)
        self.requires_grad_(False)  # the decoder is not trained here ...
        self.encoder.requires_grad_(True)  # ... but the encoder is, which nnU-Net's decoders hold too
        self.projection = nn.Sequential(nn.Linear(channels[-1], 64), nn.GELU(), nn.Linear(64, 32))

    def views(self) -> CropPairs:
        """Two overlapping crops."""
        return CropPairs(self.crop_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors (B, 32) of the first and the second crops."""
        return {name: self._embed(batch[name]) for name in ("first", "second")}

    def _embed(self, crop: Tensor) -> Tensor:
        pooled = self.encoder(crop)[-1].mean(dim=(2, 3, 4))
        return F.normalize(self.projection(pooled), dim=1)

    def loss_terms(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of finding each crop's partner in the batch, in both directions."""
        first, second = gather(output["first"]), gather(output["second"])  # of all processes
        cosines = first @ second.T / self.config.temperature
        partners = torch.arange(len(cosines), device=cosines.device)
        contrast = (F.cross_entropy(cosines, partners) + F.cross_entropy(cosines.T, partners)) / 2
        return {"total": contrast, "contrast": contrast}

    def baseline_error(self, batch: Batch) -> Tensor:
        """Cross-entropy of guessing the partner."""
        return torch.tensor(float(len(gather(batch["first"][:, 0, 0, 0, 0])))).log()

    def errors(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the encoder."""
        return {"encoder": self.loss_terms(output, batch)["contrast"]}

    def shown(self, output: dict[str, Tensor], batch: Batch) -> CaseReport:
        """Both crops, and how alike the encoder finds them."""
        cosine = (output["first"] * output["second"]).sum().item()
        columns = {name: batch[name][0].cpu().numpy() for name in ("first", "second")}
        return CaseReport(columns, {"encoder": {"cosine": cosine}})
