"""Optimal transport between persistence diagrams, without PyTorch, so that processes can do without it."""
