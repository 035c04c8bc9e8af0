"""Inference: batch norm folded, weights packed once, each sub-block one fused conv, panes read from a history buffer.

`engine` is what a user calls; `plan` folds the model and says which sub-block reads and writes where; `stepwise` runs
the plan through ATen or the CPU kernels, `launches` through Triton's, in CUDA graphs on a GPU (`graphs`, `shapes`).
`fuse` lets models of other projects run on ours: their blocks in training (`nn.fuse`), whole encoders in evaluation
(`encoders`).
"""

from jasper_fast.inference.engine import InferenceEngine

__all__ = ["InferenceEngine"]
