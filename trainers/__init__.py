"""Trainers that nnU-Net finds through ``nnUNet_extTrainer``; its modules are leaves, imported by nnU-Net by file."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent  # what nnUNet_extTrainer must name
