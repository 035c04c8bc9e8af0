"""The eager model in CUDA graphs."""

import torch
from torch import Tensor, nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals.eager_layouts import Model
from jasper_fast.kernels import capture


def needs_gpu(model: nn.Module, what: str) -> None:
    """Raises Absent if the model is not on a GPU, which the rival `what` needs."""
    if next(model.parameters()).device.type != "cuda":
        raise Absent(f"{what} needs an NVIDIA GPU")


def cuda_graph(model: nn.Module) -> Model:
    """Returns the eager model with a CUDA graph per shape, for inference. Raises Absent if it is not on a GPU."""
    needs_gpu(model, "a CUDA graph")
    graphs: dict[tuple, tuple] = {}

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        key = (features.shape, features.dtype)
        if key not in graphs:
            still = features.clone(), lengths.clone()
            with torch.no_grad():
                graphs[key] = *capture.captured(lambda: model(*still), before=3), still
        graph, out, still = graphs[key]
        still[0].copy_(features)
        still[1].copy_(lengths)
        graph.replay()
        return out[0].clone(), out[1].clone()

    return call
