"""The inference engine: what a user calls."""

from __future__ import annotations

import functools
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

    `features` are floating point, in frames; `lengths` integers in [0, T], all on the weights' device. A ValueError
    says what does not fit. Lengths outside of that range are an error on the CPU; on a GPU, where looking at them would
    stall it, kernels clamp them. No gradient flows through the engine.

    The engine copies the model's weights, folded (in fp32 or better) and packed, when it is made: call `refresh()`
    after they change. dtype: that of weights and activations, by default the model's own; sums are fp32 always. On a
    CPU bf16 is the fastest where it has AVX512-BF16 or AMX, and fp16 runs as fp32, which is faster there.

    It owns its activation buffers and reuses them between calls; results are in memory of their own and depend on
    nothing but this call's input. Any number of threads and CUDA streams may call one engine: it runs on the caller's
    current stream, one call at a time (make an engine a thread for more; they share nothing). `copy.deepcopy` and
    `pickle` copy the model and make an engine of the copy.

    On the triton face a call is one kernel a sub-block, features to log-probabilities, and no ATen op, where lengths
    are int64 and the vocabulary has up to 128 symbols (ATen does a larger one's log-softmax, and copies features that
    the first block's own panes take). All kernels but the first and the last are one CUDA graph for each N and, with
    conv masks, each `bucket` frames of T' (without masks, each T), of which the `graph_limit` used last are kept.
    graphs: "auto" captures on a GPU when a shape comes for the second time; True at the first, and is a ValueError
    where there is no such face; False never. Results are the same bits with and without.

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
        """Fold and pack the model's weights as they are now, on the device that they are on now."""
        with self._lock, torch.no_grad():
            if self._turns is not None:
                with self._turns.turn():
                    self._turns.finish()  # the old weights and graphs must not go while they are in use
            weight = self._model.decoder.layers[0].weight
            turns = Turns(weight.device)
            with turns.turn():
                runner = self._runner(weight.detach(), turns)
            self._turns, self._run, self._device = turns, runner, weight.device
            # the allocator knows only the stream on which buffers were made, and calls may have come on others
            self._waits = weakref.finalize(self, turns.finish)
            self._waits.atexit = False

    def __reduce__(self) -> tuple:
        """A copy, also a pickled one, copies the model and folds its weights as they are then: a lock cannot be copied,
        and buffers and graphs are this engine's own."""
        how = {"dtype": self._wanted, "graphs": self._graphs, "bucket": self._bucket, "graph_limit": self._limit}
        return functools.partial(type(self), **how), (self._model,)

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
