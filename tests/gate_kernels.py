"""Two kernels for tests of the compile gate. Some of their launches break one of its rules.

`python tests/gate_kernels.py` compiles them and prints one JSON object: what the gate measures in each kernel, for the
ReLUs also the number of maximum instructions in the machine code, and the digests of some launches of `product`.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import triton.language as tl

from jasper_fast.bench.compile.gate import TABLE
from jasper_fast.kernels import aot, launch


@triton.jit(do_not_specialize=["steps", "C"])
def product(x_ptr, w_ptr, y_ptr, steps, C, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    """Stores y = x w, summed over `steps` blocks. If a tensor is not aligned, the loads are scalar. If TRANSPOSED, the
    tile of x goes through registers."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(steps):
        x = tl.load(x_ptr + offs[:, None] * C * 8 + (i * BLOCK + offs)[None, :])
        w = tl.load(w_ptr + (i * BLOCK + offs)[:, None] * C * 8 + offs[None, :])
        if TRANSPOSED:
            x = tl.trans(x)
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs[:, None] * C * 8 + offs[None, :], acc.to(tl.float16))


@triton.jit
def relu(x_ptr, y_ptr, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    """Stores y = ReLU(x): with PLAIN as a maximum, which drops a NaN, and otherwise as a select, which keeps a NaN."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    y = tl.maximum(x, 0.0) if PLAIN else tl.where(x <= 0, 0.0, x)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)


def source(kernel: object, arch: int, *args: object, **meta: object) -> aot.Source:
    """Returns the source that Triton compiles for a launch of `kernel` with these arguments."""
    made: list[launch.Launch] = []
    with launch.recorded(made.append, arch):
        launch.run(kernel, (1,), args[0], *args, **meta)
    return aot.source(made[0], arch)


def multiply(block: int, arch: int = 80, first: int = 0, transposed: bool = False, **options: int) -> aot.Source:
    x = torch.zeros(first + 8, dtype=torch.float16)[first:]
    return source(product, arch, x, x, x, 4, 64, TRANSPOSED=transposed, BLOCK=block, num_warps=4, **options)


def main() -> None:
    x, found = torch.zeros(8), {}
    for name, arch, of in [
        ("good", 80, multiply(64)),
        ("spilling", 80, multiply(256)),
        ("scalar", 80, multiply(64, first=1)),
        ("through registers", 80, multiply(64, transposed=True)),
        ("narrow tile", 80, multiply(16)),
        ("maximum", 80, source(relu, 80, x, x, PLAIN=True, BLOCK=1024)),
        ("select", 80, source(relu, 80, x, x, PLAIN=False, BLOCK=1024)),
        ("good on sm_90", 90, multiply(64, 90)),
    ]:
        facts = aot.compile_for(of, arch)
        found[name] = {fact: getattr(facts, fact) for fact in TABLE.facts}
        if of.kernel is relu:
            found[name]["sass_maxima"] = len(re.findall(r"\bFMNMX(?!\.NAN)", facts.sass()))
    found["digests"] = [
        multiply(64).digest(80),
        multiply(64, first=8).digest(80),
        multiply(64, first=1).digest(80),
        multiply(64, num_stages=2).digest(80),
        multiply(64, 90).digest(90),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
