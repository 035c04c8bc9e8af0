"""Measures the machine's ceilings at the start of a run: matrix-product rate, copy bandwidth, launch overhead."""

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch

from jasper_fast.bench.harness import clocks, devices, machine
from jasper_fast.bench.harness.errors import first_line
from jasper_fast.kernels import precision

GIB = 1 << 30


def measure(device: torch.device, quick: bool = False) -> dict:
    """Returns the ceilings of `device`: FLOP/s by dtype, bytes per second of a large copy, seconds per launch."""
    found = {
        "matmul_flops_per_s": matmul_rates(device, quick),
        "float32_mode": float32_mode(device),
        "copy_bytes_per_s": copy_bandwidth(device, quick),
        "clocks": machine.clocks(device),  # read just after heavy work, while the clocks are still high
        "launch_s": launch_overhead(device),
        "method": "matmul and copy: the best of repeated runs (square matrices; a large buffer). launch: adds of one "
        "element: host is a mean, round_trip a median, in_graph the best, CuPy's times medians",
    }
    if device.type == "cuda":
        times, found["cupy"] = cupy_launch(device)
        found["launch_s"] |= times
    return found


def matmul_rates(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Returns the FLOP/s of a large square matrix product, by dtype.

    On a GPU there are two rates for fp32 tensors, with and without TF32. The rate named "float32" is the one at the
    precision that convolutions use (`float32_mode`).
    """
    if device.type == "cpu":
        # A CPU may emulate bf16 a hundred times slower than fp32. The rate of the emulation would be no useful ceiling.
        fast = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # functions that not every PyTorch has
        has_fast = any(getattr(torch.cpu, name, lambda: False)() for name in fast)
        dtypes = ("float32", "bfloat16") if has_fast else ("float32",)
        return {dtype: _matmul_rate(device, dtype, 1536 if quick else 2048) for dtype in dtypes}
    both = {}
    for mode in ("IEEE", "TF32"):
        with precision.fp32(mode.lower()):
            both[f"float32 in {mode}"] = _matmul_rate(device, "float32", 8192)
    others = {dtype: _matmul_rate(device, dtype, 8192) for dtype in ("bfloat16", "float16")}
    return {"float32": both[f"float32 in {float32_mode(device)}"], **both, **others}


def float32_mode(device: torch.device) -> str:
    """Returns the precision of the products in convolutions of fp32 tensors, "TF32" or "IEEE". By default PyTorch lets
    cuDNN's convolutions use TF32 on a GPU, and then ours use it too."""
    return "TF32" if device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32" else "IEEE"


def _matmul_rate(device: torch.device, dtype: str, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best(device, lambda: torch.mm(a, b, out=out))


def copy_bandwidth(device: torch.device, quick: bool = False) -> float:
    """Returns the bytes per second that a large copy reads and writes together."""
    size = (GIB // 8 if quick else GIB // 4) if device.type == "cpu" else GIB
    src = torch.ones(size, dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    return 2 * size / _best(device, lambda: dst.copy_(src))


def launch_overhead(device: torch.device) -> dict[str, float]:
    """Returns the seconds that the host takes to launch an add of one element (`host`).

    On a GPU it also returns the seconds from the launch until the host knows that the add has ended (`round_trip`), and
    the seconds per add in a CUDA graph (`in_graph`).
    """
    x, waiting = torch.zeros(1, device=device), clocks.WallClock(device)

    def launch(times: int) -> None:
        for _ in range(times):
            x.add_(1)

    launch(100)
    devices.synchronize(device)
    start = time.perf_counter()
    launch(2000)
    found = {"host": (time.perf_counter() - start) / 2000}
    if device.type == "cuda":
        found["round_trip"] = statistics.median(waiting.sample(lambda: x.add_(1), 1) for _ in range(200))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(100)
        found["in_graph"] = _best(device, graph.replay) / 100
    return found


def cupy_launch(device: torch.device) -> tuple[dict[str, float], str]:
    """Returns (times, CuPy's version). The times are the seconds that a launch takes on the host and on the device,
    measured by CuPy's profiler.

    If CuPy is missing or fails, there are no times, and the text is the reason.
    """
    if importlib.util.find_spec("cupyx") is None:
        return {}, f"absent: pip install cupy-cuda{(torch.version.cuda or '13').partition('.')[0]}x"
    x = torch.zeros(1, device=device)
    try:
        import cupy
        from cupyx.profiler import benchmark

        at = (device.index if device.index is not None else torch.cuda.current_device(),)
        seen = benchmark(lambda: x.add_(1), n_repeat=500, n_warmup=50, devices=at)
    except Exception as error:  # a CuPy built for another CUDA must not end the run
        return {}, f"failed: {first_line(error)}"
    medians = (float(statistics.median(times.ravel())) for times in (seen.cpu_times, seen.gpu_times))
    return dict(zip(("cupy_host", "cupy_device"), medians, strict=True)), cupy.__version__


def _best(device: torch.device, call: Callable[[], object], seconds: float = 0.6) -> float:
    """Repeats a call for `seconds`; returns the shortest time, because a ceiling is the best that a machine can do."""
    ticker = clocks.clock(device, wall=False)
    times, end = [ticker.sample(call, 1)], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        times.append(ticker.sample(call, 1))
    return min(times)
