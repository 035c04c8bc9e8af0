"""The host functions that emulate PTX instructions: the layouts of their operands, and the mistakes that they report.

One-hot operands test a layout: each element in turn is the only one that is not zero.
"""

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


def one_hots(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Returns (elements, *shape): all operands in which one element is 1 and the others are 0."""
    count = torch.Size(shape).numel()
    return torch.eye(count).reshape(count, *shape).to(dtype)


# ---- fragments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "argument"),
    [(probe.check_ldmatrix, False), (probe.check_ldmatrix, True), *((probe.check_wgmma, i) for i in probe.INSTANCES)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_ldmatrix_and_wgmma(call: Callable, check: Callable, argument: object) -> None:
    check(call, argument)


@pytest.mark.parametrize(("k", "dtype"), [(8, torch.float16), (16, torch.float16), (16, torch.bfloat16)], ids=str)
def test_mma(call: Callable, k: int, dtype: torch.dtype) -> None:
    for a, b in ((one_hots(16, k), probe.integers(k, 8)), (probe.integers(16, k), one_hots(k, 8))):
        grid = max(len(x) for x in (a, b) if x.ndim == 3)
        a, b, d = (x.expand(grid, *x.shape[-2:]).to(dtype) for x in (a, b, probe.integers(grid, 16, 8)))
        assert torch.equal(probe.mma(call, a, b, d).out, a.float() @ b.float() + d.float())


@pytest.mark.parametrize(("a_mn", "b_mn"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_wgmma_one_hot(call: Callable, a_mn: int, b_mn: int) -> None:
    a, b = Placed(0, 1024, 128, a_mn), Placed(2048, 1024, 128, b_mn)
    left, right = probe.integers(1, 64, 16), probe.integers(1, 64, 16)
    hot = one_hots(64, 16)
    probe.check_operands(call, hot, right.expand(1024, -1, -1), a, b, None)
    probe.check_operands(call, left.expand(1024, -1, -1), hot, a, b, None)


@pytest.mark.parametrize("panel", [135, 136])
def test_wgmma_row_shifts(call: Callable, panel: int) -> None:
    """An operand may begin at any row of a panel (K-major or MN-major), and core matrices may overlap."""
    image = probe.panels()
    for b in [b for *_, b in probe.row_shifts(panel)] + [b for _, b in probe.overlaps()]:
        want = probe.wgmma_expected(image, probe.A, b, 64, torch.float16)
        assert torch.equal(probe.wgmma(call, image, probe.A, b, 64, torch.float16).out, want)


# ---- everything else: copies, barriers, counters -------------------------------------------------------------------


@pytest.mark.parametrize("check", probe.REST, ids=lambda check: check.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_the_rest_in_any_order(library: ctypes.CDLL, check: Callable, seed: int) -> None:
    library.jf_emulation(2, ctypes.c_uint64(seed))
    check(library.jf_probe)


def test_instructions_are_counted(library: ctypes.CDLL, call: Callable) -> None:
    probe.check_copy_bulk(call)
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
    "barrier lanes": "thread 40, barrier_arrive: lanes of the warp are at different barriers",
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
    "wgmma waits differ": "differ in their numbers of wgmma_fence, wgmma_commit or wgmma_wait",
    "registers differ": "setmaxnreg: warps of one warpgroup differ in what they ask for",
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


def sanitized(kind: str, name: str, mistake: bool) -> str:
    program = cuda_host.build([SOURCE], ["-DJF_MAIN"], sanitize=kind, program=True)
    return cuda_host.run_sanitized(program, kind, name, str(int(mistake)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RACES, "wgmma released early", "mbarrier deadlock", "bulk phase"])
def test_thread_sanitizer(library: ctypes.CDLL, name: str) -> None:
    """Shows that races are reported although a single system thread runs all threads of a kernel."""
    assert sanitized("thread", name, False) == "no error\n"
    got = sanitized("thread", name, True)
    if name in RACES:
        assert fault(library, name, True, 0) is None, "the emulation finds it without a sanitizer: list it in FAULTS"
    if name in RACES or FAULTS[name] == NAN:
        assert "ThreadSanitizer: data race" in got
    else:
        assert FAULTS[name] in got and "ThreadSanitizer" not in got


@pytest.mark.slow
def test_address_sanitizer() -> None:
    for name in ("plain store bounds", "bulk phase", "wgmma touched"):
        assert sanitized("address", name, False) == "no error\n"
    got = sanitized("address", "plain store bounds", True)
    assert "AddressSanitizer: use-after-poison" in got and "cuda_ptx.cpp" in got
    assert FAULTS["wgmma touched"] in sanitized("address", "wgmma touched", True)


@pytest.mark.slow
def test_without_the_hand_written_switch() -> None:
    """Checks the emulation with ucontext, by which it switches threads on processors other than x86-64."""
    library = ctypes.CDLL(str(cuda_host.build([SOURCE], scheduler=["-DJF_UCONTEXT"])))
    library.jf_fault.restype = ctypes.c_char_p
    for check in probe.REST:
        check(library.jf_probe)
    for name in ("wgmma released early", "mbarrier deadlock", "bulk phase"):
        assert fault(library, name, False, 0) is None
        assert FAULTS[name] in fault(library, name, True, 0)
