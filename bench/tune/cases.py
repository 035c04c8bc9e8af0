"""The cases of `python -m bench tune`: the distinct layers of the network, sorted by their share of its work."""

import functools
from typing import NamedTuple

import torch

from jasper_fast.bench.cases import bn_relu_dropout, common, counts, models
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.tune.builders import (
    Held,
    Trial,
    TunedContender,
    builder,
    library_builder,
    tile_builder,
    with_tile,
)
from jasper_fast.dispatch import backends
from jasper_fast.kernels import tables
from jasper_fast.selfcheck import checks

CONV_OPS = ("forward", "forward_stats", "dgrad", "dgrad_bn", "wgrad", "fused")
OPS = (*CONV_OPS, *tables.NORM_OPS)
# the calls of bn_relu_dropout in a training step, by functions of the checks: statistics and forward; reduce and apply
NORM_FUNCTIONS = dict(zip(tables.NORM_OPS, ("stats_forward", "backward"), strict=True))
# N and T' (16.7 s are 840 frames after the first layer, 2 s are 104): the training batches, and inference at N = 1
TRAINING = ((32, 840), (16, 840), (8, 840))
INFERENCE = ((1, 104), (1, 840), (1, 352), (4, 840), (16, 840))
STAND_IN = ((2, 14),)
LIBRARY = "aten"  # cuDNN on a GPU


class Layer(NamedTuple):
    """A distinct conv of the network, or a width of its norms. `share`: the share of all its copies in the network's
    arithmetic, or for norms in the bytes of a training step."""

    c_in: int
    c_out: int
    taps: int
    stride: int
    dilation: int
    kind: str
    share: float


def layers(device: torch.device) -> list[Layer]:
    """The distinct convs of Jasper 10x5, sorted by their share of its arithmetic; for the stand-in two tiny ones."""
    if device.type == "cpu":
        return [Layer(16, 24, 3, 1, 1, "main", 0.8), Layer(24, 12, 1, 1, 1, "decoder", 0.2)]
    cfg = models.config("jasper10x5")
    flops: dict[tuple, float] = {}
    kinds: dict[tuple, str] = {}
    total = 0.0
    for conv in counts.convs(cfg, 1, 840):
        stride = dilation = 1
        kind = "decoder"
        if conv.name.startswith("encoder"):
            block = cfg.encoder.blocks[int(conv.name.split(".")[2])]
            kind = "pane" if ".res." in conv.name else "main" if block.s == 1 else "prologue"
            if kind != "pane":
                stride, dilation = block.s, block.d
        key = (conv.C_in, conv.C_out, conv.K, stride, dilation)
        flops[key] = flops.get(key, 0.0) + conv.flops
        kinds[key] = kinds.get(key, kind) if kinds.get(key) != "pane" else kind  # a main conv can have a pane's shape
        total += conv.flops
    return [Layer(*key, kinds[key], flops[key] / total) for key in sorted(flops, key=lambda k: -flops[k])]


def norms(device: torch.device) -> list[Layer]:
    """The widths of Jasper 10x5's bn_relu_dropout by their share of the bytes that a training step moves.

    Norms are limited by memory, so their work is counted in bytes (for convs it is arithmetic). Forward and backward
    share one value, because dispatch needs the rows of both.
    """
    if device.type == "cpu":
        return [Layer(24, 24, 1, 1, 1, "norm", 0.1)]
    cfg, size = models.config("jasper10x5"), 2
    n, frames = TRAINING[0]
    frames *= 2  # the first layer halves them
    moved: dict[int, int] = {}
    for conv in counts.convs(cfg, n, frames):
        if conv.batch_norm and ".res." not in conv.name:  # the norm of a pane belongs to another op
            nbytes = counts.bn_relu_dropout_bytes(n, conv.C_out, conv.T_out, size, "both")
            moved[conv.C_out] = moved.get(conv.C_out, 0) + nbytes
    total = counts.training_bytes(cfg, n, frames, size)
    return [Layer(c, c, 1, 1, 1, "norm", moved[c] / total) for c in sorted(moved, key=lambda c: -moved[c])]


def plan(device: torch.device, ops: tuple[str, ...]) -> list[tuple[str, Layer, tuple[int, int]]]:
    """(op, layer, (N, T')), the most valuable first. The value is the layer's share of the work; each further batch
    counts half as much as the one before."""
    found = []
    for layer in layers(device) + norms(device):
        for op in ops:
            if op not in used(layer.kind):
                continue
            batches = STAND_IN if device.type == "cpu" else INFERENCE if op == "fused" else TRAINING
            found += [(layer.share * 0.5**rank, op, layer, batch) for rank, batch in enumerate(batches)]
    return [(op, layer, batch) for _, op, layer, batch in sorted(found, key=lambda item: -item[0])]


