"""Weights on disk: checkpoints, and handing them over to fine-tuning."""
