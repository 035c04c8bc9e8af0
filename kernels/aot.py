"""Compiles Triton kernels for a GPU architecture without a GPU, and reports what each compiled kernel uses.

Compiling needs a process without TRITON_INTERPRET, because Triton reads that switch when a kernel is defined.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import create_function_from_signature

from jasper_fast.kernels.launch import Launch

ARCHITECTURES = (80, 86, 89, 90, 100)
_WIDE = r"{}\.global\S*(?:\.v4\.[bfu]32|\.v2\.[bfu]64|\.v8\.[bfu]32|\.v4\.[bfu]64)"


@dataclass(frozen=True, eq=False)
class Source:
    """A kernel as Triton's launcher compiles it for one launch.

    signature: types by argument ("*fp16", "i32", "constexpr", ...); constexprs and attrs (alignment): values by the
    position of the argument; options: "num_warps", "num_stages" and any other option that the launch gave the compiler.
    """

    kernel: triton.JITFunction
    signature: dict[str, object]
    constexprs: dict[tuple[int, ...], object]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, object]

    @property
    def constants(self) -> dict[str, object]:
        """Values of the constexprs by name."""
        return {self.kernel.arg_names[place[0]]: value for place, value in self.constexprs.items() if len(place) == 1}

    def digest(self, arch: int) -> str:
        """A hash, equal for sources that compile to the same code on `arch`."""
        launch = (self.signature, self.constexprs, self.attrs, self.options)
        parts = (self.kernel.cache_key, *(sorted(map(repr, part.items())) for part in launch), arch)
        return hashlib.sha256(repr((*parts, triton.__version__, _own_text())).encode()).hexdigest()[:32]


def source(launch: Launch, arch: int) -> Source:
    """What Triton's own launcher would compile for `launch` on compute capability `arch` (80 is 8.0). The types and the
    alignment of the arguments come from their values, so launches that share a compiled kernel have equal sources.

    Raises TypeError for a kernel that @triton.jit did not make (an autotuner has launches of its own) and for arguments
    that are not the kernel's; KeyError for a keyword that neither the kernel nor the compiler knows.
    """
    kernel, backend, binder = _binder(launch.kernel, arch)
    bound, specialization, options = binder(*launch.args, **launch.meta)
    key = (launch.kernel, arch, repr((specialization, options)))
    if key not in _described:
        parsed, *types = kernel._pack_args(backend, launch.meta, bound, specialization, options)
        warps = {"num_warps": parsed.num_warps, "num_stages": parsed.num_stages}
        _described[key] = Source(kernel, *types, warps | options)
    return _described[key]


_described: dict[tuple, Source] = {}


@functools.cache
def _binder(kernel: object, arch: int) -> tuple[triton.JITFunction, object, Callable]:
    if isinstance(kernel, InterpretedFunction):  # it is launched with the same arguments
        kernel = triton.JITFunction(kernel.fn, **kernel.kwargs)
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{kernel} is not a kernel made by @triton.jit: its launches cannot be recorded")
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return kernel, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel uses: registers per thread, bytes of stack, spills and shared memory; and its code.

    dots: number of matrix products in the source; dot_rows: rows of the smallest product (0 where there is none).
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
        """Wide global loads into registers inside innermost loops that also multiply matrices: nothing hides their
        latency."""
        matrix = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
        loops = (loop for loop in innermost_loops(self.ptx) if re.search(matrix, loop))
        return sum(len(re.findall(_WIDE.format("ld"), loop)) for loop in loops)

    @property
    def nan_eaters(self) -> int:
        """fp32 maxima that drop a NaN and return the other operand: `max.f32`, but not `max.NaN.f32` or a select."""
        return self.count(r"\bmax(?:\.ftz)?(?:\.xorsign\.abs)?\.f32")

    def sass(self) -> str:
        """The machine code."""
        return _cuobjdump(self.cubin, "-sass")


def compile_for(source: Source, arch: int) -> Facts:
    """Compile for compute capability `arch`; raises RuntimeError in a process that interprets Triton."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("this process runs Triton's interpreter: compile in a process without TRITON_INTERPRET")
    built = triton.compile(
        ASTSource(source.kernel, source.signature, source.constexprs, source.attrs),
        target=GPUTarget("cuda", arch, 32),
        options=source.options,
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
        raise RuntimeError(f"cuobjdump reported no resource usage: {told!r}")
    return {key: int(value) for key, value in found.items()}


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def _own_text() -> str:
    """The source of this file, which decides the facts together with the kernel."""
    return Path(__file__).read_text()
