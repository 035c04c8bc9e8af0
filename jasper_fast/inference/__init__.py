"""Inference: batch norm folded, weights packed once, each sub-block one fused conv, panes read from a history buffer.

Users call `engine`. `plan` folds the model and decides where each sub-block reads and writes. `stepwise` runs the plan
with ATen or the CPU kernels; `launches` runs it with Triton's kernels, in CUDA graphs on a GPU (`graphs`).
"""

from jasper_fast.inference.engine import InferenceEngine

__all__ = ["InferenceEngine"]
