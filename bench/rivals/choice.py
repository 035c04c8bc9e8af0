"""The list of rivals, and the choice of those that a run measures."""

from collections.abc import Callable

import torch
from torch import nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import compiler, cuda_graphs, eager_layouts, runtimes
from jasper_fast.bench.rivals.eager_layouts import ChannelsLast2d, Model
from jasper_fast.dispatch import backends

INFERENCE: dict[str, Callable[[nn.Module], Model]] = {
    "eager": eager_layouts.eager,
    "eager_no_masks": eager_layouts.eager_no_masks,
    "eager_2d_channels_last": ChannelsLast2d,
    "compile": compiler.compiled("default"),
    "compile_reduce_overhead": compiler.compiled("reduce-overhead"),
    "compile_blocks_frozen": compiler.compiled_blocks_frozen,
    "cuda_graph": cuda_graphs.cuda_graph,
    "onnxruntime": runtimes.onnx_runtime,
    "openvino": runtimes.openvino,
    "openvino_int8": runtimes.openvino_int8,
    "tensorrt": runtimes.tensorrt,
}
TRAINING: dict[str, Callable[[nn.Module], Model]] = {
    "eager": eager_layouts.eager,
    "eager_no_masks": eager_layouts.eager_no_masks,
    "eager_2d_channels_last": ChannelsLast2d,
    "compile": compiler.compiled("default"),
    "compile_reduce_overhead": compiler.compiled("reduce-overhead"),
}
KINDS = {"inference": INFERENCE, "training": TRAINING}
# On a CPU torch.compile is not measured by default, because it takes minutes to compile a model of 54 layers.
DEFAULT = {
    ("inference", "cpu"): ("eager", "eager_no_masks", "eager_2d_channels_last", "onnxruntime", "openvino"),
    ("inference", "cuda"): tuple(n for n in INFERENCE if not n.startswith("openvino")),
    ("training", "cpu"): ("eager", "eager_2d_channels_last"),
    ("training", "cuda"): tuple(TRAINING),
}


class UnknownRival(ValueError):
    """`--rivals` names an unknown rival. The message lists the known ones."""


def choose(kind: str, device: torch.device, wanted: str) -> dict[str, Callable[[nn.Module], Model]]:
    """Returns the builders of the rivals for `kind` ("inference" or "training"), by name.

    `wanted` is "default", "all", or names separated by commas. eager is always included. Raises UnknownRival.
    """
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
    """Returns `wanted` without the names that only the other kind has, so that one option can name rivals of both.

    Raises UnknownRival for a name that neither kind has.
    """
    if wanted in ("default", "all"):
        return wanted
    names, known = wanted.split(","), {name for rivals in KINDS.values() for name in rivals}
    if unknown := [n for n in names if n not in known]:
        raise UnknownRival(f"no rival {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return ",".join(n for n in names if n in KINDS[kind]) or "eager"


CUDA_FACE = "jasper_fast_cuda"  # our own ops with backend="cuda", whatever the run's own backend is
SUB_BLOCK = ("eager", "eager_2d_channels_last", "compile_max_autotune", "cudnn")


def for_sub_blocks(run: Run) -> tuple[str, ...]:
    """Returns the rivals of a conv or sub-block: those that `--rivals` names.

    The default is all on a GPU, and only the eager ones on a CPU or with `--quick`. Our CUDA kernels are added if
    `cuda_face` chooses them.
    """
    if run.rivals == "all":
        return (*SUB_BLOCK, *cuda_face(run))
    if run.rivals == "default":
        return (*(SUB_BLOCK if run.device.type == "cuda" and not run.quick else SUB_BLOCK[:2]), *cuda_face(run))
    return ("eager", *(name for name in SUB_BLOCK[1:] if name in run.rivals.split(",")), *cuda_face(run))


def cuda_face(run: Run) -> tuple[str, ...]:
    """Returns (CUDA_FACE,) if our CUDA kernels are measured too, and otherwise ().

    The CUDA kernels are measured if `--rivals` names them, and by default on a GPU, unless they are the run's own
    backend.
    """
    wanted = run.rivals.split(",")
    unasked = run.rivals in ("default", "all") and run.device.type == "cuda" and run.backend != "cuda"
    return (CUDA_FACE,) if unasked or CUDA_FACE in wanted else ()


def needs_cuda_face(run: Run, *, convs: bool) -> None:
    """Raises Absent if our CUDA kernels cannot run on the device, or with `convs` if they lack convs in the run's
    dtype."""
    if why := backends.why_missing("cuda", run.device):
        raise Absent(why)
    if convs and run.dtype.itemsize != 2:
        raise Absent("the convs of our CUDA kernels take fp16 and bf16; use --dtype fp16 or bf16")
