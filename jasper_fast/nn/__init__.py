"""The model: configuration, blocks, packed weights, the same model in eager PyTorch, and the weights of checkpoint files."""
