"""Ahead-of-time compilation of Triton kernels for a GPU architecture, with no GPU, and the facts it leaves.

Needs a process without TRITON_INTERPRET: the switch is read when a kernel is defined.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 86, 89, 90, 100)
_WIDE = r"{}\.global\S*(?:\.v4\.[bfu]32|\.v2\.[bfu]64|\.v8\.[bfu]32|\.v4\.[bfu]64)"


@dataclass(frozen=True)
class Source:
    """A kernel as one launch compiles it: argument types by name ("*fp16", "i32", ...) and values of its constexprs."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3

    def digest(self, arch: int) -> str:
        """The same for sources that compile to the same code on `arch`, whatever they are called."""
        constants = sorted((name, repr(value)) for name, value in self.constants.items())
        launch = (sorted(self.signature.items()), constants, self.num_warps, self.num_stages)
        parts = (self.kernel.cache_key, *launch, arch, triton.__version__, _own_text())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Facts:
    """What a kernel uses: registers a thread, bytes of stack and local memory (spills), shared bytes; and its code.

    dots: number of matrix products in the source; dot_rows: rows of the smallest of them (0 where there is none).
    """

    registers: int
    spilled: int
    shared: int
    ptx: str
    dots: int
    dot_rows: int
    cubin: bytes

    def count(self, pattern: str) -> int:
        """Occurrences of a regular expression in the PTX."""
        return len(re.findall(pattern, self.ptx))

    @property
    def wide_loads(self) -> int:
        """Global loads of 16 bytes or more a thread."""
        return self.count(_WIDE.format("ld"))

    @property
    def wide_stores(self) -> int:
        """Global stores of 16 bytes or more a thread."""
        return self.count(_WIDE.format("st"))

    @property
    def wgmma(self) -> int:
        """Warp-group matrix instructions (sm_90)."""
        return self.count(r"\bwgmma\.mma_async")

    @property
    def mma_sync(self) -> int:
        """Warp matrix instructions (sm_80 to sm_89, and small tiles later)."""
        return self.count(r"\bmma\.sync")

    @property
    def tcgen05(self) -> int:
        """Tensor-memory matrix instructions (sm_100)."""
        return self.count(r"\btcgen05\.mma")

    @property
    def tma(self) -> int:
        """Bulk tensor copies through a descriptor."""
        return self.count(r"cp\.async\.bulk\.tensor")

    @property
    def cp_async(self) -> int:
        """Asynchronous copies of at most 16 bytes a thread into shared memory."""
        return self.count(r"cp\.async\.c[ag]\.")

    @property
    def narrow_loads(self) -> int:
        """Scalar 16-bit global loads inside innermost loops."""
        return sum(
            len(re.findall(r"ld\.global(?:\.[a-z]\w*)*\.[busf]16\b", loop)) for loop in innermost_loops(self.ptx)
        )

    @property
    def waiting_loads(self) -> int:
        """Wide global loads into registers inside innermost loops that also multiply matrices: nothing hides them."""
        matrix = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
        loops = (loop for loop in innermost_loops(self.ptx) if re.search(matrix, loop))
        return sum(len(re.findall(_WIDE.format("ld"), loop)) for loop in loops)

    @property
    def nan_eaters(self) -> int:
        """fp32 maxima that return the other operand for a NaN: `max.f32`, which `max.NaN.f32` and a select are not."""
        return self.count(r"\bmax(?:\.ftz)?(?:\.xorsign\.abs)?\.f32")

    def sass(self) -> str:
        """The machine code."""
        return _cuobjdump(self.cubin, "-sass")


def compile_for(source: Source, arch: int) -> Facts:
    """Compile for compute capability `arch` (80 is 8.0); pointers are taken as 16-byte aligned, as PyTorch's are.

    Raises RuntimeError in a process that interprets Triton.
    """
    if not isinstance(source.kernel, triton.JITFunction):
        raise RuntimeError("Triton interprets in this process: compile in one without TRITON_INTERPRET set")
    names = source.kernel.arg_names
    signature = {name: source.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if signature[name] == "constexpr" and name not in source.constants]
    if missing:
        raise ValueError(f"{source.name}: neither a type nor a value for {', '.join(missing)}")
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {name: source.constants[name] for name in names if signature[name] == "constexpr"}
    built = triton.compile(
        ASTSource(fn=source.kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": source.num_warps, "num_stages": source.num_stages},
    )
    usage = _resource_usage(built.asm["cubin"])
    rows = [int(m) for m in re.findall(r"= tt\.dot .*-> tensor<(\d+)x\d+x", built.asm["ttir"])]
    return Facts(
        usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared, built.asm["ptx"],
        len(rows), min(rows, default=0), built.asm["cubin"],
    )  # fmt: skip


def innermost_loops(ptx: str) -> list[str]:
    """The text of each loop of a kernel that holds no other loop: from a label to the last branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.M)}
    ends: dict[int, int] = {}
    for branch in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+)", ptx):
        start = labels.get(branch[1], len(ptx))
        if start < branch.start():
            ends[start] = max(ends.get(start, 0), branch.end())
    spans = sorted(ends.items())
    return [ptx[a:b] for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]


def _resource_usage(cubin: bytes) -> dict[str, int]:
    told = _cuobjdump(cubin, "-res-usage")
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told))
    if len(found) != 3:
        raise RuntimeError(f"cuobjdump told no resource usage: {told!r}")
    return {key: int(value) for key, value in found.items()}


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _own_text() -> str:
    """What decides the facts besides the kernel: this file."""
    return Path(__file__).read_text()
