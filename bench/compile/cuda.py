"""Compiles the CUDA C++ kernels of the convs and of NovoGrad with nvcc, for each architecture, and checks the result.

`python -m bench compile --cuda` prints the registers and instructions of each kernel. It fails if a kernel spills
registers, does not use tensor cores, asynchronous copies or 16-byte loads where it should, waits between the products
of one step, does not wait for the previous launch where it should, or differs from
bench/compiled/nvcc-VERSION.json.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from jasper_fast.bench.compile import cuda_shapes
from jasper_fast.bench.compile.table import Table
from jasper_fast.bench.harness import paths
from jasper_fast.kernels import files

ARCHS = ("75", "80", "86", "89", "90a", "100", "120")
QUICK = ("75", "80", "90a")  # one architecture for each variant of the kernels' inner loop
INSTRUCTIONS = {
    "HGMMA": "wgmma", "HMMA": "mma_sync", "LDSM": "ldmatrix", "LDGSTS": "cp_async", "UBLKCP": "bulk_copies",
    "ACQBULK": "grid_waits", "STL": "local_stores", "LDL": "local_loads", "LDG.128": "wide_loads",
}  # fmt: skip
FACTS = ("registers", "spilled", "stack", *INSTRUCTIONS.values(), "waits")
TABLE = Table(
    compiler="nvcc",
    key=("arch", "kernel"),
    name="sm_{} {}",
    facts=FACTS,
    shown={fact: fact for fact in FACTS},
    order=lambda key: (ARCHS.index(key[0]), key[1]),
)
SOURCES = tuple(paths.BENCH.parent / "csrc" / "cuda" / name for name in ("conv1d.cu", "novograd.cu"))
WANTED = {  # instructions that a kernel must have, by the first word of its name
    "conv_90": ("wgmma", "bulk_copies", "cp_async"), "wgrad_90": ("wgmma", "cp_async"),
    "conv_80": ("mma_sync", "ldmatrix", "cp_async"), "wgrad_80": ("mma_sync", "ldmatrix", "cp_async"),
    "conv_75": ("mma_sync", "ldmatrix"), "wgrad_75": ("mma_sync", "ldmatrix"),
    "novograd": ("wide_loads",),
}  # fmt: skip
_KERNEL = re.compile(r"jf::(conv|novograd)::(\w+?)(?:_kernel)?(?:<(.*)>)?\(")
_MODES = {"0": "plain", "1": "stats", "2": "norm", "3": "log-softmax"}
_DTYPES = {"__half": "fp16", "__nv_bfloat16": "bf16", "float": "fp32"}
_PTXAS = re.compile(  # what `ptxas -v` prints for each kernel
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
    re.DOTALL,
)


def compile_for(nvcc: str, arch: str, source: Path, folder: Path) -> list[dict]:
    """Returns one row of facts per kernel of `source`, except kernels whose body is empty on `arch`."""
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    done = subprocess.run(
        [nvcc, "-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o",
         cubin, source],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"nvcc failed for sm_{arch}:\n{done.stderr.strip()[-2000:]}")
    if serial := re.search(r".*wgmma.*serializ.*", done.stderr):
        raise SystemExit(f"sm_{arch}: {serial.group(0).strip()}")
    used = {
        name: {"stack": int(stack), "spilled": int(spilled), "registers": int(registers)}
        for name, stack, spilled, registers in _PTXAS.findall(done.stderr)
    }
    rows = []
    for symbol, code in _functions(cubin).items():
        counts = Counter(INSTRUCTIONS[word] for word in code if word in INSTRUCTIONS)
        name = describe(subprocess.check_output(["c++filt", symbol], text=True).strip())
        if name is None or (name.startswith(("conv_", "wgrad_")) and not (counts["wgmma"] or counts["mma_sync"])):
            continue  # the body is empty, because the kernel is for another architecture
        # Waits between the products of one step mean that the compiler serialised them.
        products = itertools.pairwise(i for i, word in enumerate(code) if word == "HGMMA")
        counts["waits"] = sum("DRAIN" in code[a:b] for a, b in products)
        rows.append({"arch": arch, "kernel": name} | dict.fromkeys(FACTS, 0) | used[symbol] | counts)
    return rows


def describe(name: str) -> str | None:
    """Returns a readable name for a demangled kernel, such as "conv_90 fp16 stats 216", or None for other functions.

    "dgrad" in the name means that the kernel computes the gradient of x, with transposed weights.
    """
    found = _KERNEL.search(name)
    if found is None:
        return None
    op, kernel, given = found.groups(default="")
    words = [_DTYPES.get(word, re.sub(r"\((?:int|bool)\)", "", word)) for word in re.split(r",\s*", given) if word]
    if kernel.startswith("conv_"):
        dtype, mode, block, transposed = words
        words = [dtype, _MODES[mode], block, *(["dgrad"] if transposed in ("1", "true") else [])]
    return " ".join([*([op] if op != "conv" else []), kernel, *words])


def _functions(cubin: Path) -> dict[str, list[str]]:
    """Returns the opcodes of each kernel, in order, by symbol."""
    listing = subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    code: list[str] = []
    for line in listing.splitlines():
        if m := re.match(r"\.section\s+\.text\.(\w+)", line.strip()):
            code = found.setdefault(m.group(1), [])
        elif m := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)([.\w]*)\s*([^;]*)", line):
            opcode, rest = m.group(1), m.group(2) + m.group(3)
            opcode = "LDG.128" if opcode == "LDG" and ".128" in rest else opcode
            code.append("DRAIN" if opcode == "WARPGROUP" and "DEPBAR" in rest and "0x0" in rest else opcode)
    return found


def _tool(name: str) -> str:
    """Returns the path of a tool of the CUDA toolkit, or of the copy that Triton contains."""
    triton = importlib.util.find_spec("triton")
    bundled = [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton else []
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *bundled]))
    if found is None:
        raise SystemExit(f"{name} is not found; install the CUDA toolkit or Triton, which both contain it")
    return found


def complaints(row: dict) -> list[str]:
    """Returns the faults of a kernel, one line each."""
    found, kernel = [], row["kernel"]
    if row["spilled"] or row["stack"] or row["local_loads"] or row["local_stores"]:
        found.append(f"{row['spilled']} bytes spilled, {row['stack']} bytes of stack per thread")
    if row["waits"]:
        found.append(f"{row['waits']} waits between products of one step")
    found += [f"no {name} instruction" for name in WANTED.get(kernel.split()[0], ()) if not row[name]]
    chained = kernel.startswith("conv_") and not {"stats", "norm", "dgrad"} & set(kernel.split())
    if chained and int(row["arch"].rstrip("a")) >= 90 and not row["grid_waits"]:
        found.append("no wait for the previous launch, although the two launches may overlap")
    return found


def main(args: argparse.Namespace) -> int:
    """Compiles the kernels, prints and checks them; returns the exit status.

    The exit status is that of `Table.judge`, or 2 without nvcc.
    """
    nvcc = runpy.run_path(str(paths.BENCH.parent / "csrc" / "build.py"))["find_nvcc"]()
    if nvcc is None:
        print("nvcc is not found; put it on PATH or set CUDA_HOME", file=sys.stderr)
        return 2
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True)).group(1)
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    archs = [a for a in (QUICK if args.quick else ARCHS) if f"compute_{a.rstrip('a')}" in known]
    started, digest = time.monotonic(), hashlib.sha256(version.encode())
    for path in (*sorted(SOURCES[0].parent.glob("*.cuh")), *SOURCES, Path(__file__)):
        digest.update(path.read_bytes())
    folder = paths.BUILD / "compile" / f"nvcc-{digest.hexdigest()[:16]}"

    def rows_of(arch: str) -> list[dict]:
        kept = folder / f"sm_{arch}.json"
        if args.no_cache or not kept.exists():
            files.write(kept, json.dumps([row for s in SOURCES for row in compile_for(nvcc, arch, s, folder)]))
        return json.loads(kept.read_text())

    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        rows = [row for found in pool.map(rows_of, archs) for row in sorted(found, key=lambda row: row["kernel"])]
    if args.shapes:
        cuda_shapes.show(rows)
    found = TABLE.by_key(rows)
    broken = [f"{TABLE.label(key)}: {why}" for key, row in found.items() for why in complaints(row)]
    return TABLE.judge(args, version, found, broken, lambda key: key[0] in archs, time.monotonic() - started)
