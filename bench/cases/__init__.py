"""The questions: each op at a shape, each model at a batch, with its inputs, contenders and answers."""
