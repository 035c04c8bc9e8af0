"""The host twins of the PTX wrappers: layouts by exhaustive one-hot operands, and mistakes that must be caught."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator

import cuda_host
import cuda_probe as probe
import pytest
import torch
from cuda_probe import Placed
from torch import Tensor

SOURCE = cuda_host.ROOT / "tests/cuda_ptx.cpp"
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def library() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(str(cuda_host.build([SOURCE])))
    library.jf_fault.restype = library.jf_fault_name.restype = ctypes.c_char_p
    library.jf_emulation_count.restype = ctypes.c_int64
    yield library
    library.jf_emulation(1, ctypes.c_uint64(0))


@pytest.fixture
def call(library: ctypes.CDLL) -> Callable:
    library.jf_emulation(1, ctypes.c_uint64(0))
    return library.jf_probe


def integers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


def one_hots(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """(elements, *shape): each element 1 in turn."""
    count = torch.Size(shape).numel()
    return torch.eye(count).reshape(count, *shape).to(dtype)


# ---- fragments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(call: Callable, transposed: bool) -> None:
    image = torch.arange(64 * 8, dtype=torch.int16).view(torch.uint8)[None]  # every element tells its place
    rows = torch.randperm(64)[:32]
    got = probe.ldmatrix(call, image, rows, transposed)
    assert torch.equal(got, probe.ldmatrix_expected(image, rows, transposed))
    # by hand: lane 5 holds, of matrix 2, row 1 columns 2 and 3, or transposed column 1 of rows 2 and 3
    want = [rows[16 + 2] * 8 + 1, rows[16 + 3] * 8 + 1] if transposed else [rows[16 + 1] * 8 + 2, rows[16 + 1] * 8 + 3]
    assert got[0, 5, 2].tolist() == [int(x) for x in want]


@pytest.mark.parametrize(("k", "dtype"), [(8, torch.float16), (16, torch.float16), (16, torch.bfloat16)], ids=str)
def test_mma(call: Callable, k: int, dtype: torch.dtype) -> None:
    for a, b in ((one_hots(16, k), integers(k, 8)), (integers(16, k), one_hots(k, 8))):
        grid = max(len(x) for x in (a, b) if x.ndim == 3)
        a, b, d = (x.expand(grid, *x.shape[-2:]).to(dtype) for x in (a, b, integers(grid, 16, 8)))
        assert torch.equal(probe.mma(call, a, b, d).out, a.float() @ b.float() + d.float())


def wgmma_equal(call: Callable, left: Tensor, right: Tensor, a: Placed, b: Placed, before: Tensor | None) -> None:
    n, dtype, grid = right.shape[1], left.dtype, len(left)
    size = max(int(placed.addresses(rows).max()) for placed, rows in ((a, 64), (b, n))) + 2
    image = torch.full((grid, -(-size // 16) * 16), 0xFF, dtype=torch.uint8)  # NaN where no operand lies
    probe.put(image, a.addresses(64), left)
    probe.put(image, b.addresses(n), right)
    want = probe.PRODUCTS * left.float() @ right.float().transpose(1, 2) + (0 if before is None else before.float())
    assert torch.equal(probe.wgmma(call, image, a, b, n, dtype, before).out, want)


@pytest.mark.parametrize("instance", probe.INSTANCES, ids=str)
def test_wgmma(call: Callable, instance) -> None:
    """Random operands in both orders of core matrices; accumulated and not."""
    n, a_mn, b_mn, dtype = instance
    for first, second in ((1024, 128), (128, 256)):
        a = Placed(16, first, second, a_mn)
        b = Placed(4096, n * 16, 128, b_mn) if first == 1024 else Placed(4096 + 16, 128, 256, b_mn)
        left, right = integers(2, 64, 16, dtype=dtype), integers(2, n, 16, dtype=dtype)
        for before in (None, integers(2, 64, n)):
            wgmma_equal(call, left, right, a, b, before)


@pytest.mark.parametrize(("a_mn", "b_mn"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_wgmma_one_hot(call: Callable, a_mn: int, b_mn: int) -> None:
    a, b = Placed(0, 1024, 128, a_mn), Placed(2048, 1024, 128, b_mn)
    left, right = integers(1, 64, 16), integers(1, 64, 16)
    hot = one_hots(64, 16)
    wgmma_equal(call, hot, right.expand(1024, -1, -1), a, b, None)
    wgmma_equal(call, left.expand(1024, -1, -1), hot, a, b, None)


@pytest.mark.parametrize("panel", [97, 104])
def test_wgmma_row_shifts(call: Callable, panel: int) -> None:
    """A panel [2 chunks of k][rows][8], read from any row on; and, MN-major, overlapping core matrices."""
    dtype, n = torch.float16, 64
    image = integers(1, (2048 + 2 * 16 * panel) // 2, dtype=dtype).view(torch.uint8)
    image = torch.cat([image, image.new_zeros(1, 4096)], 1)
    a = Placed(0, 1024, 128, 0)
    for shift in range(32):
        b = Placed(2048 + 16 * shift, 16 * panel, 128, 0)
        want = probe.wgmma_expected(image, a, b, n, dtype)
        assert torch.equal(probe.wgmma(call, image, a, b, n, dtype).out, want)
    for step in (16, 32, 48):
        b = Placed(2048, 128, step, 1)
        want = probe.wgmma_expected(image, a, b, n, dtype)
        assert torch.equal(probe.wgmma(call, image, a, b, n, dtype).out, want)


# ---- everything else: copies, barriers, counters -------------------------------------------------------------------


def check_copy_async(call: Callable, **where) -> None:
    x = torch.randn(2, 192, 4)
    want = x.clone()
    want[:, 2::3] = 0
    assert torch.equal(
        probe.run(call, probe.COPY_ASYNC, (2, 192, 4), x.flatten(1).view(torch.uint8), **where).out, want
    )


def check_barriers(call: Callable, **where) -> None:
    want = torch.arange(8)[:, None] * 64 + torch.arange(63, -1, -1)[None]
    assert torch.equal(probe.run(call, probe.BARRIERS, (2, 8, 64), **where).out, want.float().expand(2, 8, 64))


def check_shuffle(call: Callable, **where) -> None:
    want = torch.stack([torch.arange(32) ^ 1 << i for i in range(5)])
    assert torch.equal(probe.run(call, probe.SHUFFLE, (1, 5, 32), **where).out[0], want.float())


def check_counters(call: Callable, **where) -> None:
    got = probe.run(call, probe.COUNTERS, (7, 2, 4), **where).out.flatten()[: 7 * 4].reshape(7, 4)
    assert torch.equal(got, 28.0 * torch.arange(1, 5).expand(7, 4))


def check_copy_bulk(call: Callable, **where) -> None:
    x = torch.randn(3, 7 * 32, 4)
    assert torch.equal(probe.run(call, probe.COPY_BULK, (3, 7 * 32, 4), x.flatten(1).view(torch.uint8), **where).out, x)


CHECKS = [check_copy_async, check_barriers, check_shuffle, check_counters, check_copy_bulk]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_the_rest_in_any_order(library: ctypes.CDLL, check: Callable, seed: int) -> None:
    library.jf_emulation(2, ctypes.c_uint64(seed))
    check(library.jf_probe)


def test_instructions_are_counted(library: ctypes.CDLL, call: Callable) -> None:
    check_copy_bulk(call)
    assert library.jf_emulation_count(b"copy_bulk") == 3 * 7
    assert library.jf_emulation_count(b"wgmma") == 0


# ---- mistakes ------------------------------------------------------------------------------------------------------

NAN = "a result is NaN"
FAULTS = {
    "copy_async wait": NAN,
    "copy_async commit": NAN,
    "copy_async group": NAN,
    "copy_async source aligned": "CTA 0, thread 0, copy_async: the source is not aligned to 16 bytes",
    "copy_async target aligned": "shared address 0x408 is not aligned to 16 bytes",
    "copy_async target bounds": "copy_async: 16 bytes at shared address 0x600 are out of bounds",
    "copy_async source bounds": "16 bytes of global memory are out of bounds: at 256 of a tensor of 256 bytes",
    "store bounds": "store_shared: 16 bytes at shared address 0x3f0 are out of bounds",
    "plain store bounds": "wrote 0 bytes past the end of shared memory",
    "shared address": "the pointer is not into the CTA's dynamic shared memory",
    "ldmatrix bounds": "thread 31, ldmatrix: 16 bytes at shared address 0x600 are out of bounds",
    "ldmatrix aligned": "thread 1, ldmatrix: the row's address is not aligned to 16 bytes",
    "lanes apart": "lanes 0-3 of the warp are at another instruction, ldmatrix",
    "lane ended": "the warp's lanes 0-6 wait for a lane that has ended",
    "barrier threads": "barrier 3 of 32 threads, others named 64",
    "barrier multiple": "63 threads are not a multiple of 32",
    "barrier id": "barrier 16 is not one of 1 to 15",
    "barrier twice": "arrives at barrier 3 twice in one phase",
    "barrier deadlock": "warp 1 lanes 0-31: barrier_sync 2, where 32 of 64 threads are",
    "syncthreads apart": "warp 0 lanes 0-31: __syncthreads 0, where 32 of 64 threads are",
    "mbarrier deadlock": "for parity 0 of 0x400, which is in phase 0 and lacks 1 of 65 arrivals and 0 bytes",
    "mbarrier bytes": "lacks 0 of 1 arrivals and 16 bytes",
    "mbarrier arrivals": "more than 1 arrivals at 0x400 in one phase",
    "mbarrier missing": "no mbarrier was initialised at 0x408",
    "mbarrier twice": "there is an mbarrier at 0x400 already",
    "mbarrier overwritten": "writes over the mbarrier at 0x408",
    "mbarrier fence": "no fence_mbarrier_init since the mbarrier at 0x400 was made",
    "bulk phase": NAN,
    "bulk end": "copy_bulk: was still under way when its CTA ended",
    "bulk size": "40 bytes are not a multiple of 16",
    "bulk proxy": "shared address 0x440 was written by thread 0 without a fence_async_proxy",
    "bulk written meanwhile": "thread 0 wrote to its destination meanwhile, at 0x460",
    "poll": "a loop that polls global memory",
    "wgmma proxy": "without a fence_async_proxy of that thread since",
    "wgmma proxy early": "0x440 was written by thread 5 without a fence_async_proxy of that thread since",
    "wgmma proxy of others": "0x440 was written by thread 5 without a fence_async_proxy of that thread since",
    "wgmma proxy copy": "0x400 was written by thread 0 without a fence_async_proxy of that thread since",
    "wgmma warps differ": "in shape, type, descriptors, majors or accumulation",
    "wgmma lanes differ": "thread 9, wgmma: lanes of the warp ask for different products",
    "wgmma warps missing": "warps of one warpgroup issued different numbers of products",
    "wgmma bounds": "128 bytes at shared address 0x1390 are out of bounds",
    "wgmma swizzle": "the descriptor of a asks for swizzle",
    "wgmma base offset": "the descriptor of a has a base offset",
    "wgmma fence": "no wgmma_fence before the first product",
    "wgmma commit": "products were never committed",
    "wgmma wait": "products were never waited for",
    "wgmma read early": NAN,
    "wgmma written early": "registers were written while the product was under way",
    "wgmma touched": "registers were used since the last product, and no wgmma_fence came after",
    "wgmma overwritten": "registers were used since the last product, and no wgmma_fence came after",
    "wgmma released early": "operand b changed while the product was under way",
    "wgmma unwritten": NAN,
}


def fault(library: ctypes.CDLL, name: str, mistake: bool, seed: int) -> str | None:
    library.jf_emulation(1, ctypes.c_uint64(seed))
    results = torch.zeros(128)
    error = library.jf_fault(name.encode(), int(mistake), ctypes.c_void_p(results.data_ptr()))
    return error.decode() if error else NAN if results.isnan().any() else None


def test_every_fault_is_listed(library: ctypes.CDLL) -> None:
    names = itertools.takewhile(lambda name: name, map(library.jf_fault_name, itertools.count()))
    assert [name.decode() for name in names] == list(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_mistake_is_caught(library: ctypes.CDLL, name: str) -> None:
    assert [fault(library, name, False, seed) for seed in SEEDS] == [None] * len(SEEDS)
    got = fault(library, name, True, 0)
    assert got is not None and FAULTS[name] in got
    assert fault(library, name, False, 0) is None, "what a failed launch leaves must not disturb the next"


# ---- sanitizers ----------------------------------------------------------------------------------------------------

RACES = ["race store", "race copy", "race barrier", "race release", "race full", "race wgmma", "race counter"]


@pytest.fixture(scope="module")
def sanitized() -> Callable[[str, str, bool], str]:
    def run(kind: str, name: str, mistake: bool) -> str:
        program = cuda_host.build([SOURCE], ["-DJF_MAIN"], sanitize=kind, program=True)
        return cuda_host.run_sanitized(program, kind, name, str(int(mistake)))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RACES, "wgmma released early", "mbarrier deadlock", "bulk phase"])
def test_thread_sanitizer(sanitized: Callable, library: ctypes.CDLL, name: str) -> None:
    """A missing wait or an early release is a race, although every thread runs on one thread of the system."""
    assert sanitized("thread", name, False) == "no error\n"
    got = sanitized("thread", name, True)
    if name in RACES:
        assert fault(library, name, True, 0) is None, "the engine alone sees it: it belongs to FAULTS"
        assert "ThreadSanitizer: data race" in got
    elif FAULTS[name] != NAN:
        assert FAULTS[name] in got and "ThreadSanitizer" not in got
    else:
        assert "ThreadSanitizer: data race" in got


@pytest.mark.slow
def test_address_sanitizer(sanitized: Callable) -> None:
    for name in ("plain store bounds", "bulk phase", "wgmma touched"):
        assert sanitized("address", name, False) == "no error\n"
    got = sanitized("address", "plain store bounds", True)
    assert "AddressSanitizer: use-after-poison" in got and "cuda_ptx.cpp" in got
    assert FAULTS["wgmma touched"] in sanitized("address", "wgmma touched", True)


@pytest.mark.slow
def test_without_the_hand_written_switch() -> None:
    """ucontext, which other processors than x86-64 take."""
    library = ctypes.CDLL(str(cuda_host.build([SOURCE], scheduler=["-DJF_UCONTEXT"])))
    library.jf_fault.restype = ctypes.c_char_p
    for check in CHECKS:
        check(library.jf_probe)
    for name in ("wgmma released early", "mbarrier deadlock", "bulk phase"):
        assert fault(library, name, False, 0) is None
        assert FAULTS[name] in fault(library, name, True, 0)
