"""What this machine offers: versions, processors, which backends run, and how to get those that do not."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

# package, what it is for, how to get it where it is missing
_PACKAGES = (
    ("torch", "everything", "pip install torch"),
    ("triton", "the triton backend", "pip install 'triton>=3.6' (Linux x86-64)"),
    ("numpy", "audio", "pip install numpy"),
    ("soundfile", "reading audio", "pip install soundfile"),
    ("soxr", "resampling, speed perturbation", "pip install soxr"),
    ("jiwer", "error rates", "pip install jiwer"),
    ("anyascii", "text normalisation", "pip install anyascii"),
    ("safetensors", "golden vectors", "pip install safetensors"),
    ("tensorboard", "curves of a training run", "pip install tensorboard"),
    ("espeakng-loader", "the demo's voices", "pip install 'jasper-fast[demo]'"),
    ("cupy-cuda13x", "tools on CUDA", "pip install 'jasper-fast[cuda]'"),
    ("flashlight-text", "beam search", "pip install 'jasper-fast[lm]'"),
    ("kenlm", "n-gram models", "pip install 'jasper-fast[lm]'"),
)
_OPTIONAL = {"espeakng-loader", "cupy-cuda13x", "flashlight-text", "kenlm", "tensorboard", "triton"}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native_isa() -> str | None:
    """The instruction set that the CPU library runs, None where there is no library."""
    from jasper_fast.kernels import native

    try:
        return str(native.cpu().isa())
    except native.Missing:
        return None


def _backends() -> dict[str, dict[str, Any]]:
    import torch

    from jasper_fast.dispatch import backends

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = {}
    for name in backends.BACKENDS:
        if name == "auto":
            continue
        on = [device for device in devices if backends.is_available(name, device)]
        missing = None
        if not on:
            try:
                backends.require(name)
            except backends.BackendMissing as error:
                missing = str(error).removeprefix(f"backend {name!r}: ")
        found[name] = {"available": bool(on), "devices": on, "missing": missing}
    return found


def _verdicts(gpus: int) -> list[dict[str, Any]]:
    """What the self-check found on each device, as far as it has run: nothing is checked here."""
    import torch

    from jasper_fast.dispatch import verdicts

    devices = [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    return [{"device": str(d), **vars(v)} for d in devices for v in verdicts.read(d).values()]


def collect() -> dict[str, Any]:
    """The machine as a dict of plain values: what ``jasper-fast info --json`` prints."""
    import torch

    from jasper_fast import __version__
    from jasper_fast.dispatch import choose
    from jasper_fast.kernels import native

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "multiprocessors": p.multi_processor_count,
            }
        )
    packages = {}
    for name, purpose, how in _PACKAGES:
        version = _version(name)
        packages[name] = {"version": version, "for": purpose, "optional": name in _OPTIONAL}
        if version is None:
            packages[name]["get"] = how
    found = _backends()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what is missing is listed in full
        auto = {device: choose.resolve("auto", device) for device in (["cpu", "cuda"] if gpus else ["cpu"])}
    return {
        "jasper_fast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": {
            "name": native.cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "native_isa": _native_isa(),
        },
        "cuda": {"torch_built_for": torch.version.cuda, "available": torch.cuda.is_available(), "gpus": gpus},
        "auto": auto,
        "verdicts": _verdicts(len(gpus)),
        "backends": found,
        "packages": packages,
    }


def render(report: dict[str, Any], console: Any) -> None:
    """Prints ``collect()``'s report on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    cpu, cuda = report["cpu"], report["cuda"]
    console.print(f"[bold]jasper_fast {report['jasper_fast']}[/bold]  Python {report['python']}, {report['platform']}")
    native = f"native kernels run {cpu['native_isa']}" if cpu["native_isa"] else "native kernels not built"
    memory = f", {cpu['memory_gib']} GiB" if cpu["memory_gib"] else ""
    console.print(
        f"CPU  {escape(cpu['name'])}: {cpu['cores']} cores, {cpu['threads']} threads{memory}; "
        f"torch runs {cpu['torch_isa']}, {native}"
    )
    for i, gpu in enumerate(cuda["gpus"]):
        console.print(
            f"GPU {i}  {escape(gpu['name'])}: sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors (torch for CUDA {cuda['torch_built_for']})"
        )
    if not cuda["gpus"]:
        built = f"built for CUDA {cuda['torch_built_for']}" if cuda["torch_built_for"] else "a CPU build"
        console.print(f"GPU  none that torch sees (torch is {built})")
    table = Table(box=None, pad_edge=False)
    for column in ("backend", "runs on", "otherwise"):
        table.add_column(column)
    for name, backend in report["backends"].items():
        chosen = [device for device, face in report["auto"].items() if face == name]
        on = ", ".join(f"{d} (auto)" if d in chosen else d for d in backend["devices"])
        table.add_row(name, on or "-", escape(backend["missing"] or ""))
    console.print(table)
    for verdict in report["verdicts"]:
        what = f"{verdict['op']} ({verdict['face']}, {verdict['dtype']}) on {verdict['device']}"
        failure = f": {verdict['failure']}" if verdict["failure"] else ""
        found = f"{verdict['status']}, {verdict['checked']} checks passed{', quick' if verdict['quick'] else ''}"
        console.print(f"self-check of {escape(what)}: {found}{escape(failure)}")
    if not report["verdicts"]:
        console.print("self-check: not run with these versions; `jasper-fast selfcheck` runs it")
    table = Table(box=None, pad_edge=False)
    for column in ("package", "version", "for", "how to get it"):
        table.add_column(column)
    for name, package in report["packages"].items():
        need = "" if package["version"] else escape(package["get"])
        absent = "- (optional)" if package["optional"] else "missing"
        table.add_row(name, package["version"] or absent, package["for"], need)
    console.print(table)
