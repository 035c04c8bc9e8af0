"""The model: configuration, blocks, packed weights, the eager twin, and the weights of checkpoint files."""
