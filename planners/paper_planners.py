"""The five set-ups of Gu et al., section III: ``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEPlannerSynapse``.

Intensities are scaled to [0, 1]; the ViT's positions are SelfMedMAE's, and pre-training has the dropout of UNETR++.
TopoMAEPlanner decides what is not fixed here. docs/datasets.md says where every value comes from.
"""

import math
from typing import ClassVar

from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner


class _PaperPlanner(TopoMAEPlanner):
    unit_intensities = True
    local_start = False
    pretraining_dropout: ClassVar = 0.1
    max_epochs = math.inf
    warmup_share = 0.01


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
