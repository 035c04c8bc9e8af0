"""Compiles every Triton kernel of bn_relu_dropout ahead of time, in a process of its own.

All combinations of flags for sm_90 in fp16, the fullest ones elsewhere.

Run by test_bn_relu_dropout.py:

    python tests/compile_bn_relu_dropout.py ARCH[,ARCH...] DTYPE[,DTYPE...]   prints one JSON object a line
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from jasper_fast.kernels import aot
from jasper_fast.kernels.bn_relu_dropout import triton_impl

FULLEST = (  # with every flag: the hungriest for registers
    "stats",
    "stats_merge",
    "sum_merge",
    "forward residual lengths dropout",
    "backward_reduce lengths dropout",
    "backward_reduce z lengths",
    "backward_apply batch_stats lengths dropout",
    "backward_apply z residual batch_stats lengths",
)


def main(archs: str, dtypes: str) -> None:
    for arch in map(int, archs.split(",")):
        for name in dtypes.split(","):
            for source in triton_impl.sources(getattr(torch, name), 256):
                if source.name not in FULLEST and (arch, name) != (90, "float16"):
                    continue
                facts = aot.compile_for(source, arch)
                row = {"arch": arch, "dtype": name, "kernel": source.name, "wide_loads": facts.wide_loads}
                row |= {"wide_stores": facts.wide_stores, "sixteen_bit": facts.count(r"ld\.global\S*\.[bu]16\b")}
                row |= {key: value for key, value in vars(replace(facts, ptx="")).items() if key != "ptx"}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
