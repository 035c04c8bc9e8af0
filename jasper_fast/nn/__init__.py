"""The model: configuration, blocks, packed weights, the eager model to compare with, and checkpoint files."""
