"""The console command ``nnUNetv2_topomae``, its demo, and the made-up dataset that demo and tests use."""
