"""Compiles Triton kernels ahead of time, in a process of its own, and prints one JSON object a kernel.

python tests/compile_triton.py OP ARCH[,ARCH...] DTYPE[,DTYPE...] [NAME...]   only the kernels of these names, if any
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from jasper_fast.kernels import aot


def sources(op: str, dtype: torch.dtype, arch: int) -> list[aot.Source]:
    if op == "bn_relu_dropout":
        from jasper_fast.kernels.bn_relu_dropout import triton_impl

        return list(triton_impl.sources(dtype, 256))
    from jasper_fast.kernels.conv1d import triton_sources

    yes = arch >= 90
    return [
        *triton_sources.sources(dtype, 256, 384, 400, descriptors=yes),
        *triton_sources.first_and_last(dtype, 256, 1024, 29, 400, descriptors=yes),
    ]


def main(op: str, archs: str, dtypes: str, *names: str) -> None:
    for arch in map(int, archs.split(",")):
        for dtype in dtypes.split(","):
            for source in sources(op, getattr(torch, dtype), arch):
                if names and source.name not in names:
                    continue
                facts = aot.compile_for(source, arch)
                row = {
                    "arch": arch,
                    "dtype": dtype,
                    "kernel": source.name,
                    "registers": facts.registers,
                    "spilled": facts.spilled,
                    "shared": facts.shared,
                    "wide_loads": facts.wide_loads,
                    "wide_stores": facts.wide_stores,
                    "narrow_loads": facts.count(r"ld\.global\S*\.[bu]16\b"),
                    "cp_async": facts.count(r"cp\.async\.c[ag]\."),
                    "tma": facts.count(r"cp\.async\.bulk\.tensor"),
                    "mma": facts.count(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
