"""The five set-ups of Gu et al., section III: ``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEPlannerSynapse``.

TopoMAEPlanner decides what is not fixed here. docs/datasets.md says where every value comes from.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nnunet_topomae.networks.geometry import Size
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner


class _PaperPlanner(TopoMAEPlanner):
    unit_intensities = True
    position_temperature, position_scale = 10000.0, 1.0  # SelfMedMAE's
    max_epochs = math.inf
    warmup_share = 0.01

    def pretraining_config(self, crop_size: Size, spacing: Sequence[float], batch_size: int) -> Any:
        """With the dropout of the published UNETR++; see :meth:`PretrainingPlanner.pretraining_config`."""
        return replace(super().pretraining_config(crop_size, spacing, batch_size), dropout=0.1)


class TopoMAEPlannerSynapse(_PaperPlanner):
    """Synapse multi-organ CT, 18 cases to train on and 12 to test on."""

    default_plans_name = "nnUNetTopoMAESynapsePlans"
    intensity_range = (-175, 250)
    crop_size = (64, 128, 128)


class TopoMAEPlannerBTCV(_PaperPlanner):
    """BTCV multi-organ CT."""

    default_plans_name = "nnUNetTopoMAEBTCVPlans"
    target_spacing = (2.0, 1.5, 1.5)
    intensity_range = (-175, 250)
    crop_size = (96, 96, 96)


class TopoMAEPlannerACDC(_PaperPlanner):
    """ACDC cardiac MRI, 70 cases to train on, 10 to validate and 20 to test on."""

    default_plans_name = "nnUNetTopoMAEACDCPlans"
    crop_size = (16, 160, 160)


class TopoMAEPlannerSpleen(_PaperPlanner):
    """Spleen CT of the Medical Segmentation Decathlon, split 80:15:5."""

    default_plans_name = "nnUNetTopoMAESpleenPlans"
    target_spacing = (2.0, 1.5, 1.5)
    intensity_range = (-57, 164)
    crop_size = (96, 96, 96)


class TopoMAEPlannerLung(_PaperPlanner):
    """Lung CT of the Medical Segmentation Decathlon, split 80:20."""

    default_plans_name = "nnUNetTopoMAELungPlans"
    crop_size = (32, 192, 192)
