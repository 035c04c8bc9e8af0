"""Instructions of csrc/cuda/ptx.cuh, run on a device, do what the PTX ISA says. The functions that emulate them on the
host, their "host twins", follow the same text.

    python tests/test_cuda_probe.py    prints how many clocks products of wgmma take if their operand begins at
                                       different rows of a panel, and what 128-byte swizzle does

The tests assert what the kernels rely on. What an operand with swizzle reads, if it begins inside the swizzle's
pattern, is only printed.
"""

import ctypes
from collections.abc import Callable

import cuda_probe as probe
import pytest
import torch
from cuda_probe import Placed

from jasper_fast.kernels import native

SM_90 = (9, 0)  # code for this compute capability is compiled for sm_90a and runs on no other GPU
AT_LEAST = {probe.check_copy_async: (8, 0), probe.check_copy_bulk: SM_90}
CHECKS = [  # check, its arguments, the least compute capability
    *((probe.check_ldmatrix, (transposed,), (7, 5)) for transposed in (False, True)),
    (probe.check_mma, (8, torch.float16), (7, 5)),
    *((probe.check_mma, (16, dtype), (8, 0)) for dtype in (torch.float16, torch.bfloat16)),
    *((check, (), AT_LEAST.get(check, (7, 5))) for check in probe.REST),
    *((probe.check_wgmma, (instance,), SM_90) for instance in probe.INSTANCES),
]


def device_call() -> tuple[Callable, dict]:
    """Returns jf_probe of the CUDA library, and the device and stream to run it on."""
    library = ctypes.CDLL(str(native.Library("cuda").path))
    return library.jf_probe, {"device": "cuda", "stream": torch.cuda.current_stream().cuda_stream}


def why_not(capability: tuple[int, int]) -> str | None:
    """Returns why this machine cannot run code for this compute capability, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not native.cuda_available():
        return "the native CUDA library is not built: run `make install` where nvcc is found"
    here = torch.cuda.get_device_capability()
    if here < capability or (capability == SM_90 and here != SM_90):
        return f"needs compute capability {capability[0]}.{capability[1]}"
    return None


def on_device(capability: tuple[int, int] = SM_90) -> tuple[Callable, dict]:
    if why := why_not(capability):
        pytest.skip(why)
    return device_call()


@pytest.mark.parametrize(("check", "arguments", "capability"), CHECKS)
def test_an_instruction(check: Callable, arguments: tuple, capability: tuple[int, int]) -> None:
    call, where = on_device(capability)
    check(call, *arguments, **where)


@pytest.mark.parametrize("panel", [135, 136])
def test_wgmma_row_shifts(panel: int) -> None:
    call, where = on_device()
    wrong = [shift for shift in shifts(call, panel, where) if not shift[-1]]
    assert not wrong, f"(major, row, clocks, equal): {wrong}"


def test_wgmma_overlapping_core_matrices() -> None:
    call, where = on_device()
    wrong = [step for step in overlaps(call, where) if not step[-1]]
    assert not wrong, f"(bytes, clocks, equal): {wrong}"


def one(call: Callable, image, b: Placed, where: dict, anchors: tuple[int, ...] = (0,)) -> tuple:
    """Launches four products five times. Returns the fewest clocks and, for each anchor, whether the result is the
    expected one."""
    results = [probe.wgmma(call, image, probe.A, b, 64, torch.float16, **where) for _ in range(5)]
    want = [probe.wgmma_expected(image, probe.A, b, 64, torch.float16, anchor=anchor) for anchor in anchors]
    return min(int(result.clocks) for result in results), *(torch.equal(results[0].out, each) for each in want)


def shifts(call: Callable, panel: int, where: dict) -> list[tuple[int, int, int, bool]]:
    image = probe.panels()
    return [(major, row, *one(call, image, b, where)) for major, row, b in probe.row_shifts(panel)]


def overlaps(call: Callable, where: dict) -> list[tuple[int, int, bool]]:
    image = probe.panels()
    return [(step, *one(call, image, b, where)) for step, b in probe.overlaps()]


def swizzles(call: Callable, where: dict) -> list[str]:
    """Returns one line per case. Each case has an operand with 128-byte swizzle. Cases vary the row at which it begins
    (0 to 63) and the base offset."""
    image, lines = probe.panels(), []
    for row in range(64):
        for base in sorted({0, row % 8}):
            b = Placed(probe.PANELS + 128 * row, 16, 1024, 0, swizzle=True, base=base)
            clocks, by_address, by_start = one(call, image, b, where, anchors=(0, b.start))
            rule = {
                (True, True): "both",
                (True, False): "the address's bits",
                (False, True): "the row after the start",
                (False, False): "neither",
            }[by_address, by_start]
            lines.append(f"row {row:2}, base offset {base}: {clocks} clocks, cells change places by {rule}")
    return lines


def main() -> None:
    if why := why_not(SM_90):
        print(f"probe: {why}")
        return
    call, where = device_call()
    print(f"{torch.cuda.get_device_name()}: {probe.PRODUCTS} products of 64 x 64 x 16, clocks and whether right")
    for panel in (135, 136):
        for major, row, clocks, equal in shifts(call, panel, where):
            print(f"panel of {panel} rows, {('K', 'MN')[major]}-major, row {row:2}: {clocks} clocks, {equal}")
    for step, clocks, equal in overlaps(call, where):
        print(f"core matrices {step} bytes apart: {clocks} clocks, {equal}")
    print("\n".join(swizzles(call, where)))


if __name__ == "__main__":
    main()
