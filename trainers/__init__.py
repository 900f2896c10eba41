"""Trainers that nnU-Net finds through ``nnUNet_extTrainer``.

nnU-Net imports each file on its own, so none of them may import another one.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent  # what nnUNet_extTrainer must name
