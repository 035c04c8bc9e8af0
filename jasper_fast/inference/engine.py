"""The inference engine."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from typing import Literal

import torch
from torch import Tensor

from jasper_fast.dispatch import choose, tuned
from jasper_fast.inference.graphs import CudaGraphs, Turns
from jasper_fast.inference.launches import Launches
from jasper_fast.inference.plan import Network, weight_of
from jasper_fast.inference.shapes import Shapes
from jasper_fast.inference.stepwise import Stepwise
from jasper_fast.kernels import precision, tables
from jasper_fast.nn.cells import engine_convs
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
    time; for parallel calls make one engine per thread. `copy.deepcopy` and `pickle` copy the model and make an engine
    of the copy.

    On the triton and cuda faces a call is one kernel a sub-block, features to log-probabilities, and no ATen op, where
    lengths are int64 and the vocabulary has up to 128 symbols (ATen does a larger one's log-softmax, and copies
    features that the first block's own panes take). All kernels but the first and the last are one CUDA graph for each
    N and, with conv masks, each `bucket` frames of T' (without masks, each T), of which the `graph_limit` used last are
    kept. The steps through cuDNN, up to four kernels a sub-block, are graphs of the same kind.
    graphs: "auto" captures on a GPU when a shape comes for the second time; True at the first, and is a ValueError
    without a GPU; False never. On the triton face results are the same bits with and without.

    With `backend="auto"` on a GPU each call takes the faster of the two for its N*T': as measured there, once, at the
    first such call (see `jasper_fast.dispatch.tuned`; the model's `tune=False` keeps to tables and rules). The engine
    then holds the weights twice, one copy for each; a model with backend="triton" or "reference" has one.

    fp32_precision: what products of fp32 weights are rounded to on a GPU, "ieee" (not at all) or "tf32"; None as
    PyTorch's own switches say at the time of a call (`jasper_fast.kernels.precision`). Calls of engines with one take
    turns, because they set those switches meanwhile.

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
        fp32_precision: str | None = None,
    ):
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, as torch.float16, not {dtype}")
        if graphs not in ("auto", True, False):
            raise ValueError(f"graphs must be 'auto', True or False, not {graphs!r}")
        if bucket < 1 or graph_limit < 1:
            raise ValueError(f"bucket and graph_limit must be at least 1, not {bucket} and {graph_limit}")
        self._model, self._wanted, self._fp32 = model, dtype, precision.check(fp32_precision)
        self._graphs, self._bucket, self._limit = graphs, bucket, graph_limit
        self._lock = threading.Lock()
        self._turns: Turns | None = None
        self._convs = engine_convs(model.config)
        self.refresh()

    def refresh(self) -> None:
        """Folds and packs the present weights of the model, on their present device."""
        with self._lock, self._precisely(), torch.no_grad():
            if self._turns is not None:
                with self._turns.turn():
                    self._turns.finish()  # the old weights and graphs must not be freed while in use
            weight = weight_of(self._model)
            turns, dtype = Turns(weight.device), self._wanted or weight.dtype
            faces = choose.fused_faces(self._model.backend, weight.device, dtype)
            with turns.turn():
                runs = {face: self._runner(face, dtype, turns) for face in faces}
            self._turns, self._runs, self._device, self._dtype = turns, runs, weight.device, dtype
            # the allocator knows only the stream on which buffers were made, and calls may have come on others
            self._waits = weakref.finalize(self, turns.finish)
            self._waits.atexit = False

    def _precisely(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._fp32 is None else precision.fp32(self._fp32)

    def __reduce__(self) -> tuple:
        """A copy, also a pickled one, copies the model and folds its weights as they are then: a lock cannot be copied,
        and buffers and graphs are this engine's own."""
        how = {"dtype": self._wanted, "graphs": self._graphs, "bucket": self._bucket, "graph_limit": self._limit}
        how["fp32_precision"] = self._fp32
        return functools.partial(type(self), **how), (self._model,)

    def _runner(self, face: str, dtype: torch.dtype, turns: Turns) -> Launches | Stepwise:
        if self._graphs is True and face == "cpu":
            raise ValueError("graphs=True needs a CUDA GPU, and the weights are on the CPU; take graphs='auto'")
        wanted = turns.device.type == "cuda" if self._graphs == "auto" else self._graphs
        graphs = CudaGraphs(turns.device) if wanted else None
        shapes = Shapes(turns, graphs, patient=self._graphs == "auto", limit=self._limit)
        if face in choose.CONVS:
            return Launches(self._model, dtype, face, shapes, bucket=self._bucket)
        return Stepwise(self._model, dtype, face, shapes, bucket=self._bucket)

    def _chosen(self, n: int, t: int) -> Launches | Stepwise:
        """The runner of `n` utterances of `t` feature frames."""
        if len(self._runs) == 1:
            return self._run
        with contextlib.nullcontext() if self._model.tune else tuned.off():
            rows_log2 = tables.bucket(n * max(1, self._run.out_frames(t)))
            chosen = choose.fused_face(self._device, self._dtype, self._convs, rows_log2, tuple(self._runs))
            return self._runs[chosen]

    @property
    def _run(self) -> Launches | Stepwise:
        """The first of the runners, as a rule the only one."""
        return next(iter(self._runs.values()))

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
        return self._compute(features, lengths)

    def _compute(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        n, _, t = features.shape
        with self._lock, self._precisely():
            runner = self._chosen(n, t)  # before the turn: what is measured there waits for the device
            with self._turns.turn():
                return runner.run(features, lengths.to(torch.int64).contiguous())


class EncoderEngine(InferenceEngine):
    """The same for a model without a decoder: `engine(features, lengths) -> output of the last block (N, C, T')`, in
    NTC memory. Lengths outside [0, T] are clamped."""

    def __init__(self, model: Network, **how: object):
        super().__init__(model, **how)

    @torch.no_grad()
    def __call__(self, features: Tensor, lengths: Tensor) -> Tensor:
        out, _ = self._compute(features, lengths.clamp(0, features.shape[2]))
        return out.transpose(1, 2)
