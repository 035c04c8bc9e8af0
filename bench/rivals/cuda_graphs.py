"""The eager model in CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals.eager_layouts import Model
from jasper_fast.kernels import capture


def captured(call: Callable[[], object], before: int = 1) -> tuple["torch.cuda.CUDAGraph", object]:
    """Returns `call` as a CUDA graph, and its result in the capture.

    Before the capture, `call` runs `before` times on a side stream, so that one-time work is done.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(before):
            call()
        out = capture.record(graph, call)
    torch.cuda.current_stream().wait_stream(side)
    return graph, out


def cuda_graph(model: nn.Module) -> Model:
    """Returns the eager model with a CUDA graph per shape, for inference. Raises Absent without a GPU."""
    if not torch.cuda.is_available():
        raise Absent("CUDA graphs need an NVIDIA GPU")
    graphs: dict[tuple, tuple] = {}

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        key = (features.shape, features.dtype)
        if key not in graphs:
            still = features.clone(), lengths.clone()
            with torch.no_grad():
                graph, out = captured(lambda: model(*still), before=3)
            graphs[key] = (graph, still, out)
        graph, still, out = graphs[key]
        still[0].copy_(features)
        still[1].copy_(lengths)
        graph.replay()
        return out[0].clone(), out[1].clone()

    return call
