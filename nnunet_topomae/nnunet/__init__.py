"""The only room that imports nnunetv2: planning, data loading, training and checkpoints."""
