"""Compiles Triton kernels for a GPU architecture without a GPU, and reports which resources each compiled kernel uses.

Compiling needs a process without TRITON_INTERPRET, because Triton reads that switch when a kernel is defined.
"""

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

_OWN_TEXT = Path(__file__).read_text()  # the facts depend on this file as well as on the kernel
_WIDE = r"{}\.global\S*(?:\.v4\.[bfu]32|\.v2\.[bfu]64|\.v8\.[bfu]32|\.v4\.[bfu]64)"


@dataclass(frozen=True, eq=False)
class Source:
    """What Triton's launcher passes to the compiler for one launch of a kernel.

    signature: argument types by name ("*fp16", "i32", "constexpr", ...). constexprs: values by the argument's position.
    attrs: alignment by the argument's position. options: "num_warps", "num_stages" and other options of the compiler.
    """

    kernel: triton.JITFunction
    signature: dict[str, object]
    constexprs: dict[tuple[int, ...], object]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, object]

    @property
    def constants(self) -> dict[str, object]:
        """The values of the constexprs by name."""
        return {self.kernel.arg_names[place[0]]: value for place, value in self.constexprs.items() if len(place) == 1}

    def digest(self, arch: int) -> str:
        """Returns a hash of everything that determines the compiled code and the facts about it on `arch`."""
        launch = (self.signature, self.constexprs, self.attrs, self.options)
        parts = (self.kernel.cache_key, *(sorted(map(repr, part.items())) for part in launch), arch)
        return hashlib.sha256(repr((*parts, triton.__version__, _OWN_TEXT)).encode()).hexdigest()[:32]


def source(launch: Launch, arch: int) -> Source:
    """Returns what Triton's own launcher would compile for `launch` on compute capability `arch` (80 is 8.0).

    The types and the alignment of the arguments come from their values, so launches that share a compiled kernel have
    the same source. Raises TypeError for a kernel that @triton.jit did not make, such as an autotuner, and for
    arguments that do not fit the kernel, KeyError for a keyword that neither kernel nor compiler knows, and
    AssertionError for an option whose value Triton rejects.
    """
    kernel, backend, binder = _binder(launch.kernel, arch)
    bound, specialization, options = binder(*launch.args, **launch.meta)
    key = (launch.kernel, arch, repr((specialization, options)))
    if key not in _described:
        parsed, *types = kernel._pack_args(backend, launch.meta, bound, specialization, options)
        _described[key] = Source(
            kernel, *types, {"num_warps": parsed.num_warps, "num_stages": parsed.num_stages} | options
        )
    return _described[key]


_described: dict[tuple, Source] = {}


@functools.cache
def _binder(kernel: object, arch: int) -> tuple[triton.JITFunction, object, Callable]:
    if isinstance(kernel, InterpretedFunction):  # makes a kernel of the same function that can be compiled
        kernel = triton.JITFunction(kernel.fn, **kernel.kwargs)
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{kernel} is not a kernel made by @triton.jit, so its launches cannot be compiled here")
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return kernel, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


# What is counted in the PTX: a regular expression for each kind of instruction.
_COUNTED = {
    "wgmma": r"\bwgmma\.mma_async",  # warpgroup matrix instructions (sm_90)
    "mma_sync": r"\bmma\.sync",  # warp matrix instructions (sm_80 to sm_89, and small tiles on later architectures)
    "tcgen05": r"\btcgen05\.mma",  # tensor-memory matrix instructions (sm_100)
    "tma": r"cp\.async\.bulk\.tensor",  # bulk tensor copies, which use a descriptor
    "cp_async": r"cp\.async\.c[ag]\.",  # asynchronous copies of at most 16 bytes per thread into shared memory
    "wide_loads": _WIDE.format("ld"),  # global loads of at least 16 bytes per thread
    "wide_stores": _WIDE.format("st"),  # global stores of at least 16 bytes per thread
    # fp32 maxima that return the other operand for a NaN: `max.f32`, but not `max.NaN.f32`
    "nan_eaters": r"\bmax(?:\.ftz)?(?:\.xorsign\.abs)?\.f32",
}
_MATRIX = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"


@dataclass(frozen=True)
class Facts:
    """The resources that a compiled kernel uses, its code, and how often it contains some instructions.

    registers: per thread. spilled: bytes of stack and local memory per thread. shared: bytes of shared memory. dots:
    number of matrix products (`tt.dot`) in Triton's IR. dot_rows: the fewest rows of any product's result (0 without
    products). narrow_loads: scalar 16-bit global loads in innermost loops. waiting_loads: wide global loads into
    registers in innermost loops that also multiply matrices; nothing hides their latency. The other counts: see
    _COUNTED.
    """

    registers: int
    spilled: int
    shared: int
    dots: int
    dot_rows: int
    cubin: bytes
    narrow_loads: int
    waiting_loads: int
    wgmma: int
    mma_sync: int
    tcgen05: int
    tma: int
    cp_async: int
    wide_loads: int
    wide_stores: int
    nan_eaters: int

    def sass(self) -> str:
        """Returns the machine code as text."""
        return _cuobjdump(self.cubin, "-sass")


def compile_for(source: Source, arch: int) -> Facts:
    """Compiles `source` for compute capability `arch`. Raises RuntimeError in a process that interprets Triton."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("this process runs Triton's interpreter: compile in a process without TRITON_INTERPRET")
    built = triton.compile(
        ASTSource(source.kernel, source.signature, source.constexprs, source.attrs),
        target=GPUTarget("cuda", arch, 32),
        options=source.options,
    )
    cubin, ptx = built.asm["cubin"], built.asm["ptx"]
    usage, loops = _resource_usage(cubin), innermost_loops(ptx)
    rows = [int(m) for m in re.findall(r"= tt\.dot .*-> tensor<(\d+)x\d+x", built.asm["ttir"])]
    return Facts(
        usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared, len(rows), min(rows, default=0), cubin,
        narrow_loads=sum(len(re.findall(r"ld\.global(?:\.[a-z]\w*)*\.[busf]16\b", loop)) for loop in loops),
        waiting_loads=sum(len(re.findall(_WIDE.format("ld"), loop)) for loop in loops if re.search(_MATRIX, loop)),
        **{name: len(re.findall(pattern, ptx)) for name, pattern in _COUNTED.items()},
    )  # fmt: skip


def innermost_loops(ptx: str) -> list[str]:
    """Returns the text of each loop that contains no other loop, from its label to the last branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.M)}
    ends: dict[int, int] = {}
    for branch in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+)", ptx):
        start = labels.get(branch[1], len(ptx))
        if start < branch.start():
            ends[start] = max(ends.get(start, 0), branch.end())
    spans = sorted(ends.items())
    return [ptx[a:b] for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]


def _resource_usage(cubin: bytes) -> dict[str, int]:
    report = _cuobjdump(cubin, "-res-usage")
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    if len(found) != 3:
        raise RuntimeError(f"cuobjdump reported no resource usage: {report!r}")
    return {key: int(value) for key, value in found.items()}


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
