"""Compiles every Triton kernel that dispatch can choose, for each architecture, without a GPU, and checks the result.

`python -m bench compile` prints the registers, shared memory and instructions of each kernel. It fails if a kernel
breaks one of RULES (no spilled registers, tensor cores where possible, and so on) or differs from
bench/compiled/triton-VERSION.json.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jasper_fast.bench.compile import cuda
from jasper_fast.bench.compile.table import Table
from jasper_fast.bench.harness import options, paths
from jasper_fast.bench.harness.console import console
from jasper_fast.kernels import files
from jasper_fast.kernels.tables import SHARED_LIMIT
from jasper_fast.options import option

ARCHITECTURES = (80, 86, 89, 90, 100)
DTYPES = ("float32", "float16", "bfloat16")
TABLE = Table(
    compiler="Triton",
    key=("arch", "dtype", "kernel", "tile", "layer"),
    name="sm_{} {} {} [{}] {}",
    facts=(
        "registers", "spilled", "shared", "dots", "dot_rows", "wgmma", "mma_sync", "tcgen05", "tma", "cp_async",
        "wide_loads", "wide_stores", "narrow_loads", "waiting_loads", "nan_eaters",
    ),
    shown={
        "registers": "regs", "spilled": "spill", "shared": "shared", "wgmma": "wgmma", "mma_sync": "mma",
        "tcgen05": "tcgen05", "tma": "TMA", "cp_async": "cp.async", "narrow_loads": "16-bit",
    },
    order=lambda key: (key[0], DTYPES.index(key[1]), *key[2:]),
)  # fmt: skip
COLD = ("merge|pack", "they process little data, so that spills and narrow accesses cost little")  # see Rule.exempt


@dataclass(frozen=True)
class Job:
    """A kernel to compile, and the key of its row in the table."""

    arch: int
    dtype: str
    kernel: str
    layer: str
    source: object  # an aot.Source; `aot` is not imported here, because --help would then import Triton

    @property
    def tile(self) -> str:
        """The block sizes and the numbers of warps (w) and stages (s), such as "C64 T128 w4 s3"."""
        s = self.source
        blocks = (f"{k.removeprefix('BLOCK_')}{v}" for k, v in s.constants.items() if k.startswith("BLOCK_"))
        return " ".join([*blocks, f"w{s.options['num_warps']}", f"s{s.options['num_stages']}"])

    @property
    def key(self) -> tuple:
        """The key of the row in the tables."""
        return self.arch, self.dtype, self.kernel, self.tile, self.layer

    @functools.cached_property
    def digest(self) -> str:
        """The key of the compiled kernel in the cache."""
        return self.source.digest(self.arch)


# ------------------------------------------------------------------ what there is to compile


def jobs(archs: Iterable[int], dtypes: Iterable[str]) -> Iterator[Job]:
    """Yields a job for each distinct launch that `recorded` lists.

    If several layers make the same launch, the job has the name of the first.
    """
    from jasper_fast.bench.compile.launches import recorded

    for arch in archs:
        for dtype in dtypes:
            seen: set = set()
            for kernel, layer, source in recorded(arch, dtype):
                job = Job(arch, dtype, kernel, layer, source)
                if (kernel, source) in seen:
                    continue
                if job.key in seen:
                    raise ValueError(
                        f"two different launches have the key {TABLE.label(job.key)}; rename the kernel or layer of one"
                    )
                seen |= {(kernel, source), job.key}
                yield job


# ------------------------------------------------------------------ compiling


def compiled(todo: list[Job], processes: int, cache: Path | None, show: Callable[[str], None]) -> dict[str, dict]:
    """Returns the facts of every job by digest.

    Jobs that are not in the cache are compiled by `processes` processes. `show` gets the progress as text.
    """
    known = json.loads(cache.read_text()) if cache is not None and cache.exists() else {}
    missing = {job.digest: job for job in todo if job.digest not in known}
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        asked = {pool.submit(_facts, job.arch, job.dtype, job.key, digest): digest for digest, job in missing.items()}
        try:
            for count, done in enumerate(concurrent.futures.as_completed(asked), 1):
                known[asked[done]] = done.result()
                show(f"compiled {count} of {len(asked)}")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if cache is not None:
                files.write(cache, json.dumps(known))
    return {job.digest: known[job.digest] for job in todo}


@functools.cache
def _by_key(arch: int, dtype: str) -> dict[tuple, Job]:
    return {job.key: job for job in jobs([arch], [dtype])}


def _facts(arch: int, dtype: str, key: tuple, digest: str) -> dict:
    from jasper_fast.kernels import aot

    job = _by_key(arch, dtype).get(key)
    if job is None or job.digest != digest:
        raise RuntimeError(f"{TABLE.label(key)} changed on disk while kernels were compiled; run the command again")
    facts = aot.compile_for(job.source, arch)
    return {name: getattr(facts, name) for name in TABLE.facts}


# ------------------------------------------------------------------ the rules


@dataclass(frozen=True)
class Rule:
    """A rule for kernels. `broken(job, facts)` returns a complaint, or None.

    `exempt` has regular expressions for the rows to which the rule does not apply, with the reasons.
    """

    name: str
    broken: Callable[[Job, dict], str | None]
    exempt: tuple[tuple[str, str], ...] = ()

    def complaint(self, job: Job, facts: dict) -> str | None:
        """Returns the complaint of the rule about a row, or None."""
        exempt = any(re.search(pattern, TABLE.label(job.key)) for pattern, _ in self.exempt)
        return None if exempt else self.broken(job, facts)


def _none(fact: str, what: str) -> Callable[[Job, dict], str | None]:
    """Returns the function `broken` of a rule by which `fact` must be 0. Its complaint is the number and `what`."""
    return lambda job, facts: f"{facts[fact]} {what}" if facts[fact] else None


def _shared(job: Job, facts: dict) -> str | None:
    limit = SHARED_LIMIT.get(f"sm_{job.arch}", SHARED_LIMIT["sm_90"])
    said = f"{facts['shared']} bytes of shared memory per block, but the architecture has {limit}"
    return said if facts["shared"] > limit else None


def _exact(job: Job) -> bool:
    """Whether the kernel computes its products in exact fp32, for which tensor cores cannot be used."""
    return job.dtype == "float32" and job.source.constants.get("PRECISION") == "ieee"


def _exact_products(job: Job, facts: dict) -> str | None:
    rounded = sum(facts[unit] for unit in ("wgmma", "mma_sync", "tcgen05"))
    return f"{rounded} tensor-core instructions, which round fp32 to TF32" if _exact(job) and rounded else None


def _tensor_cores(job: Job, facts: dict) -> str | None:
    if not facts["dots"] or _exact(job):
        return None
    unit = {90: "wgmma", 100: "tcgen05"}.get(job.arch, "mma_sync")
    if job.dtype == "float32" and facts["dot_rows"] < 64:
        unit = "mma_sync"  # some fp32 tiles have fewer than the 64 rows of a wgmma or tcgen05 instruction
    if facts[unit] < facts["dots"]:
        return f"{facts['dots']} matrix products in the source, but only {facts[unit]} {unit} instructions"
    others = facts["mma_sync"] if unit != "mma_sync" else 0
    return f"{others} mma.sync instructions, where only {unit} is expected" if others else None


def _asynchronous(job: Job, facts: dict) -> str | None:
    if job.dtype == "float32" or not facts["dots"]:
        return None
    if job.arch >= 90 and not job.layer.endswith("odd T"):
        return None if facts["tma"] else "no TMA: no operand of a product is loaded by a tensor descriptor"
    if not facts["cp_async"]:
        return "no cp.async: all operands of products are loaded through registers"
    waiting = facts["waiting_loads"]
    return f"{waiting} wide loads into registers in a loop of products, where cp.async is expected" if waiting else None


def _wide(job: Job, facts: dict) -> str | None:
    if not facts["dots"] and not facts["wide_loads"]:
        return "no 16-byte loads"
    return None if facts["wide_stores"] else "no 16-byte stores"


RULES = (
    Rule("no spill", _none("spilled", "bytes of stack and local memory per thread"), (COLD,)),
    Rule("shared memory fits", _shared),
    Rule("tensor cores", _tensor_cores),
    Rule("exact fp32", _exact_products),
    Rule("asynchronous copies", _asynchronous),
    Rule(
        "no 16-bit scalar loads",
        _none("narrow_loads", "scalar 16-bit loads in an innermost loop"),
        ((" float32 ", "its elements have 32 bits"),),
    ),
    Rule(
        "16-byte accesses",
        _wide,
        (  # kernels that are exempt, and why
            COLD,
            ("bn_relu_dropout (stats|backward_reduce)", "they write one number per channel"),
            ("conv1d last", "rows of 29 symbols are not aligned"),
            ("conv1d wgrad direct", "the elements of one tap of dw are not contiguous"),
            ("ctc", "a program works frame by frame, and rows of 29 symbols are not aligned"),
            ("novograd squares", "it writes one number per program"),
            ("depthwise wgrad", "it writes one number per channel and tap"),
            ("prefix beam", "rows of 29 symbols are not aligned"),
            ("all unaligned", "slices of a buffer are not aligned"),
        ),
    ),
    Rule(
        "a NaN passes",
        _none("nan_eaters", "max.f32 instructions, which drop a NaN"),
        (("conv1d last", "the maximum in log-softmax drops a NaN, but the sum of exponentials keeps it"),),
    ),
)


# ------------------------------------------------------------------ the command


def _some(known: dict[str, object]) -> Callable[[str], tuple]:
    """Returns a function that reads names separated by commas, and returns their values."""

    def read(given: str) -> tuple:
        names = given.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(known)}")
        return tuple(known[name] for name in names)

    return read


OPTIONS = (
    option(
        "--arch",
        type=_some({str(arch): arch for arch in ARCHITECTURES}),
        default=ARCHITECTURES,
        metavar="80,90",
        help=f"architectures to compile for, separated by commas (default: {','.join(map(str, ARCHITECTURES))})",
    ),
    option(
        "--dtype",
        type=_some(dict(zip(("fp32", "fp16", "bf16"), DTYPES)) | {dtype: dtype for dtype in DTYPES}),
        default=DTYPES,
        metavar="fp16,bf16",
        help="dtypes to compile for, separated by commas (default: fp32,fp16,bf16)",
    ),
    option(
        "--cuda",
        action="store_true",
        help="compile the convs and NovoGrad in CUDA C++ with nvcc, for sm_75 to sm_120, instead of the Triton "
        "kernels; --arch, --dtype and --kernel then have no effect",
    ),
    option("--shapes", action="store_true", help="with --cuda: also print the calculated cost of each conv of Jasper"),
    option(
        "--quick",
        action="store_true",
        help="compile fp16 for all architectures, and other dtypes only for sm_90; with --cuda only sm_75, 80 and 90a",
    ),
    option(
        "--kernel", type=options.pattern, default="", metavar="REGEX", help="compile only kernels whose name matches"
    ),
    option(
        "--update", action="store_true", help="replace the rows of the committed table; check the differences first"
    ),
    option("--table", type=Path, help="the table to compare with (default: the one of this version in bench/compiled)"),
    option(
        "--processes", type=options.count, default=2, help="number of processes that compile in parallel (default: 2)"
    ),
    option("--no-cache", action="store_true", help="compile all kernels again, without the cache"),
    option("--out", type=Path, metavar="DIR", help="folder for a JSON file of the rows and the failures"),
)


def main(args: argparse.Namespace) -> int:
    """Compiles the kernels, prints and checks them; returns the exit status.

    The exit status is that of `Table.judge`, or with `--cuda` that of `cuda.main`.
    """
    if args.update and args.table is None:
        paths.checkout("--update without --table")
    if args.out is not None:
        options.writable(args.out)
    if args.cuda:
        return cuda.main(args)
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton reads this when kernels are defined
        return subprocess.call(
            [sys.executable, "-m", "jasper_fast.bench", *sys.argv[sys.argv.index("compile") :]],
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        )
    import triton

    started, version = time.monotonic(), triton.__version__

    def wanted(key: tuple) -> bool:
        arch, dtype, kernel = key[:3]
        named = arch in args.arch and dtype in args.dtype and re.search(args.kernel, kernel) is not None
        return named and (not args.quick or dtype == "float16" or arch == 90)

    chosen = [job for job in jobs(args.arch, args.dtype) if wanted(job.key)]
    if not chosen:
        raise SystemExit("no kernel matches the options --arch, --dtype, --kernel and --quick")
    cache = None if args.no_cache else paths.BUILD / "compile" / f"triton-{version}.json"
    with console.status("") as status:
        facts = compiled(chosen, args.processes, cache, lambda text: status.update(f"Triton {version}: {text}"))
    found = {job.key: dict(zip(TABLE.key, job.key, strict=True)) | facts[job.digest] for job in chosen}
    broken = [
        f"{TABLE.label(job.key)}: {rule.name}: {why}"
        for job in chosen
        for rule in RULES
        if (why := rule.complaint(job, facts[job.digest]))
    ]
    return TABLE.judge(args, version, found, broken, wanted, time.monotonic() - started)