def used(kind: str) -> tuple[str, ...]:
    """The ops that a layer of this kind is called with."""
    return {
        "main": CONV_OPS,
        "prologue": ("forward", "forward_stats", "wgrad", "fused"),  # the features need no gradient
        "decoder": ("forward", "dgrad", "wgrad", "fused"),
        "pane": ("forward", "dgrad", "wgrad"),  # at inference they are part of the conv to which they are added
        "norm": tables.NORM_OPS,  # at inference they are part of the conv before them
    }[kind]


def make_case(run: Run, op: str, layer: Layer, batch: tuple[int, int], trial: Trial) -> Case:
    """One op of one layer at one batch, and its contenders."""
    n, frames = batch
    size, dtype = run.dtype.itemsize, tables.DTYPES[run.dtype]
    if layer.kind == "norm":
        # with lengths, dropout and the halo of a conv, as in the blocks of a Jasper
        shape, variant = checks.Norm(n, layer.c_in, frames), "halo"
        check = checks.Check("bn_relu_dropout", "triton", NORM_FUNCTIONS[op], "candidate", shape, dtype, variant)
        mode = op.removeprefix("bn_relu_dropout.")
        flops = counts.bn_relu_dropout_flops(*shape, mode)
        nbytes = counts.bn_relu_dropout_bytes(*shape, size, mode)
        name, contenders_of, rows = op, faces, n * frames
    else:
        shape = checks.Conv(n, frames * layer.stride, layer.c_in, layer.c_out, layer.taps, layer.stride, layer.dilation)
        variant = ""
        if op == "fused":
            variant = "log-softmax" if layer.kind == "decoder" else "splits"
        family = "conv1d.fused" if op == "fused" else "conv1d"
        check = checks.Check(family, "triton", op, "candidate", shape, dtype, variant)
        conv = counts.Conv("", n, layer.c_in, layer.c_out, layer.taps, shape.t, shape.t_out)
        flops, nbytes = conv.flops, conv.nbytes(size)
        name, contenders_of, rows = f"conv1d.{op}", tiles, n * shape.t_out
    held = Held(check, run.device)
    row = {"op": name, "dtype": dtype, **{k: getattr(layer, k) for k in tables.SHAPE}, "rows_log2": tables.bucket(rows)}
    contenders = contenders_of(run, held, row, trial)
    return Case(
        "tune",
        {"op": op, "shape": str(shape), "dtype": dtype},
        contenders,
        refill=held.refill,
        reference=lambda: held.case.reference(),
        low=lambda: held.case.low(),
        tolerance=bn_relu_dropout.TOLERANCE if layer.kind == "norm" else common.tolerance(run),
        ours=contenders[0].name,
        flops=flops,
        nbytes=nbytes,
    )


def tiles(run: Run, held: Held, row: dict, trial: Trial) -> list[TunedContender]:
    """The contenders of a conv: the candidate tiles and ATen."""
    from jasper_fast.kernels.conv1d import triton_tiles

    shape, op = held.check.shape, held.check.function
    wanted = triton_tiles.Shape(*(row[k] for k in tables.SHAPE), shape.n * shape.t_out)
    proposed = triton_tiles.candidates(op, run.dtype, wanted, shape.t_out)
    made = []
    for candidate in proposed[:2] if run.device.type == "cpu" else proposed:
        tile = candidate._asdict()
        of_tile = row | {"face": "triton", "algorithm": "direct", "tile": tile}
        name = tables.Row(**of_tile, time_s=1.0).label()
        call = functools.partial(with_tile, held, tile)
        made.append(TunedContender(name, tile_builder(run, held, tile, call, name, trial), of_tile, call, held))
    library = row | {"face": LIBRARY, "algorithm": "library", "tile": None}
    return [*made, TunedContender(LIBRARY, library_builder(run, held), library)]


def faces(run: Run, held: Held, row: dict, trial: Trial) -> list[TunedContender]:
    """The contenders of bn_relu_dropout: its faces, the CUDA one where it runs."""
    made = []
    for face in ("triton", "cuda", "reference"):
        if backends.why_missing(face, run.device.type) is None:
            algorithm = "library" if face == "reference" else "direct"
            call = functools.partial(held.call, face)
            of_face = row | {"face": face, "algorithm": algorithm, "tile": None}
            made.append(TunedContender(face, builder(run, held, call, face, trial), of_face, call, held))
    return made
