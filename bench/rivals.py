"""What people use today, on the same weights and inputs: eager layouts, torch.compile, CUDA graphs, other runtimes.

Each builder takes an EagerJasper in the wanted mode and returns a callable of the same signature,
`(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V), lengths)`, or raises `Absent`.
"""

import contextlib
import copy
import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Absent, Run

Model = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(model: nn.Module) -> Model:
    """The reference system's way: NCT memory, one module a step, a mask before every convolution."""
    return model


def eager_no_masks(model: nn.Module) -> Model:
    """The same without conv masks: right for unpadded batches only, and cheaper."""
    bare = copy.copy(model)
    bare.config = _without_masks(model.config)
    return bare


class ChannelsLast2d(nn.Module):
    """Eager with each conv as a 2D one over a height of 1, in channels_last memory, where cuDNN needs no transposes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.weights = nn.ParameterDict()
        for name, conv in _convs(model):
            weight = conv.weight.detach().unsqueeze(2).to(memory_format=torch.channels_last)
            self.weights[name.replace(".", "/")] = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As EagerJasper's."""
        masks = self.model.config.encoder.use_conv_masks
        xs = [features.unsqueeze(2).contiguous(memory_format=torch.channels_last)]
        lens = lengths if masks else None
        for b, block in enumerate(self.model.encoder.layers):
            xs, lens = self._block(f"encoder/layers/{b}", block, xs, lens)
        decoder = self.model.decoder.layers[0]
        logits = F.conv2d(xs[-1], self.weights["decoder/layers/0"], decoder.bias).squeeze(2)
        out_lengths = lengths
        for block in self.model.encoder.layers:
            for _ in range(block.cfg.repeat):
                out_lengths = block.cfg.out_length(out_lengths)
        return logits.transpose(1, 2).float().log_softmax(dim=2), out_lengths

    def _block(
        self, at: str, block: nn.Module, xs: list[Tensor], lens: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        x, lens_in = xs[-1], lens
        for i, layer in enumerate(block.conv):
            if isinstance(layer, nn.Conv1d):
                x = self._conv(f"{at}/conv/{i}", layer, x, lens)
                lens = block.cfg.out_length(lens) if lens is not None else None
            else:
                x = _norm2d(layer, x) if isinstance(layer, nn.BatchNorm1d) else layer(x)
        panes = xs if block.cfg.residual_dense else xs[-1:]
        for k, ((conv, norm), pane) in enumerate(zip(getattr(block, "res", ()), panes, strict=False)):
            x = x + _norm2d(norm, self._conv(f"{at}/res/{k}/0", conv, pane, lens_in))
        x = block.out(x)
        return ([*xs, x] if block.cfg.residual and block.cfg.residual_dense else [x]), lens

    def _conv(self, name: str, conv: nn.Conv1d, x: Tensor, lens: Tensor | None) -> Tensor:
        if lens is not None:
            t = torch.arange(x.shape[-1], device=x.device)
            x = torch.where((t >= lens[:, None])[:, None, None, :], 0.0, x)  # masked_fill leaves channels_last memory
        return F.conv2d(x, self.weights[name], None, (1, conv.stride[0]), (0, conv.padding[0]), (1, conv.dilation[0]))


def _norm2d(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )


def compiled(mode: str) -> Callable[[nn.Module], Model]:
    """torch.compile over the whole model."""

    def build(model: nn.Module) -> Model:
        fresh_compiler()
        return torch.compile(model, mode=mode, dynamic=False)

    return build


def compiled_blocks_frozen(model: nn.Module) -> Model:
    """torch.compile in max-autotune with freezing, block by block (inference only)."""
    fresh_compiler()
    import torch._inductor.config as inductor

    frozen = copy.copy(model)
    frozen._modules = dict(model._modules)
    frozen.encoder = nn.Module()
    frozen.encoder.layers = nn.ModuleList(
        torch.compile(block, mode="max-autotune", dynamic=False) for block in model.encoder.layers
    )

    ready: set[torch.Size] = set()

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            if features.shape in ready:  # the compiler's setting, which takes the host's time, is for compiling alone
                return frozen(features, lengths)
            with inductor.patch(freezing=True):
                found = frozen(features, lengths)
        ready.add(features.shape)
        return found

    return call


VARIANTS = 64  # of a compiled function


def fresh_compiler() -> None:
    """torch.compile with nothing compiled yet, and never eager in its place: beyond 8 variants of a function, which
    Jasper's twelve blocks are, or a grid's shapes, it would go on in eager with a warning, and eager would be timed."""
    needs_compiler()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def captured(call: Callable[[], object], before: int = 1) -> tuple["torch.cuda.CUDAGraph", object]:
    """`call` as a CUDA graph, and what it returned in the capture; run `before` times on a side stream first, where
    whatever happens only once happens. No garbage collection meanwhile: what it frees could break off the capture."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(before):
            call()
    torch.cuda.current_stream().wait_stream(side)
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            out = call()
    finally:
        if collects:
            gc.enable()
    return graph, out


def cuda_graph(model: nn.Module) -> Model:
    """The eager model captured in a CUDA graph per shape (inference only)."""
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


def onnx_runtime(model: nn.Module) -> Model:
    """ONNX Runtime with all its graph optimisations; inputs and outputs stay on the model's device (inference only)."""
    _need("onnxruntime", "pip install onnxruntime onnx onnxscript")
    _need("onnx", "pip install onnx onnxscript")
    import onnxruntime

    device = next(model.parameters()).device
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Absent(f"onnxruntime has no {provider}: pip install onnxruntime-gpu")
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    settings = {"device_id": str(stream.device.index), "user_compute_stream": str(stream.cuda_stream)} if stream else {}
    with tempfile.TemporaryDirectory() as folder, _no_grad_eval(model):
        path = Path(folder) / "jasper.onnx"
        features = torch.zeros(
            2, model.config.encoder.in_feats, 64, device=device, dtype=next(model.parameters()).dtype
        )
        lengths = torch.full((2,), 64, device=device)
        dims = {"features": {0: "N", 2: "T"}, "lengths": {0: "N"}}
        names = {"input_names": ["features", "lengths"], "output_names": ["log_probs", "out_lengths"]}
        torch.onnx.export(model, (features, lengths), str(path), dynamic_axes=dims, dynamo=False, **names)
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, settings)])
    if provider not in session.get_providers():  # it falls back to the CPU with a warning alone
        raise Absent(f"onnxruntime cannot load its {provider}: install the CUDA and cuDNN that it was built for")
    return bound(session, model, stream)


