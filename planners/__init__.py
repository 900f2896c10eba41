"""Planners that ``nnUNetv2_topomae plan_and_preprocess -pl`` finds."""
