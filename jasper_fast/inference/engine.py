"""The inference engine."""

from __future__ import annotations

import threading
import weakref
from typing import Literal

import torch
from torch import Tensor

from jasper_fast.dispatch import choose
from jasper_fast.inference.graphs import CudaGraphs, Turns
from jasper_fast.inference.launches import Launches
from jasper_fast.inference.stepwise import Stepwise
from jasper_fast.nn.model import Jasper, check_features


class InferenceEngine:
    """Runs a Jasper for evaluation: `engine(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V) fp32, lengths)`.

    `features` are floating point; `lengths` are integers in [0, T], in frames; both are on the device of the weights.
    Raises ValueError for arguments that do not fit. Lengths outside that range are an error on the CPU. On a GPU
    kernels clamp them, because checking them would stall the GPU. No gradient flows through the engine.

    The constructor copies, folds (in fp32 or wider) and packs the model's weights: call `refresh()` after they change.
    dtype: of weights and activations, by default that of the model; sums are always fp32. bf16 is fastest on a CPU with
    AVX512-BF16 or AMX. fp16 runs as fp32 on a CPU, which is faster.

    It reuses its activation buffers between calls. Results are in new memory and depend only on the input of the call.
    Any number of threads and CUDA streams may call one engine. It runs on the caller's current stream, one call at a
    time; for parallel calls make one engine per thread.

    On the triton face a call is one kernel per sub-block, from features to log-probabilities, without ATen ops, if
    lengths are int64 and the vocabulary has at most 128 symbols. (ATen computes a larger log-softmax, and copies
    features that panes of the first block take.) All kernels but the first and the last form one CUDA graph, one for
    each N and each T' rounded up to `bucket` frames (without conv masks, for each T). The `graph_limit` graphs used
    last are kept. graphs: "auto" captures on a GPU when a shape comes for the second time; True captures at the first
    time and raises ValueError without the triton face; False never captures. Results are bit-identical with and without
    graphs.

    Equivalent to `model.eval()(features, lengths)` under `torch.no_grad()`, on rows t < length.
    """

    def __init__(
        self,
        model: Jasper,
        *,
        dtype: torch.dtype | None = None,
        graphs: bool | Literal["auto"] = "auto",
        bucket: int = 64,
        graph_limit: int = 32,
    ):
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, as torch.float16, not {dtype}")
        if graphs not in ("auto", True, False):
            raise ValueError(f"graphs must be 'auto', True or False, not {graphs!r}")
        if bucket < 1 or graph_limit < 1:
            raise ValueError(f"bucket and graph_limit must be at least 1, not {bucket} and {graph_limit}")
        self._model, self._wanted = model, dtype
        self._graphs, self._bucket, self._limit = graphs, bucket, graph_limit
        self._lock = threading.Lock()
        self._turns: Turns | None = None
        self.refresh()

    def refresh(self) -> None:
        """Folds and packs the present weights of the model, on their present device."""
        with self._lock, torch.no_grad():
            if self._turns is not None:
                with self._turns.turn():
                    self._turns.finish()  # the old weights and graphs must not be freed while in use
            weight = self._model.decoder.layers[0].weight
            turns = Turns(weight.device)
            with turns.turn():
                runner = self._runner(weight.detach(), turns)
            self._turns, self._run, self._device = turns, runner, weight.device
            # the allocator knows only the stream on which a buffer was made, but calls may have used others
            self._waits = weakref.finalize(self, turns.finish)
            self._waits.atexit = False

    def _runner(self, weight: Tensor, turns: Turns) -> Launches | Stepwise:
        dtype = self._wanted or weight.dtype
        face = choose.fused_face(self._model.backend, weight.device, dtype)
        if self._graphs is True and face != "triton":
            raise ValueError(f"graphs=True needs the triton face, and this engine's is {face!r}; take graphs='auto'")
        if face != "triton":
            return Stepwise(self._model, dtype, face)
        wanted = weight.is_cuda if self._graphs == "auto" else self._graphs
        return Launches(
            self._model,
            dtype,
            turns,
            CudaGraphs(weight.device) if wanted else None,
            patient=self._graphs == "auto",
            bucket=self._bucket,
            limit=self._limit,
        )

    @torch.no_grad()
    def __call__(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, _, t = check_features(features, lengths, self._model.config)
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        if features.device != self._device:
            raise ValueError(f"features are on {features.device}, the engine's weights on {self._device}: move either")
        if lengths is None:
            lengths = torch.full((n,), t, dtype=torch.int64, device=features.device)
        elif lengths.device != self._device:
            raise ValueError(f"lengths are on {lengths.device}, the features on {self._device}: move the lengths")
        elif not lengths.is_cuda and any(not 0 <= length <= t for length in lengths.tolist()):
            raise ValueError(f"lengths must lie in [0, T = {t}], got {lengths.tolist()}")
        with self._lock, self._turns.turn():
            return self._run.run(features, lengths.to(torch.int64).contiguous())
