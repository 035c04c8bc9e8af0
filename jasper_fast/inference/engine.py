"""The inference engine."""

import contextlib
import functools
import threading
import weakref
from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from jasper_fast.dispatch import choose, tuned
from jasper_fast.inference.graphs import CudaGraphs, Shapes, Turns
from jasper_fast.inference.launches import Launches
from jasper_fast.inference.plan import Network, weight_of
from jasper_fast.inference.stepwise import Stepwise
from jasper_fast.kernels import precision, tables
from jasper_fast.nn.cells import convs
from jasper_fast.nn.config import refuse
from jasper_fast.nn.model import Jasper, check_features


class InferenceEngine:
    """Runs a Jasper for evaluation: `engine(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V) fp32, lengths)`.

    `features` are floating point; `lengths` are integers in [0, T], in frames, by default all T. Both are on the device
    of the weights. Raises ValueError for arguments that do not fit. Lengths outside [0, T] are an error on the CPU. On
    a GPU they are clamped, because a check would have to wait for the GPU. No gradient flows through the engine.

    The constructor copies, folds (in fp32 or wider) and packs the model's weights. Call `refresh()` after they change.
    The constructor and `refresh()` raise ValueError for weights on the meta device.

    dtype: that of weights and activations, by default the model's; sums are in fp32 or wider. On a CPU with AVX512-BF16
    or AMX, bf16 is fastest. On most CPUs an engine in fp16 computes in fp32, which is faster.

    The engine reuses its activation buffers between calls. Results are in new memory and depend only on the input of
    the call. Any number of threads and CUDA streams may call one engine. It runs on the caller's current stream, one
    call at a time; for parallel calls make one engine per thread. `copy.deepcopy` and `pickle` copy the model and make
    an engine of the copy.

    On the triton and cuda faces a call runs one kernel per sub-block (two if it is separable) and one for the decoder.
    ATen does the log-softmax of a vocabulary of more than 128 symbols, and copies the features if the first block's
    panes or a depthwise conv read them. On the aten face a sub-block runs up to four kernels (more if it is separable),
    one of which is cuDNN's conv.

    The kernels between the first and the last are captured in a CUDA graph per shape. With conv masks T' is rounded up
    to a multiple of `bucket` frames, so that few shapes occur. The `graph_limit` most recently used graphs are kept.
    On the aten face such a graph has all kernels of the network.

    graphs: "auto" captures a shape when it occurs for the second time, if the weights are on a GPU. True captures a
    shape when it first occurs, and raises ValueError if the weights are not on a GPU. False captures nothing. On the
    triton face results have the same bits with and without graphs.

    If the model's `backend` is "auto", each call on a GPU uses the fastest face for its N*T'. Times that no table has
    yet are measured at the first call that needs them (see `jasper_fast.dispatch.tuned`). If the model's `tune` is
    False, all times come from tables and estimates. With "auto" an engine has one copy of the weights for each face
    that it may use.

    fp32_precision: the precision of products of fp32 weights on a GPU, "ieee" or "tf32". None: PyTorch's own switches
    decide at each call (`jasper_fast.kernels.precision`). Engines with "ieee" or "tf32" run one at a time, because each
    call changes PyTorch's switches while it runs.

    Equivalent to `model.eval()(features, lengths)` under `torch.no_grad()`, on rows t < length.
    """

    def __init__(
        self,
        model: Jasper | Network,
        *,
        dtype: torch.dtype | None = None,
        graphs: bool | Literal["auto"] = "auto",
        bucket: int = 64,
        graph_limit: int = 32,
        fp32_precision: str | None = None,
    ):
        refuse(
            ValueError,
            (
                dtype and not dtype.is_floating_point,
                f"dtype must be a floating-point dtype such as torch.float16, not {dtype}",
            ),
            (graphs not in ("auto", True, False), f"graphs must be 'auto', True or False, not {graphs!r}"),
            (
                bucket < 1 or graph_limit < 1,
                f"bucket and graph_limit must be at least 1, not {bucket} and {graph_limit}",
            ),
        )
        self._model, self._wanted, self._fp32 = model, dtype, precision.check(fp32_precision)
        self._graphs, self._bucket, self._limit = graphs, bucket, graph_limit
        self._lock = threading.Lock()
        self._turns: Turns | None = None
        self._convs = tuple(Counter(conv.shape for conv in convs(model.config)).items())
        self.refresh()

    def refresh(self) -> None:
        """Folds and packs the current weights of the model, on their current device."""
        with self._lock, precision.fp32(self._fp32), torch.no_grad():
            weight = weight_of(self._model)
            if weight.is_meta:
                raise ValueError("the weights of the model are on the meta device, so they have no values: load them")
            if self._turns is not None:
                with self._turns.turn():
                    self._turns.finish()  # the old weights and graphs must not be freed while in use
                self._waits.detach()
            turns, dtype = Turns(weight.device), self._wanted or weight.dtype
            faces = choose.fused_faces(self._model.backend, weight.device, dtype)
            with turns.turn(), weight.device:  # packs are made there, also inside another `with torch.device(...)`
                runs = {face: self._runner(face, dtype, turns) for face in faces}
            self._turns, self._runs, self._device, self._dtype = turns, runs, weight.device, dtype
            # The allocator does not know which streams use the buffers, so wait for the streams before the buffers are
            # freed.
            self._waits = weakref.finalize(self, turns.finish)
            self._waits.atexit = False

    def __reduce__(self) -> tuple:
        """Copies or pickles only the model and the settings. The copy folds the weights itself, and has its own lock,
        buffers and graphs."""
        shapes = {"graphs": self._graphs, "bucket": self._bucket, "graph_limit": self._limit}
        return functools.partial(type(self), dtype=self._wanted, fp32_precision=self._fp32, **shapes), (self._model,)

    def _runner(self, face: str, dtype: torch.dtype, turns: Turns) -> Launches | Stepwise:
        wanted = turns.device.type == "cuda" if self._graphs == "auto" else self._graphs
        graphs = CudaGraphs(turns.device) if wanted else None
        shapes = Shapes(turns, graphs, patient=self._graphs == "auto", limit=self._limit)
        kind = Launches if face in choose.CONVS else Stepwise
        return kind(self._model, dtype, face, shapes, bucket=self._bucket)

    def _chosen(self, n: int, t: int) -> Launches | Stepwise:
        """Returns the runner for `n` utterances of `t` feature frames."""
        if len(self._runs) == 1:
            return self._run
        with contextlib.nullcontext() if self._model.tune else tuned.off():
            rows_log2 = tables.bucket(n * max(1, self._run.plan.out_frames(t)))
            return self._runs[choose.fused_face(self._device, self._dtype, self._convs, rows_log2, tuple(self._runs))]

    @property
    def _run(self) -> Launches | Stepwise:
        """The first runner. On a CPU there is no other."""
        return next(iter(self._runs.values()))

    @torch.no_grad()
    def __call__(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, _, t = check_features(features, lengths, self._model.config)
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        if features.device != self._device:
            raise ValueError(f"features are on {features.device}, the engine's weights on {self._device}; move one")
        if lengths is None:
            lengths = torch.full((n,), t, dtype=torch.int64, device=features.device)
        elif lengths.device != self._device:
            raise ValueError(f"lengths are on {lengths.device}, the features on {self._device}; move the lengths")
        elif not lengths.is_cuda and any(not 0 <= length <= t for length in lengths.tolist()):
            raise ValueError(f"lengths must lie in [0, T = {t}], got {lengths.tolist()}")
        return self._compute(features, lengths)

    def _compute(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        n, _, t = features.shape
        lengths = lengths.to(torch.int64).contiguous()
        with self._lock, precision.fp32(self._fp32):
            if features.numel() == 0:
                return self._run.plan.nothing(features, lengths)
            runner = self._chosen(n, t)  # not within the turn, because tuning may synchronise the device
            with self._turns.turn():
                return runner.run(features, lengths)


class EncoderEngine(InferenceEngine):
    """An engine for a model without a decoder: `engine(features, lengths) -> output of the last block (N, C, T')`, in
    NTC memory. Lengths outside [0, T] are clamped."""

    @torch.no_grad()
    def __call__(self, features: Tensor, lengths: Tensor) -> Tensor:
        out, _ = self._compute(features, lengths.to(torch.int64).clamp(0, features.shape[2]))
        return out.transpose(1, 2)
