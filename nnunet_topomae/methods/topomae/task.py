"""TopoMAE: co-pre-training of a ViT masked autoencoder and UNETR++ (Gu et al., section II)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.methods.base import Batch, CaseReport, ImageSource
from nnunet_topomae.methods.losses import compose, masked_mse
from nnunet_topomae.methods.masked import MaskedReconstruction
from nnunet_topomae.methods.topomae.keypoints import NUM_KEYPOINTS, centred, keypoint_error
from nnunet_topomae.methods.topomae.settings import TopologyConfig, TopoMAEConfig
from nnunet_topomae.methods.topomae.views import KeypointViews
from nnunet_topomae.networks.fused import FusedViTUNETRPP
from nnunet_topomae.networks.pyramid import TokenPyramid
from nnunet_topomae.networks.unetrpp import UNETRPPDecoder, UNETRPPEncoder
from nnunet_topomae.networks.vit import (
    ViTEncoder,
    initialize_linear_layers,
    light_decoder,
    scatter_tokens,
    visible_indices,
)
from nnunet_topomae.topology import TopologicalLoss, persistence_diagrams
from nnunet_topomae.topology.loss import PendingLoss, check_grid, choose_grid, pool_to_grid

_KEYPOINT_CHANNELS, _KEYPOINT_HIDDEN = 64, 256
_BY_VIT, _BY_UNETRPP = "the reconstruction by the ViT", "the reconstruction by UNETR++"  # in messages
_GUESS = "crop in the middle"
_LOOKED_AT = 100  # images at most, to see how large they are


class Prediction(NamedTuple):
    """What both branches predict.

    Attributes:
        reconstructions: (B, C, D, H, W) by branch.
        keypoints: (B, 9, 3) in (-1, 1) by branch; empty where the spatial loss is off.
        topology: topological losses by branch, which are still being computed; empty where that loss is off.
    """

    reconstructions: dict[str, Tensor]
    keypoints: dict[str, Tensor]
    topology: dict[str, PendingLoss]


class KeypointHead(nn.Module):
    """A convolution and an MLP of two layers that predict the key points of a crop (Gu et al., section II-B).

    Args:
        channels: of the encoder's feature map.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv3d(channels, _KEYPOINT_CHANNELS, 3, padding=1)
        self.mlp = nn.Sequential(
            nn.Linear(_KEYPOINT_CHANNELS, _KEYPOINT_HIDDEN), nn.GELU(), nn.Linear(_KEYPOINT_HIDDEN, NUM_KEYPOINTS * 3)
        )
        initialize_linear_layers(self.mlp)

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, d, h, w) to (B, 9, 3) in (-1, 1)."""
        pooled = F.gelu(self.convolution(features)).mean(dim=(2, 3, 4))
        return self.mlp(pooled).tanh().unflatten(1, (NUM_KEYPOINTS, 3))


class TopoMAE(MaskedReconstruction):
    """Two branches reconstruct a crop, keep its topology, say where it lies, and agree (Gu et al., equation for L).

    Args:
        network: the fused network, built with as many classes as the crop has channels. UNETR++'s full-resolution
            head reconstructs; the pyramid and the other heads stay as they are.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.
    """

    config_class = TopoMAEConfig
    config: TopoMAEConfig
    headings = {"vit": "ViT", "unetrpp": "UNETR++"}  # noqa: RUF012 - a constant
    vit: ViTEncoder
    encoder: UNETRPPEncoder
    decoder: UNETRPPDecoder
    full_resolution_skip: nn.Module
    pyramid: TokenPyramid

    def __init__(self, network: FusedViTUNETRPP, config: TopoMAEConfig, crop_size: Sequence[int]):
        if not isinstance(network, FusedViTUNETRPP):
            raise ValueError(
                f"TopoMAE pre-trains a FusedViTUNETRPP, but the plans name {type(network).__name__}; plan this dataset "
                "with nnUNetv2_topomae plan_and_preprocess and pass -p nnUNetTopoMAEPlans"
            )
        super().__init__(network, config, crop_size)
        check_grid(crop_size, config.topology.grid)
        self.decoder.deep_supervision = False
        if config.dropout is not None:
            self._set_dropout(config.dropout)
        self.topological_loss = TopologicalLoss(config.topology.grid, config.topology.tolerance)
        channels = self.decoder.num_classes
        heads = {}
        if "vit" in config.branches:
            self.vit_decoder = light_decoder(self.vit, channels)
            heads["vit"] = KeypointHead(self.vit.width)
        if "unetrpp" in config.branches:
            heads["unetrpp"] = KeypointHead(self.encoder.features_per_stage[-1])
        self.keypoint_heads = nn.ModuleDict(heads if config.spatial.enabled else {})
        self._freeze_what_is_not_trained()

    def _set_dropout(self, rate: float) -> None:
        for part in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(part, nn.Dropout | nn.Dropout3d):
                part.p = rate

    def _freeze_what_is_not_trained(self) -> None:
        frozen = [self.pyramid, *self.decoder.seg_layers[1:]]
        if "vit" not in self.config.branches:
            frozen.append(self.vit)
        if "unetrpp" not in self.config.branches:
            frozen += [self.encoder, self.full_resolution_skip, self.decoder]
        for part in frozen:
            part.requires_grad_(False)
        self.vit.pos_embed.requires_grad_(False)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """The patches of the ViT, voxels per axis; both branches share the mask."""
        return self.vit.patch_size

    def views(self) -> KeypointViews:
        """A random crop, a random mask, and where the crop lies in its volume."""
        return KeypointViews(self.crop_size, self.mask_grid, self.config.mask_ratio)

    def prepare(self, images: ImageSource, device: torch.device, log: Callable[[str], None]) -> None:
        """Say so where crops hold whole images, whose key points never change; see :meth:`PretextTask.prepare`."""
        super().prepare(images, device, log)
        if not self.config.spatial.enabled:
            return
        shapes = [images.load(case).shape[1:] for case in islice(images.identifiers, _LOOKED_AT)]
        whole = sum(all(crop >= size for crop, size in zip(self.crop_size, shape, strict=True)) for shape in shapes)
        if 2 * whole > len(shapes):
            log(
                f"WARNING: {whole} of {len(shapes)} images are no larger than a crop, so that their key points are "
                f"always the same and teach little; choose a smaller patch_size in the plans, or set "
                f"pretraining.spatial.enabled to false"
            )

    def forward(self, batch: Batch) -> Prediction:
        """See :meth:`PretextTask.forward`; the ViT sees visible patches, UNETR++ the crop with zeros for the rest.

        The topological loss of a branch is started as soon as the branch has reconstructed the crop, so that threads
        compute that of the ViT while the GPU is busy with UNETR++.
        """
        crop, hidden = batch["crop"], self.hidden_voxels(batch)
        has_topology = self.config.topology.enabled and self.loss_follows
        target = self.topological_loss.start(crop) if has_topology else None
        reconstructions, features, topology = {}, {}, {}
        if "vit" in self.config.branches:  # not a loop over the branches, which torch.compile would give up
            reconstructions["vit"], features["vit"] = self._run_vit(batch)
            if target is not None:
                topology["vit"] = target.compare(compose(crop, reconstructions["vit"], hidden), _BY_VIT)
        if "unetrpp" in self.config.branches:
            reconstructions["unetrpp"], features["unetrpp"] = self._run_unetrpp(crop.masked_fill(hidden, 0))
            if target is not None:
                topology["unetrpp"] = target.compare(compose(crop, reconstructions["unetrpp"], hidden), _BY_UNETRPP)
        keypoints = {branch: head(features[branch]) for branch, head in self.keypoint_heads.items()}
        return Prediction(reconstructions, keypoints, topology)

    def _run_vit(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, C, D, H, W) in float32; the features on the grid of patches (B, width, d, h, w)."""
        visible = visible_indices(batch["mask"], self.num_visible)
        tokens = self.vit(batch["crop"], visible)
        return self.vit_decoder(tokens, visible).float(), self._token_map(tokens, visible)

    def _run_unetrpp(self, visible_voxels: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, C, D, H, W) in float32, and the coarsest features of the encoder."""
        scales = self.encoder(visible_voxels)
        return self.decoder(self.full_resolution_skip(visible_voxels), scales).float(), scales[-1]

    def _token_map(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Visible tokens on their grid, zeros elsewhere: (B, width, d, h, w)."""
        background = tokens.new_zeros(len(tokens), self.vit.pos_embed.shape[1], tokens.shape[-1])
        return scatter_tokens(tokens, visible, background).transpose(1, 2).unflatten(2, self.mask_grid)

    def images(self, output: Prediction, batch: Batch) -> dict[str, Tensor]:
        """The reconstructions, which are images already."""
        return output.reconstructions

    def loss_terms(self, output: Prediction, batch: Batch) -> dict[str, Tensor]:
        """Those of the eight terms of L that are switched on, and ``total``; see :meth:`PretextTask.loss_terms`.

        The topological terms are those that :meth:`forward` has started.
        """
        crop, keypoints, hidden = batch["crop"], batch["keypoints"], self.hidden_voxels(batch)
        terms = {f"{b}_mse": masked_mse(r, crop, hidden) for b, r in output.reconstructions.items()}
        terms |= {f"{b}_spatial": F.mse_loss(points, keypoints) for b, points in output.keypoints.items()}
        if len(output.keypoints) == 2:
            terms["spatial_consistency"] = F.mse_loss(output.keypoints["vit"], output.keypoints["unetrpp"])
        if len(output.reconstructions) == 2:
            terms["reconstruction_consistency"] = masked_mse(
                output.reconstructions["vit"], output.reconstructions["unetrpp"], hidden
            )
        terms |= {f"{b}_topological": pending.result() for b, pending in output.topology.items()}
        weights = loss_weights(self.config)
        return {"total": torch.stack([weights[name] * term for name, term in terms.items()]).sum(), **terms}

    def shown(self, output: Prediction, batch: Batch) -> CaseReport:
        """What every masked method shows, persistence diagrams, topological distance, and error of key points in mm.

        A guess that every crop lies in the middle of its volume is shown beside the latter: it has learned nothing.
        """
        report = super().shown(output, batch)
        crop, hidden = batch["crop"], self.hidden_voxels(batch)
        composed = {branch: compose(crop, r, hidden) for branch, r in output.reconstructions.items()}
        same_for_all_runs = choose_grid(self.crop_size, batch["spacing"][0].tolist())
        distances = TopologicalLoss(same_for_all_runs)(crop, *composed.values())
        metrics = {branch: dict(figures) for branch, figures in report.metrics.items()}
        for branch, distance in zip(composed, distances, strict=True):
            metrics[branch]["topological_distance"] = distance.item()
        actual, extent = (batch[name][0].cpu().numpy() for name in ("keypoints", "extent"))
        for branch, points in output.keypoints.items():
            metrics[branch]["keypoint_error_mm"] = keypoint_error(points[0].cpu().numpy(), actual, extent)
        if output.keypoints:
            metrics[_GUESS] = {"keypoint_error_mm": keypoint_error(centred(actual), actual, extent)}
        diagrams = {
            self.headings.get(name, name): [
                diagram.cpu().numpy() for diagram in persistence_diagrams(pool_to_grid(volume, same_for_all_runs)[0, 0])
            ]
            for name, volume in {"input": crop, **composed}.items()
        }
        return CaseReport(report.columns, metrics, diagrams)

    @classmethod
    def planned(cls, config: TopoMAEConfig, crop_size: Sequence[int], spacing: Sequence[float]) -> TopoMAEConfig:
        """A topology grid that fits the crop; see :meth:`PretextTask.planned`."""
        return replace(config, topology=replace(config.topology, grid=choose_grid(crop_size, spacing)))

    @classmethod
    def for_memory(cls, config: TopoMAEConfig) -> TopoMAEConfig:
        """Without topology, which is computed on the CPU; see :meth:`PretextTask.for_memory`."""
        return replace(config, topology=TopologyConfig(enabled=False))


def loss_weights(config: TopoMAEConfig) -> dict[str, float]:
    """Factor of every term in L = (1 - l1) L_vit + l1 L_unetrpp + l3 (consistencies), by the term's name.

    Each branch weighs its terms (1 - 2 l2) MSE + l2 topological + l2 spatial. With a single branch, l1 is 0 or 1.
    """
    lambda1 = config.lambda1 if len(config.branches) == 2 else float("unetrpp" in config.branches)
    weights = {"spatial_consistency": config.lambda3, "reconstruction_consistency": config.lambda3}
    for branch, share in (("vit", 1 - lambda1), ("unetrpp", lambda1)):
        weights[f"{branch}_mse"] = share * (1 - 2 * config.lambda2)
        weights[f"{branch}_topological"] = share * config.lambda2 * config.topology.weight
        weights[f"{branch}_spatial"] = share * config.lambda2
    return weights