def bound(session, model: nn.Module, stream: "torch.cuda.Stream | None" = None) -> Model:
    """An ONNX Runtime session that reads and writes tensors where they are; `stream` is the one that it runs on.

    Its stream waits for the caller's and the caller's for it, so that neither reads what is not yet written.
    """
    numbers = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}

    def place(name: str, t: Tensor) -> dict:
        if t.dtype not in numbers:
            raise ValueError(f"ONNX Runtime is given no {t.dtype} here: take --dtype fp32 or fp16")
        at = {"device_type": t.device.type, "device_id": t.device.index or 0, "buffer_ptr": t.data_ptr()}
        return {"name": name, "element_type": numbers[t.dtype], "shape": tuple(t.shape), **at}

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, lengths = features.contiguous(), lengths.contiguous()
        N, T, V = features.shape[0], _frames_out(model, features.shape[2]), model.decoder.layers[0].out_channels
        log_probs, out_lengths = features.new_empty((N, T, V), dtype=torch.float32), torch.empty_like(lengths)
        binding = session.io_binding()
        binding.bind_input(**place("features", features))
        binding.bind_input(**place("lengths", lengths))
        binding.bind_output(**place("log_probs", log_probs))
        binding.bind_output(**place("out_lengths", out_lengths))
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        session.run_with_iobinding(binding)
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        return log_probs, out_lengths

    return call


def _frames_out(model: nn.Module, T: int) -> int:
    """Frames of the model's output for T of its input."""
    for block in model.encoder.layers:
        for _ in range(block.cfg.repeat):
            T = block.cfg.out_length(T)
    return T


def openvino(model: nn.Module) -> Model:
    """OpenVINO on the CPU, weights in the model's own precision (inference only)."""
    _need("openvino", "pip install openvino")
    if next(model.parameters()).device.type != "cpu":
        raise Absent("OpenVINO is timed on the CPU only")
    import openvino as ov

    features = torch.zeros(2, model.config.encoder.in_feats, 64, dtype=next(model.parameters()).dtype)
    with _no_grad_eval(model):
        converted = ov.convert_model(model, example_input=(features, torch.full((2,), 64)))
    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    ready = ov.compile_model(converted, "CPU", hints)

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found = ready((features.numpy(), lengths.numpy()))
        return torch.from_numpy(found[0].copy()), torch.from_numpy(found[1].copy())

    return call


