"""Cases for the instructions in csrc/cuda/probe.cuh, and the results that the PTX ISA defines for them.

`run` launches one case, on a device or on the host emulation of the instructions (the "host twins"). The other
functions make operands and expected results.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LDMATRIX, MMA8, MMA16, COPY_ASYNC, BARRIERS, SHUFFLE, COUNTERS, COPY_BULK, WGMMA = range(9)
PRODUCTS = 4  # how many times the kernel issues the same wgmma; each adds its product to the accumulators
INSTANCES = [  # n, a_mn, b_mn, dtype
    (64, 0, 0, torch.float16),
    (64, 0, 1, torch.float16),
    (64, 1, 0, torch.float16),
    (64, 1, 1, torch.float16),
    (64, 0, 0, torch.bfloat16),
    (64, 1, 1, torch.bfloat16),
    (104, 0, 0, torch.float16),
    (176, 1, 1, torch.float16),
    (216, 0, 0, torch.bfloat16),
    (216, 0, 0, torch.float16),
]


class Case(ctypes.Structure):
    """The struct Case of csrc/cuda/probe.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("image", "in_", "out", "clocks", "counters")),
        *((name, ctypes.c_uint64) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("grid", "cells", "option", "n", "a_mn", "b_mn", "half")),
    ]


class Result(NamedTuple):
    out: Tensor
    clocks: Tensor


