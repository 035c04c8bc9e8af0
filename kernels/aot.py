"""Ahead-of-time compilation of Triton kernels for a GPU architecture, with no GPU, and the facts it leaves.

Needs a process without TRITON_INTERPRET: the switch is read when a kernel is defined.
"""

from __future__ import annotations

import os
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


@dataclass(frozen=True)
class Facts:
    """What a kernel uses: registers a thread, bytes of stack and local memory (spills), shared bytes, its PTX."""

    registers: int
    spilled: int
    shared: int
    ptx: str

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
    return Facts(usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared, built.asm["ptx"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told))
    if len(found) != 3:
        raise RuntimeError(f"cuobjdump told no resource usage: {told!r}")
    return {key: int(value) for key, value in found.items()}
