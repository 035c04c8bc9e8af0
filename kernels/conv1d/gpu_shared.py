"""Types and helpers that faces of conv1d and depthwise share on a GPU."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast.kernels import tables
from jasper_fast.kernels.operands import Geometry, Lengths


class Packed(NamedTuple):
    """A conv's weight in the order that a face's kernels read, in `data`. The other fields are its sizes."""

    data: Tensor
    c_out: int
    c_in: int
    taps: int


class Chain(NamedTuple):
    """How a launch of `fused` is connected with the previous and the next launch in its stream.

    early: this launch may begin while the previous one still runs. The caller ensures that the previous launch is of
    the same face and began after the weights of this launch were packed. ahead: up to two packed weights that the next
    launch reads; this launch fetches them into L2.
    """

    early: bool = False
    ahead: tuple[Tensor, ...] = ()


ALONE = Chain()
SOFTMAX_MAX = 128  # maximum number of symbols of a log-softmax in the epilogue


class Workspace:
    """Scratch of `fused` for shared reductions: fp32 partial sums, and counters that are zero between launches.

    Only one stream at a time may use it; its owner (an inference engine) ensures this.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.part = torch.empty(0, dtype=torch.float32, device=device)
        self.device = self.part.device  # includes the index, because the current device may change
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, elements: int, tiles: int) -> None:
        """Grows to at least `elements` partial sums and `tiles` counters."""
        if self.part.numel() < elements:
            self.part = torch.empty(elements, dtype=torch.float32, device=self.device)
        if self.arrived.numel() < tiles:
            self.arrived = torch.zeros(tiles, dtype=torch.int32, device=self.device)


def out_frames(t: int, taps: int, geometry: Geometry) -> int:
    """Returns the number of frames of the conv's result. Raises ValueError if there are none."""
    t_out = geometry.frames(t, taps)
    if t_out < 1:
        span = geometry.dilation * (taps - 1) + 1
        raise ValueError(f"{t} frames with padding {geometry.padding} are too few: the taps span {span} frames")
    return t_out


def frames_of(t: int, c_in: int, w: Packed, geometry: Geometry) -> int:
    """Returns `out_frames` for the taps of `w`. Also raises ValueError if `w` does not take `c_in` channels."""
    if c_in != w.c_in:
        raise ValueError(f"x has {c_in} channels, the weight takes {w.c_in}")
    return out_frames(t, w.taps, geometry)


def dgrad_padding(face: str, dy: Tensor, w: Packed, t: int, geometry: Geometry) -> int:
    """Returns the padding of the conv of `dy` (N, C_out, T') that computes the gradient of x (N, C_in, T = `t`).

    Raises ValueError for a stride above 1, and if channels or frames of `dy` do not fit.
    """
    stride, padding, dilation = geometry
    if stride != 1:
        raise ValueError(f"the {face} face's dgrad takes stride 1, got {stride}: use backend='reference' for this conv")
    reach = dilation * (w.taps - 1)
    if dy.shape[1:] != (w.c_out, t + 2 * padding - reach):
        raise ValueError(
            f"dy {tuple(dy.shape)} must have {w.c_out} channels and {t + 2 * padding - reach} frames, "
            f"like the conv's output for {t} frames"
        )
    return reach - padding


def check_operands(face: str, dtypes: Collection[torch.dtype], x: Tensor, other: Tensor) -> None:
    """Raises TypeError unless `x` and `other` have one dtype, one of `dtypes`, and ValueError if `x` is empty."""
    if x.dtype not in dtypes or x.dtype != other.dtype:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"the {face} face takes all operands of a conv in one dtype of {names}, got {x.dtype} and {other.dtype}"
        )
    if x.numel() == 0:
        raise ValueError(f"an operand has no elements: shape {tuple(x.shape)}")


def packed_weight(weight: Tensor, data: Tensor, shape: tuple[int, ...]) -> Packed:
    """Returns `data` as the pack of `weight`. Raises ValueError unless `data` has the `shape` of that pack."""
    if data.shape != shape:
        raise ValueError(f"packed has shape {tuple(data.shape)}, the weight packs to {shape}")
    return Packed(data, *weight.shape)


