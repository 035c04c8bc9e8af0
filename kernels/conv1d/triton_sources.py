"""The Triton convs as their launches compile them, for compilation without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from jasper_fast.kernels import aot
from jasper_fast.kernels.conv1d import triton_tiles
from jasper_fast.kernels.conv1d.triton_dgrad import conv1d_dgrad_kernel, conv1d_sums_merge_kernel
from jasper_fast.kernels.conv1d.triton_forward import conv1d_forward_kernel, conv1d_stats_merge_kernel
from jasper_fast.kernels.conv1d.triton_fused import conv1d_fused_kernel
from jasper_fast.kernels.conv1d.triton_pack import PAD_OUT, conv1d_pack_kernel
from jasper_fast.kernels.conv1d.triton_tiles import MERGE_C, MERGE_G, Shape, Tile
from jasper_fast.kernels.conv1d.triton_wgrad import conv1d_wgrad_kernel, conv1d_wgrad_merge_kernel

EXACT = " ieee"  # ends the names of kernels with exact fp32 products
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_ACTIVATIONS = ("x_ptr", "w_ptr", "x2_ptr", "w2_ptr", "y_ptr", "z_ptr", "dy_ptr", "g_ptr", "pack_ptr")
_INT64 = ("lengths_ptr", "in_lengths_ptr", "out_lengths_ptr", "lengths_out_ptr", "seed_ptr")
_NORM = ("y_ptr", "z_ptr", "mean_ptr", "rstd_ptr", "part_g_ptr", "part_gy_ptr")
# which arguments a launch leaves out (None) where a flag is off
_OPTIONAL = {
    "HAS_LENGTHS": ("lengths_ptr",),
    "HAS_STATS": ("part_mean_ptr", "part_m2_ptr"),
    "HAS_NORM": _NORM,
    "HAS_IN_LENGTHS": ("in_lengths_ptr",),
    "HAS_OUT_LENGTHS": ("out_lengths_ptr",),
    "HAS_LENGTHS_OUT": ("lengths_out_ptr",),
    "HAS_PANES": ("x2_ptr", "w2_ptr", "x2_desc", "w2_desc"),
    "HAS_BIAS": ("bias_ptr",),
    "HAS_SPLITS": ("part_ptr", "arrived_ptr"),
    "HAS_DESCRIPTORS": ("x_desc", "w_desc", "x2_desc", "w2_desc", "dy_desc"),
    "HAS_MASK": (), "HAS_RELU": (), "HAS_LOG_SOFTMAX": (), "IS_NCT": (), "IS_CLEAN": (),
}  # fmt: skip


def sources(
    dtype: torch.dtype,
    c_in: int,
    c_out: int,
    t_out: int,
    *,
    taps: int = 25,
    stride: int = 1,
    descriptors: bool = False,
    masks: bool = True,
    exact: bool = False,
    tiles: dict[str, Tile] | None = None,
) -> Iterator[aot.Source]:
    """The kernels of one layer's shape in every combination of flags that training and inference launch.

    descriptors: as sm_90 and later launch them; masks: of a model with conv masks; exact: fp32 products as they are,
    not rounded to TF32; tiles: by op ("forward", "dgrad", "wgrad", "fused"), where they are not to be the default ones.
    """
    descriptors = descriptors and dtype.itemsize == 2
    shape = Shape(c_in, c_out, taps, stride, 1, 32 * t_out)
    tile = {op: (tiles or {}).get(op) or triton_tiles.default(op, dtype, shape, t_out, exact) for op in _KERNELS}
    vec_in, vec_out = _vec(c_in), _vec(c_out)
    told = ("" if masks else " no masks") + (EXACT if exact else "")

    def conv(name: str, op: str, *flags: str, **more: object) -> aot.Source:
        flags = (*flags, *(_MASKS[op] if masks else ()))
        return _source(name + told, _KERNELS[op], dtype, tile[op], descriptors, flags, exact, **more)

    ends = {"VEC_IN": vec_in, "VEC_OUT": vec_out, "PAD": PAD_OUT, "STRIDE": stride}
    yield conv("forward", "forward", **ends)
    yield conv("forward stats", "forward", "HAS_STATS", **ends)
    back = {"VEC_DY": vec_out, "VEC": vec_in, "PAD": PAD_OUT}
    if stride == 1:
        yield conv("dgrad", "dgrad", **back)
        yield conv("dgrad bn", "dgrad", "HAS_NORM", **back)
    yield conv("wgrad", "wgrad", VEC_IN=vec_in, VEC_OUT=vec_out, STRIDE=stride)
    folded = ("HAS_BIAS", "HAS_RELU")
    for width in [tile["fused"]] if tiles else triton_tiles.narrower(tile["fused"], dtype):
        tile["fused"] = width
        for name, splits in (("", ()), (" split", ("HAS_SPLITS",))):
            yield conv(f"fused{name}", "fused", *folded, *splits, **ends, VEC_2=1)
            yield conv(f"fused panes{name}", "fused", *folded, "HAS_PANES", *splits, **ends, VEC_2=8)
    if not masks:
        return
    merge, meta = Tile(0, 0, 0, 4, 3), triton_tiles.transpose_meta(taps)
    t = {"BLOCK_T": tile["forward"].t, "BLOCK_G": MERGE_G, "BLOCK_C": MERGE_C}
    yield _source("stats merge", conv1d_stats_merge_kernel, dtype, merge, False, (), **t)
    yield _source("sums merge", conv1d_sums_merge_kernel, dtype, merge, False, (), BLOCK_G=MERGE_G, BLOCK_C=MERGE_C)
    yield _source("wgrad merge", conv1d_wgrad_merge_kernel, dtype, merge, False, (), dw_ptr="*fp32", **meta)
    yield _source("pack", conv1d_pack_kernel, dtype, merge, False, (), weight_ptr="*fp32", PAD=PAD_OUT, **meta)


def first_and_last(
    dtype: torch.dtype,
    c_first: int,
    c_last: int,
    symbols: int,
    t_out: int,
    *,
    descriptors: bool = False,
    masks: bool = True,
    exact: bool = False,
) -> Iterator[aot.Source]:
    """The network's first conv, over (N, C, T) fp32 features, to `c_first` channels, and its last, over `c_last`
    channels, with log-softmax of `symbols`; the options are those of `sources`."""
    descriptors = descriptors and dtype.itemsize == 2
    tile = triton_tiles.default("fused", dtype, Shape(64, c_first, 11, 2, 1, 32 * t_out), t_out, exact)
    flags = ("HAS_IN_LENGTHS", "HAS_LENGTHS_OUT", "HAS_BIAS", "HAS_RELU", "IS_NCT")
    told, flags = ("", (*flags, "HAS_MASK")) if masks else (" no masks", flags)
    end = EXACT if exact else ""
    ends = {"VEC_IN": 1, "VEC_OUT": _vec(c_first), "VEC_2": 1, "PAD": PAD_OUT, "STRIDE": 2}
    features = {"x_ptr": "*fp32", "x_desc": None}
    for width in triton_tiles.narrower(tile, dtype):
        name = f"first{told}{end}"
        yield _source(name, conv1d_fused_kernel, dtype, width, descriptors, flags, exact, **features, **ends)
    if not masks:  # the last conv masks nothing anyway
        return
    tile = triton_tiles.default("fused", dtype, Shape(c_last, symbols, 1, 1, 1, 32 * t_out), t_out, exact)
    tile = tile._replace(n=max(16, triton.next_power_of_2(symbols)))
    flags = ("HAS_IN_LENGTHS", "HAS_LENGTHS_OUT", "HAS_BIAS", "HAS_LOG_SOFTMAX")
    ends = {"VEC_IN": _vec(c_last), "VEC_OUT": _vec(symbols), "VEC_2": 1, "PAD": PAD_OUT, "STRIDE": 1}
    for name, splits in (("last", ()), ("last split", ("HAS_SPLITS",))):
        last = (*flags, *splits)
        yield _source(name + end, conv1d_fused_kernel, dtype, tile, descriptors, last, exact, z_ptr="*fp32", **ends)


# what a model with conv masks adds to the flags of a launch
_MASKS = dict.fromkeys(("forward", "dgrad", "wgrad"), ("HAS_LENGTHS",))
_MASKS["fused"] = ("HAS_IN_LENGTHS", "HAS_OUT_LENGTHS", "HAS_MASK")
_KERNELS = {
    "forward": conv1d_forward_kernel,
    "dgrad": conv1d_dgrad_kernel,
    "wgrad": conv1d_wgrad_kernel,
    "fused": conv1d_fused_kernel,
}


def _source(
    name: str,
    kernel: triton.JITFunction,
    dtype: torch.dtype,
    tile: Tile,
    descriptors: bool,
    flags: tuple[str, ...],
    exact: bool = False,
    **given: object,
) -> aot.Source:
    """`given`: values of constexprs, and types ("*fp32") of arguments that differ from the dtype's."""
    names, kind = kernel.arg_names, _TYPES[dtype]
    on = {flag: flag in flags for flag in _OPTIONAL if flag in names}
    if "HAS_DESCRIPTORS" in on:
        on["HAS_DESCRIPTORS"] = descriptors
    if "IS_CLEAN" in on:  # as the ops and the engine say of all but features
        on["IS_CLEAN"] = descriptors and not on.get("IS_NCT")
    types = {a: "*fp32" if a.endswith("_ptr") else "i32" for a in names if a.islower() or a == "C"}
    types |= dict.fromkeys(_ACTIVATIONS, f"*{kind}") | dict.fromkeys(_INT64, "*i64")
    types |= {"arrived_ptr": "*i32", "scale": "fp32"} | _descriptors(kernel, kind, tile)
    types |= {a: t for a, t in given.items() if a.endswith("_ptr")}
    absent = {a: None for flag, arguments in _OPTIONAL.items() if not on.get(flag, True) for a in arguments}
    if kernel is not conv1d_dgrad_kernel:  # there y_ptr belongs to the batch norm; elsewhere it is the output
        absent.pop("y_ptr", None)
    constants = {"UPCAST": False, "PRECISION": "tf32" if dtype == torch.float32 and not exact else "ieee"}
    if kernel is conv1d_wgrad_kernel:
        constants |= {"BLOCK_T": tile.t, "BLOCK_I": tile.n, "BLOCK_O": tile.k}
    else:
        constants |= {"BLOCK_T": tile.t, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    constants |= on | absent | {a: v for a, v in given.items() if not a.endswith("_ptr")}
    return aot.Source(
        name, kernel,
        {a: t for a, t in types.items() if a in names and a not in constants},
        {a: v for a, v in constants.items() if a in names},
        tile.num_warps, tile.num_stages,
    )  # fmt: skip


def _descriptors(kernel: triton.JITFunction, kind: str, tile: Tile) -> dict[str, str]:
    """Types of the tensor descriptors: blocks of frames by channels, and of a pack's rows by its columns."""
    frames = lambda channels: f"tensordesc<{kind}[1, {tile.t}, {channels}]>"  # noqa: E731
    if kernel is conv1d_wgrad_kernel:
        return {"x_desc": frames(tile.n), "dy_desc": frames(tile.k)}
    rows, columns = (tile.n, tile.k) if kernel is conv1d_dgrad_kernel else (tile.k, tile.n)
    weights = f"tensordesc<{kind}[{rows}, {columns}]>"
    inputs = dict.fromkeys(("x_desc", "x2_desc", "dy_desc"), frames(tile.k))
    return inputs | dict.fromkeys(("w_desc", "w2_desc"), weights)


def _vec(c: int) -> int:
    return next(v for v in (8, 4, 1) if c % v == 0)
