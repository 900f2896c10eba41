"""Trainers that nnU-Net finds through ``nnUNet_extTrainer``; leaves, imported by nnU-Net as top-level modules."""