def pack_buffer(
    face: str,
    dtypes: Collection[torch.dtype],
    weight: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the contiguous `weight` and the buffer for its pack: `out`, or a new one in `dtype`.

    A new buffer has by default the dtype of the weight. Raises ValueError if `out` does not fit, and TypeError for a
    weight that is not fp32, fp16 or bf16, and for a buffer in none of `dtypes`.
    """
    w = weight.detach().contiguous()
    if out is None:
        out = torch.empty(shape, dtype=dtype or w.dtype, device=w.device)
    if out.shape != shape or out.dtype != (dtype or out.dtype) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {shape} {dtype or out.dtype}, "
            f"got {tuple(out.shape)} {out.dtype}, strides {out.stride()}"
        )
    if w.dtype not in tables.DTYPES or out.dtype not in dtypes:
        raise TypeError(
            f"the {face} face packs fp32, fp16 or bf16 into one of {list(dtypes)}, got {w.dtype} into {out.dtype}"
        )
    return w, out


def fused_out(
    x: Tensor,
    w: Packed,
    geometry: Geometry,
    lengths: Lengths,
    panes: tuple[Tensor, Packed] | None,
    out: Tensor | None,
    log_softmax: bool,
    masked: bool,
    workspace: Workspace | None,
) -> Tensor:
    """Returns the tensor (N, T', C_out) for the result of `fused`: `out`, or a new one if it is None.

    If output lengths mask the result, `out` may have more rows than the conv produces. Raises ValueError if the
    operands do not fit.
    """
    n, t, c_in = x.shape
    t_out = frames_of(t, c_in, w, geometry)
    check_made(lengths)
    if out is not None and masked and (lengths.made is not None or lengths.after is not None):
        t_out = max(t_out, out.shape[1])
    if log_softmax and w.c_out > SOFTMAX_MAX:
        raise ValueError(f"log-softmax in the kernel takes up to {SOFTMAX_MAX} channels, got {w.c_out}")
    x2, w2 = panes or (None, None)
    if x2 is not None and (x2.shape != (n, t_out, w2.c_in) or w2.taps != 1 or w2.c_out != w.c_out):
        raise ValueError(f"x2 {tuple(x2.shape)} and its weight do not fit an output of {(n, t_out, w.c_out)}")
    shape, dtype = (n, t_out, w.c_out), torch.float32 if log_softmax else w.data.dtype
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.device)
    if workspace is not None and workspace.device != x.device:
        raise ValueError(f"the workspace is on {workspace.device}, x on {x.device}: make one for each device")
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, the conv gives {shape} {dtype}")
    return out


def check_made(lengths: Lengths) -> None:
    """Raises ValueError for `lengths.made` without `lengths.before` or with `lengths.after`."""
    if lengths.made is not None and (lengths.before is None or lengths.after is not None):
        raise ValueError("lengths.made needs lengths.before and replaces lengths.after: leave the latter out")


def check_sub_block(y: Tensor, z: Tensor, like: Tensor) -> None:
    """Raises ValueError unless `y` and `z` have the shape, the dtype and the dense NTC memory of `like` (N, C, T)."""
    for v in y, z:
        if v.shape != like.shape or v.dtype != like.dtype or not v.transpose(1, 2).is_contiguous():
            raise ValueError(
                f"y and z must be {tuple(like.shape)} {like.dtype}, dense in NTC memory, "
                f"got {tuple(v.shape)} {v.dtype}, strides {v.stride()}"
            )


def check_offsets(*tensors: Tensor) -> None:
    """Raises ValueError if an utterance of a tensor (N, T, C) spans 2^31 elements or more.

    The Triton kernels count offsets within an utterance in 32 bits.
    """
    for x in tensors:
        if sum((s - 1) * d for s, d in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 1 << 31:
            raise ValueError(
                f"one utterance of shape {tuple(x.shape[1:])}, strides {x.stride()[1:]} exceeds 32-bit offsets: "
                "cut it into shorter ones"
            )


def sizes(*tensors: Tensor) -> tuple[int, ...]:
    """Returns VEC, then for each tensor (N, T, C) its channels and its strides of T and N, in units of VEC.

    VEC is the largest of 8, 4 and 1 that divides all of these sizes.
    """
    found = []
    for x in tensors:
        (n, t, c), (item, row, one) = x.shape, x.stride()
        if one != 1 and c > 1:
            raise ValueError(f"activations need unit stride over channels, got strides {x.stride()} for (N, T, C)")
        # the stride of a dimension of size 1 is never used: take one that is aligned
        found.append((c, row if t > 1 else c, item if n > 1 else t * c))
    vec = next(v for v in (8, 4, 1) if not any(s % v for of in found for s in of))
    return vec, *(tuple(s // vec for s in of) for of in found)
