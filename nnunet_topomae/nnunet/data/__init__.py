"""The folders of nnU-Net: raw and preprocessed datasets, unlabelled images, splits, and the stream of items."""
