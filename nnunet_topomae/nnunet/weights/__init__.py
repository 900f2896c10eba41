"""Weights on the disk: checkpoints, handing them over to fine-tuning, and adapting them to other plans."""
