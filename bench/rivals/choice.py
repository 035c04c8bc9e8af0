"""The list of rivals, and the choice of those that a run measures."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import compiler, cuda_graphs, eager_layouts, runtimes
from jasper_fast.bench.rivals.eager_layouts import ChannelsLast2d, Model
from jasper_fast.dispatch import backends

TRAINING: dict[str, Callable[[nn.Module], Model]] = {
    "eager": eager_layouts.eager,
    "eager_no_masks": eager_layouts.eager_no_masks,
    "eager_2d_channels_last": ChannelsLast2d,
    "compile": compiler.compiled,
    "compile_reduce_overhead": lambda model: compiler.compiled(model, "reduce-overhead"),
}
INFERENCE = TRAINING | {
    "compile_blocks_frozen": compiler.compiled_blocks_frozen,
    "cuda_graph": cuda_graphs.cuda_graph,
    "onnxruntime": runtimes.onnx_runtime,
    "openvino": runtimes.openvino,
    "openvino_int8": runtimes.openvino_int8,
    "tensorrt": runtimes.tensorrt,
}
KINDS = {"inference": INFERENCE, "training": TRAINING}
# On a CPU no model is measured with torch.compile by default, because it takes minutes to compile Jasper 10x5.
DEFAULT = {
    ("inference", "cpu"): ("eager", "eager_no_masks", "eager_2d_channels_last", "onnxruntime", "openvino"),
    ("inference", "cuda"): tuple(n for n in INFERENCE if not n.startswith("openvino")),
    ("training", "cpu"): ("eager", "eager_2d_channels_last"),
    ("training", "cuda"): tuple(TRAINING),
}


class UnknownRival(ValueError):
    """`--rivals` names an unknown rival. The message lists the known ones."""


def check(wanted: str, known: Iterable[str], what: str = "") -> None:
    """Raises UnknownRival for a name in `wanted`, the value of `--rivals`, that is not in `known`. `what` says in the
    message whose rivals these are."""
    if wanted not in ("default", "all") and (unknown := [name for name in wanted.split(",") if name not in known]):
        raise UnknownRival(f"no rival {unknown[0]!r}{what}; known: {', '.join(known)}")


def choose(kind: str, device: torch.device, wanted: str) -> dict[str, Callable[[nn.Module], Model]]:
    """Returns the builders of the rivals for `kind` ("inference" or "training"), by name.

    `wanted` is "default", "all", or names separated by commas. eager is always included. Raises UnknownRival for a name
    that is no rival of this kind.
    """
    known = KINDS[kind]
    check(wanted, known, f" for {kind}")
    if wanted == "all":
        return known
    names = DEFAULT[kind, device.type] if wanted == "default" else dict.fromkeys(("eager", *wanted.split(",")))
    return {n: known[n] for n in names}


def only(kind: str, wanted: str, others: Iterable[str] = ()) -> str:
    """Returns the names in `wanted` that are rivals of `kind`, or "eager" if none is. "default" and "all" are returned
    unchanged.

    So one `--rivals` can name rivals of both kinds. It can also have the names `others`, which are not returned. Raises
    UnknownRival for any other name.
    """
    check(wanted, sorted({name for rivals in (*KINDS.values(), others) for name in rivals}))
    if wanted in ("default", "all"):
        return wanted
    return ",".join(n for n in wanted.split(",") if n in KINDS[kind]) or "eager"


CUDA_FACE = "jasper_fast_cuda"  # our ops with backend="cuda", whatever the backend of the run is
SUB_BLOCK = ("eager", "eager_2d_channels_last", "compile_max_autotune", "cudnn")
OF_KERNELS = (*SUB_BLOCK, CUDA_FACE, "compile")


def for_sub_blocks(run: Run) -> tuple[str, ...]:
    """Returns the rivals of an op that `--rivals` names. An op leaves out those that it does not have.

    eager is always included. The default is all on a GPU, and only the eager ones on a CPU or with `--quick`. Our CUDA
    kernels get rows of their own if `--rivals` names CUDA_FACE. On a GPU they also get them with "default" and "all",
    unless they are the run's backend.
    """
    everything = run.device.type == "cuda" and not run.quick
    known = {"all": SUB_BLOCK, "default": SUB_BLOCK if everything else SUB_BLOCK[:2]}
    named = ("eager", *(name for name in SUB_BLOCK[1:] if name in run.rivals.split(",")))
    by_default = run.rivals in known and run.device.type == "cuda" and run.backend != "cuda"
    face = (CUDA_FACE,) if by_default or CUDA_FACE in run.rivals.split(",") else ()
    return (*known.get(run.rivals, named), *face)


def cuda_backend(run: Run, *, convs: bool) -> str:
    """Returns "cuda", the backend of CUDA_FACE. Raises Absent if our CUDA kernels cannot run on the device, or with
    `convs` if they have no convs in the run's dtype."""
    if why := backends.why_missing("cuda", run.device):
        raise Absent(why)
    if convs and run.dtype.itemsize != 2:
        raise Absent("our CUDA kernels have convs only for fp16 and bf16; use --dtype fp16 or bf16")
    return "cuda"
