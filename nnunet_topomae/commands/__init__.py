"""The console command ``nnUNetv2_topomae``: what nnU-Net's own commands cannot do."""
