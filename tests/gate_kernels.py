"""Kernels that break the gate's rules on purpose, compiled in a process of its own: `python tests/gate_kernels.py`.

Prints one JSON object: for each kernel the facts, and what the machine code of the good ReLU holds.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
import triton.language as tl

from jasper_fast.bench.compile.gate import FACTS
from jasper_fast.kernels import aot


@triton.jit
def product(x_ptr, w_ptr, y_ptr, steps, C, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    """y = x w over `steps` blocks; unaligned rows give scalar loads, a transposed tile goes through registers."""
    row = C * 8 if ALIGNED else C
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(steps):
        x = tl.load(x_ptr + offs[:, None] * row + (i * BLOCK + offs)[None, :])
        w = tl.load(w_ptr + (i * BLOCK + offs)[:, None] * row + offs[None, :])
        if TRANSPOSED:
            x = tl.trans(x)
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs[:, None] * row + offs[None, :], acc.to(tl.float16))


@triton.jit
def relu(x_ptr, y_ptr, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum drops a NaN, the select lets it pass."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    y = tl.maximum(x, 0.0) if PLAIN else tl.where(x <= 0, 0.0, x)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)


def multiply(name: str, block: int, warps: int, stages: int = 3, aligned: bool = True, transposed: bool = False):
    types = {"x_ptr": "*fp16", "w_ptr": "*fp16", "y_ptr": "*fp16", "steps": "i32", "C": "i32"}
    flags = {"ALIGNED": aligned, "TRANSPOSED": transposed, "BLOCK": block}
    return aot.Source(name, product, types, flags, warps, stages)


def pointwise(name: str, plain: bool) -> aot.Source:
    return aot.Source(name, relu, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"PLAIN": plain, "BLOCK": 1024})


def main() -> None:
    found = {}
    for source in (
        multiply("good", 64, 4),
        multiply("spilling", 256, 4),
        multiply("scalar", 64, 4, aligned=False),
        multiply("through registers", 64, 4, transposed=True),
        multiply("narrow tile", 16, 4),
        pointwise("maximum", True),
        pointwise("select", False),
    ):
        facts = aot.compile_for(source, 80)
        found[source.name] = {name: getattr(facts, name) for name in FACTS}
        if source.kernel is relu:
            found[source.name]["sass_maxima"] = len(re.findall(r"\bFMNMX(?!\.NAN)", facts.sass()))
    hopper = aot.compile_for(multiply("good", 64, 4), 90)
    found["good on sm_90"] = {name: getattr(hopper, name) for name in FACTS}
    digests = [multiply("a", 64, 4).digest(80), multiply("b", 64, 4).digest(80), multiply("a", 64, 4, 2).digest(80)]
    found["digests"] = [*digests, multiply("a", 64, 4).digest(90)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
