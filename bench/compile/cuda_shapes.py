"""Calculates what the CUDA convs should cost: `python -m bench compile --cuda --shapes`.

For each of GPUS whose architecture was compiled, the command prints a line for each shape of Jasper 10x5's convs, at
N = 32 utterances of 16.7 s (T' = 835). The columns are:

    frames                  frames of the planned tile
    regs                    registers per thread, from nvcc
    CTAs                    how many thread blocks fit on a multiprocessor, by their shared memory and registers
    KiB/step                KiB that a step (128 output channels, 64 input channels, one tap) reads from L2
    tensor, port, L2        clock cycles of a step in the tensor cores, in the shared-memory port (128 bytes per cycle),
                            and in L2 (64 bytes per cycle and multiprocessor). The largest of the three limits the loop.
"""

from collections.abc import Iterable

from jasper_fast.kernels.conv1d import cuda_tiles

# c_in, c_out, taps, stride, dilation
SHAPES = (
    (64, 256, 11, 2, 1), (256, 256, 11, 1, 1), (256, 384, 13, 1, 1), (384, 384, 13, 1, 1), (384, 512, 17, 1, 1),
    (512, 512, 17, 1, 1), (512, 640, 21, 1, 1), (640, 640, 21, 1, 1), (640, 768, 25, 1, 1), (768, 768, 25, 1, 1),
    (768, 896, 29, 1, 2), (896, 1024, 1, 1, 1), (1024, 29, 1, 1, 1),
)  # fmt: skip
# By architecture, the name of one GPU and its properties: inner loop, number of multiprocessors, bytes of shared memory
# that a thread block may have, and, if the peak is not that of the loop, 16-bit multiply-adds per clock (`products`).
GPUS = {
    "75": ("T4", cuda_tiles.Gpu(75, 40, 65536)), "80": ("A100", cuda_tiles.Gpu(80, 108, 166912)),
    "86": ("A10", cuda_tiles.Gpu(80, 72, 101376, products=512)),
    "89": ("L4", cuda_tiles.Gpu(80, 58, 101376, products=512)),
    "90a": ("H100", cuda_tiles.Gpu(90, 132, 232448)),
}  # fmt: skip
# Bytes of shared memory of a multiprocessor, by architecture.
SHARED_OF_SM = {"75": 65536, "80": 167936, "86": 102400, "89": 102400, "90a": 233472}
REGISTERS, THREADS = 65536, {75: 128, 80: 128, 90: 384}
FRAMES, BATCH = 835, 32


def show(rows: Iterable[dict]) -> None:
    """Prints a line for each shape on each of GPUS whose architecture `rows` contains. `rows` are those of the
    gate, which have the registers of each kernel."""
    registers = {(row["arch"], row["kernel"]): row["registers"] for row in rows}
    print(f"N = {BATCH}, T' = {FRAMES}, fp16, forward with statistics")
    print(f"{'GPU':>5} {'conv':<22}{'frames':>7}{'regs':>6}{'CTAs':>6}{'KiB/step':>9}{'tensor':>8}{'port':>6}{'L2':>6}")
    for arch, (name, gpu) in GPUS.items():
        if not any(known == arch for known, _ in registers):
            continue
        for c_in, c_out, taps, stride, dilation in SHAPES:
            work = cuda_tiles.Work(BATCH, FRAMES, c_in, c_out, 0, taps, stride, dilation)
            cut = cuda_tiles.plan(gpu, work)
            used = registers[arch, f"conv_{gpu.loop} fp16 stats {cut.block}"]
            ctas = min(SHARED_OF_SM[arch] // (cut.shared + 1024), REGISTERS // (used * THREADS[gpu.loop]))
            kib = cuda_tiles.bytes_of_step(cut.block, work) / 1024
            tensor, port, l2 = cuda_tiles.clocks_of_step(gpu, cut.block, work)
            conv = f"{c_in}->{c_out} K={taps}" + (f" s{stride}" if stride > 1 else "") + (" d2" if dilation > 1 else "")
            print(
                f"{name:>5} {conv:<22}{cut.block:>7}{used:>6}{ctas:>6}{kib:>9.1f}{tensor:>8.0f}{port:>6.0f}{l2:>6.0f}"
            )
