"""The benchmark cases: each op at a shape, each model at a batch, with inputs, contenders and answers."""