def tensorrt(model: nn.Module) -> Model:
    """TensorRT through Torch-TensorRT (inference only)."""
    if not torch.cuda.is_available():
        raise Absent("TensorRT needs an NVIDIA GPU")
    _need("torch_tensorrt", "pip install torch-tensorrt")
    import torch_tensorrt  # noqa: F401  registers the backend

    return torch.compile(model, backend="tensorrt", dynamic=False)


INFERENCE: dict[str, Callable[[nn.Module], Model]] = {
    "eager": eager,
    "eager_no_masks": eager_no_masks,
    "eager_2d_channels_last": ChannelsLast2d,
    "compile": compiled("default"),
    "compile_reduce_overhead": compiled("reduce-overhead"),
    "compile_blocks_frozen": compiled_blocks_frozen,
    "cuda_graph": cuda_graph,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
    "tensorrt": tensorrt,
}
TRAINING: dict[str, Callable[[nn.Module], Model]] = {
    "eager": eager,
    "eager_no_masks": eager_no_masks,
    "eager_2d_channels_last": ChannelsLast2d,
    "compile": compiled("default"),
    "compile_reduce_overhead": compiled("reduce-overhead"),
}
KINDS = {"inference": INFERENCE, "training": TRAINING}
# torch.compile of a 54-layer model takes minutes on a small CPU, so there it runs only when asked for
DEFAULT = {
    ("inference", "cpu"): ("eager", "eager_no_masks", "eager_2d_channels_last", "onnxruntime", "openvino"),
    ("inference", "cuda"): tuple(n for n in INFERENCE if n != "openvino"),
    ("training", "cpu"): ("eager", "eager_2d_channels_last"),
    ("training", "cuda"): tuple(TRAINING),
}


class UnknownRival(ValueError):
    """A rival was asked for that nobody knows; the message names those that there are."""


def choose(kind: str, device: torch.device, wanted: str) -> dict[str, Callable[[nn.Module], Model]]:
    """Rivals for `kind` ("inference" or "training"): `wanted` is default, all, or names with commas; eager always."""
    known = KINDS[kind]
    if wanted == "all":
        return known
    names = (
        DEFAULT[kind, device.type]
        if wanted == "default"
        else ("eager", *(n for n in wanted.split(",") if n != "eager"))
    )
    if unknown := [n for n in names if n not in known]:
        raise UnknownRival(f"no rival {unknown[0]!r} for {kind}; known: {', '.join(known)}")
    return {n: known[n] for n in names}


def only(kind: str, wanted: str) -> str:
    """`wanted` without the names that only the other kind knows: one choice for inference and training together."""
    if wanted in ("default", "all"):
        return wanted
    names, known = wanted.split(","), {name for rivals in KINDS.values() for name in rivals}
    if unknown := [n for n in names if n not in known]:
        raise UnknownRival(f"no rival {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return ",".join(n for n in names if n in KINDS[kind]) or "eager"


SUB_BLOCK = ("eager", "eager_2d_channels_last", "compile_max_autotune", "cudnn")


def for_sub_blocks(run: Run) -> tuple[str, ...]:
    """Rivals of a conv or sub-block: all on a GPU, the eager ones on a CPU, or those that `--rivals` names."""
    if run.rivals == "all":
        return SUB_BLOCK
    if run.rivals == "default":
        return SUB_BLOCK if run.device.type == "cuda" and not run.quick else SUB_BLOCK[:2]
    return ("eager", *(name for name in SUB_BLOCK[1:] if name in run.rivals.split(",")))


def needs_compiler() -> None:
    """torch.compile on a CPU writes C++."""
    import shutil

    if not any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c):
        raise Absent("torch.compile needs a C++ compiler: apt install g++")


def _need(module: str, get: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed: {get}")


def _without_masks(config):
    import dataclasses

    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, use_conv_masks=False))


def _convs(model: nn.Module) -> Iterator[tuple[str, nn.Conv1d]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv1d))


@contextlib.contextmanager
def _no_grad_eval(model: nn.Module):
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)