def run(
    call: Callable,
    op: int,
    registers: tuple[int, ...],
    image=None,
    before=None,
    rows=None,
    device="cpu",
    stream=None,
    **numbers,
) -> Result:
    """Runs the instruction `op` on `image`, uint8 (grid, bytes). `registers` is the shape of the result's `out`. Raises
    RuntimeError if the launch fails."""
    grid = registers[0]
    image = torch.zeros(grid, 16, dtype=torch.uint8) if image is None else image
    keep = [image.contiguous().to(device), None if before is None else before.float().contiguous().to(device)]
    out = torch.full(registers, float("nan"), device=device)
    clocks = torch.zeros(grid, dtype=torch.int64, device=device)
    counters = (torch.zeros(32, dtype=torch.int32) if rows is None else rows.int()).contiguous().to(device)
    pointers = [None if x is None else x.data_ptr() for x in (*keep, out, clocks, counters)]
    case = Case(*pointers, grid=grid, cells=image.shape[1] // 16, **numbers)
    call.restype = ctypes.c_char_p
    if error := call(op, ctypes.byref(case), ctypes.c_void_p(stream)):
        raise RuntimeError(error.decode())
    return Result(out.cpu(), clocks.cpu())


# ---- wgmma ---------------------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """Where an operand lies in shared memory. Without a swizzle, element [i][k] (i along M or N) is in the core matrix
    that begins at start + i // 8 * sbo + k // 8 * lbo."""

    start: int
    lbo: int
    sbo: int
    mn: int
    swizzle: bool = False  # of 128 bytes; K-major only
    base: int = 0  # the base offset

    @property
    def descriptor(self) -> int:
        offsets = self.start >> 4 | (self.lbo >> 4) << 16 | (self.sbo >> 4) << 32
        return offsets | self.base << 49 | int(self.swizzle) << 62

    def addresses(self, rows: int, anchor: int = 0) -> Tensor:
        """Returns the byte address of each element (rows, 16). Swizzling uses the bits of the address minus
        `anchor`."""
        i, k = torch.arange(rows)[:, None], torch.arange(16)[None, :]
        if self.swizzle:  # Rows of 128 bytes, in groups of eight. A row's number decides where its 16-byte cells go.
            at = self.start + i // 8 * self.sbo + i % 8 * 128 + k * 2 - anchor
            return (at ^ (at >> 7 & 7) << 4) + anchor
        inside = (k % 8 * 16 + i % 8 * 2) if self.mn else (i % 8 * 16 + k % 8 * 2)
        return self.start + i // 8 * self.sbo + k // 8 * self.lbo + inside


def fragment(n: int) -> tuple[Tensor, Tensor]:
    """Returns two tensors (128, n / 2): the row and the column in D of the element that each register of each
    thread holds."""
    thread, register = torch.arange(128)[:, None], torch.arange(n // 2)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + register % 4 // 2 * 8
    return row, register // 4 * 8 + thread % 4 * 2 + register % 2


def put(image: Tensor, at: Tensor, values: Tensor) -> None:
    """Writes 16-bit `values` (grid, ...) at the byte addresses `at` (...) of `image` (grid, bytes)."""
    image.view(torch.int16)[:, (at // 2).flatten()] = values.contiguous().view(torch.int16).flatten(1)


def get(image: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    return image.view(dtype)[:, (at // 2).flatten()].unflatten(1, at.shape)


def wgmma(
    call: Callable, image: Tensor, a: Placed, b: Placed, n: int, dtype: torch.dtype, before=None, **where
) -> Result:
    """Multiplies operand `a` by operand `b`, both in `image`, with wgmma, and adds the product PRODUCTS times to
    `before` (None means zero). `out` is the result, (grid, 64, n), gathered from the registers of all threads."""
    row, column = fragment(n)
    registers = None if before is None else before[:, row, column]
    numbers = {
        "a": a.descriptor, "b": b.descriptor, "n": n, "a_mn": a.mn, "b_mn": b.mn, "half": dtype == torch.float16,
        "option": int(before is None),
    }  # fmt: skip
    result = run(call, WGMMA, (len(image), 128, n // 2), image, registers, **numbers, **where)
    whole = torch.full((len(image), 64, n), float("nan"))
    whole[:, row, column] = result.out
    return Result(whole, result.clocks)


def wgmma_expected(image: Tensor, a: Placed, b: Placed, n: int, dtype: torch.dtype, anchor: int = 0) -> Tensor:
    left, right = get(image, a.addresses(64), dtype), get(image, b.addresses(n, anchor), dtype)
    return (PRODUCTS * left.double() @ right.double().transpose(1, 2)).float()


A = Placed(0, 1024, 128, 0)  # the left operand to use with `row_shifts` and `overlaps`
PANELS = 2048  # where the panels of the right operand begin
BYTES = PANELS + 64 * 272


def integers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


def panels() -> Tensor:
    """Returns (1, BYTES) filled with small fp16 integers, so that an operand may begin anywhere."""
    return integers(1, BYTES // 2).view(torch.uint8)


def row_shifts(panel: int) -> Iterator[tuple[int, int, Placed]]:
    """Yields (major, shift, b). `b` is a 64 x 16 operand that begins `shift` rows, 0 to 63, into panels of `panel` rows
    of 8 channels."""
    for shift in range(64):
        yield 0, shift, Placed(PANELS + 16 * shift, 16 * panel, 128, 0)  # frames along N, panels along K
        yield 1, shift, Placed(PANELS + 16 * shift, 128, 16 * panel, 1)  # frames along K, panels along N


def overlaps() -> Iterator[tuple[int, Placed]]:
    """Yields (step, b). The core matrices of `b` begin `step` bytes apart and overlap, because each takes 128 bytes."""
    for step in range(16, 128, 16):
        yield step, Placed(PANELS, 128, step, 1)


# ---- the checks that a device and the host twins share --------------------------------------------------------------


def check_wgmma(call: Callable, instance: tuple, **where) -> None:
    """Checks wgmma with random operands in two orders of core matrices, with and without an accumulator."""
    n, a_mn, b_mn, dtype = instance
    for a, b in (
        (Placed(16, 1024, 128, a_mn), Placed(4096, n * 16, 128, b_mn)),
        (Placed(16, 128, 256, a_mn), Placed(4096 + 16, 128, 256, b_mn)),
    ):
        left, right = integers(2, 64, 16, dtype=dtype), integers(2, n, 16, dtype=dtype)
        for before in (None, integers(2, 64, n)):
            check_operands(call, left, right, a, b, before, **where)


def check_operands(call: Callable, left, right, a: Placed, b: Placed, before: Tensor | None, **where) -> None:
    """Checks the product of `left` (grid, 64, 16) and `right` (grid, n, 16), placed as `a` and `b`, added to `before`
    if it is given."""
    n, dtype, grid = right.shape[1], left.dtype, len(left)
    size = max(int(placed.addresses(rows).max()) for placed, rows in ((a, 64), (b, n))) + 2
    image = torch.full((grid, -(-size // 16) * 16), 0xFF, dtype=torch.uint8)  # NaN outside the operands
    put(image, a.addresses(64), left)
    put(image, b.addresses(n), right)
    want = PRODUCTS * left.float() @ right.float().transpose(1, 2) + (0 if before is None else before.float())
    assert torch.equal(wgmma(call, image, a, b, n, dtype, before, **where).out, want)


def check_mma(call: Callable, k: int, dtype: torch.dtype, **where) -> None:
    a, b, d = integers(4, 16, k, dtype=dtype), integers(4, k, 8, dtype=dtype), integers(4, 16, 8)
    assert torch.equal(mma(call, a, b, d, **where).out, a.float() @ b.float() + d.float())


def check_ldmatrix(call: Callable, transposed: bool, **where) -> None:
    image = torch.arange(64 * 8, dtype=torch.int16).view(torch.uint8)[None]  # the value of each element is its index
    rows = torch.randperm(64)[:32]
    got = ldmatrix(call, image, rows, transposed, **where)
    assert torch.equal(got, ldmatrix_expected(image, rows, transposed))
    # One example by hand: of matrix 2, lane 5 holds columns 2 and 3 of row 1, or, transposed, column 1 of rows 2 and 3.
    want = [rows[16 + 2] * 8 + 1, rows[16 + 3] * 8 + 1] if transposed else [rows[16 + 1] * 8 + 2, rows[16 + 1] * 8 + 3]
    assert got[0, 5, 2].tolist() == [int(x) for x in want]


def check_copy_async(call: Callable, **where) -> None:
    x = torch.randn(2, 192, 4)
    want = x.clone()
    want[:, 2::3] = 0
    assert torch.equal(run(call, COPY_ASYNC, (2, 192, 4), x.flatten(1).view(torch.uint8), **where).out, want)


def check_barriers(call: Callable, **where) -> None:
    want = torch.arange(8)[:, None] * 64 + torch.arange(63, -1, -1)[None]
    assert torch.equal(run(call, BARRIERS, (2, 8, 64), **where).out, want.float().expand(2, 8, 64))


def check_shuffle(call: Callable, **where) -> None:
    assert torch.equal(
        run(call, SHUFFLE, (1, 5, 32), **where).out[0],
        torch.stack([torch.arange(32) ^ 1 << i for i in range(5)]).float(),
    )


def check_counters(call: Callable, **where) -> None:
    got = run(call, COUNTERS, (7, 2, 4), **where).out.flatten()[: 7 * 4].reshape(7, 4)
    assert torch.equal(got, 28.0 * torch.arange(1, 5).expand(7, 4))


def check_copy_bulk(call: Callable, **where) -> None:
    x = torch.randn(3, 7 * 32, 4)
    assert torch.equal(run(call, COPY_BULK, (3, 7 * 32, 4), x.flatten(1).view(torch.uint8), **where).out, x)


REST = [check_barriers, check_shuffle, check_counters, check_copy_async, check_copy_bulk]


# ---- mma and ldmatrix ----------------------------------------------------------------------------------------------


def mma_fragments(k: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns (row, column) of each 16-bit element of a (32, k / 2) and b (32, k / 4), and of each register of d (32,
    4)."""
    lane = torch.arange(32)[:, None]
    group, pair = lane // 4, lane % 4 * 2
    i = torch.arange(k // 2)[None, :]
    a = group + i // 2 % 2 * 8, pair + i % 2 + i // 4 * 8
    i = torch.arange(k // 4)[None, :]
    b = pair + i % 2 + i // 2 * 8, group + 0 * i
    i = torch.arange(4)[None, :]
    return a, b, (group + i // 2 * 8, pair + i % 2)


def mma(call: Callable, a: Tensor, b: Tensor, d: Tensor, **where) -> Result:
    """Returns `a` (grid, 16, k) times `b` (grid, k, 8) plus `d` (grid, 16, 8), as whole matrices."""
    grid, _, k = a.shape
    of_a, of_b, of_d = mma_fragments(k)
    image = torch.zeros(grid, 64, 8, dtype=a.dtype)
    image[:, :32, : k // 2] = a[:, of_a[0], of_a[1]]
    image[:, 32:, : k // 4] = b[:, of_b[0], of_b[1]]
    before = d[:, of_d[0], of_d[1]]
    op = MMA8 if k == 8 else MMA16
    image = image.flatten(1).view(torch.uint8)
    result = run(call, op, (grid, 32, 4), image, before, option=int(a.dtype == torch.bfloat16), **where)
    whole = torch.full((grid, 16, 8), float("nan"))
    whole[:, of_d[0], of_d[1]] = result.out
    return Result(whole, result.clocks)


def ldmatrix(call: Callable, image: Tensor, rows: Tensor, transposed: bool, **where) -> Tensor:
    """Returns int16 (grid, 32, 4, 2): the two elements in each register of each lane."""
    result = run(call, LDMATRIX, (len(image), 32, 4), image, rows=rows, option=int(transposed), **where)
    return result.out.view(torch.int16).unflatten(2, (4, 2))


def ldmatrix_expected(image: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    matrices = image.view(torch.int16).unflatten(1, (-1, 8))[:, rows.long()].unflatten(1, (4, 8))
    matrices = matrices.transpose(2, 3) if transposed else matrices  # (grid, matrix, row, column)
    lane, pair = torch.arange(32)[:, None], torch.arange(2)[None, :]
    return matrices[:, :, lane // 4, lane % 4 * 2 + pair].permute(0, 2, 1, 3)
