"""The benchmark cases. A case is an op at a shape or a model at a batch, with inputs, contenders and answers."""
