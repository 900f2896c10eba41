"""Figures and tables of a pre-training run."""
