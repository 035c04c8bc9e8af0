"""`jasper-fast info`: show the machine, backends and versions, and how to install what is missing.

Shows the machine, the backends that run on it, the versions, and how to install what is missing.
"""

import argparse
import json
import os
import platform
import sys
import warnings
from importlib import metadata
from typing import Any

from jasper_fast.options import option

# package, its purpose, the extra that installs it ("": installed with jasper-fast)
_PACKAGES = (
    ("torch", "everything", ""),
    ("triton", "the triton backend, on Linux x86-64", ""),
    ("numpy", "audio", ""),
    ("soundfile", "reading audio", ""),
    ("soxr", "resampling, speed perturbation", ""),
    ("anyascii", "text normalisation", "train"),
    ("inflect", "numbers in words", "train"),
    ("jiwer", "error rates", "train"),
    ("rich", "progress and tables", "train"),
    ("tensorboard", "curves of a training run", "train"),
    ("espeakng-loader", "the demo's voices", "demo"),
    ("jinja2", "pages of results", "bench"),
    ("nvidia-ml-py", "a GPU's clocks", "bench"),
    ("onnx", "ONNX files", "export"),
    ("onnxscript", "ONNX files", "export"),
    ("onnxruntime", "checking ONNX files", "export"),
    ("flashlight-text", "beam search with a word language model", "lm"),
    ("ufal-kenlm", "n-gram language models", "lm"),
    ("safetensors", "safetensors files", "safetensors"),
    ("cupy-cuda13x", "CUDA kernels without a CUDA toolkit", "cuda"),
)


END = ""
OPTIONS = {
    "": [
        option("--json", action="store_true", help="print JSON"),
    ],
}


def run(arguments: argparse.Namespace) -> None:
    report = collect()
    print(json.dumps(report, indent=1) if arguments.json else render(report))


def _backends() -> dict[str, dict[str, Any]]:
    import torch

    from jasper_fast.dispatch import backends

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = {}
    for name in backends.BACKENDS[1:]:  # all but "auto"
        on, missing = [device for device in devices if backends.is_available(name, device)], None
        try:
            backends.require(name)
        except backends.BackendMissing as error:
            missing = str(error).removeprefix(f"backend {name!r}: ")
        found[name] = {"available": bool(on), "devices": on, "missing": missing}
    if "cuda" in devices:
        from jasper_fast.kernels.conv1d import cuda_launch

        found["cuda"]["way"] = cuda_launch.way()  # "library" or "NVRTC": where its kernels come from
    return found


def collect() -> dict[str, Any]:
    """Returns what ``jasper-fast info --json`` prints, as a dict of plain values."""
    import torch

    from jasper_fast import __version__
    from jasper_fast.dispatch import choose, tuned, verdicts
    from jasper_fast.kernels import native

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    gpus = [
        {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
        }
        for p in map(torch.cuda.get_device_properties, devices)
    ]
    packages = {}
    for name, purpose, extra in _PACKAGES:
        version = next((found.version for found in metadata.distributions(name=name)), None)
        packages[name] = {"version": version, "for": purpose, "optional": bool(extra) or name == "triton"}
        if version is None:
            packages[name]["get"] = f"pip install '{f'jasper-fast[{extra}]' if extra else name}'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the report lists missing packages anyway
        auto = {device: choose.resolve("auto", device) for device in (["cpu", "cuda"] if gpus else ["cpu"])}
    return {
        "jasper_fast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": {
            "name": native.cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "native_isa": str(native.cpu().isa()) if native.cpu_available() else None,
        },
        "cuda": {"torch_built_for": torch.version.cuda, "available": torch.cuda.is_available(), "gpus": gpus},
        "auto": auto,
        "verdicts": [
            {"device": str(d), **vars(verdict)}
            for d in devices or [torch.device("cpu")]
            for verdict in verdicts.read(d).values()
        ],
        "tuned": [
            {"device": str(d), "file": str(tuned.path(d)), "shapes": len({row.cell for row in tuned.read(d)})}
            for d in devices
        ],
        "backends": _backends(),
        "packages": packages,
    }


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(map(str.rstrip, lines))


def render(report: dict[str, Any]) -> str:
    """Formats the report of ``collect()`` as text."""
    cpu, cuda = report["cpu"], report["cuda"]
    native = f"native kernels run {cpu['native_isa']}" if cpu["native_isa"] else "native kernels not built"
    lines = [
        f"jasper_fast {report['jasper_fast']}  Python {report['python']}, {report['platform']}",
        f"CPU  {cpu['name']}: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['memory_gib']} GiB; torch "
        f"runs {cpu['torch_isa']}, {native}",
    ]
    lines += [
        f"GPU {i}  {gpu['name']}: sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB, "
        f"{gpu['multiprocessors']} multiprocessors (torch for CUDA {cuda['torch_built_for']})"
        for i, gpu in enumerate(cuda["gpus"])
    ]
    if not cuda["gpus"]:
        built = f"built for CUDA {cuda['torch_built_for']}" if cuda["torch_built_for"] else "a CPU build"
        lines.append(f"GPU  torch sees none (torch is {built})")
    rows = [("backend", "runs on", "otherwise")]
    for name, backend in report["backends"].items():
        on = ", ".join(f"{d} (auto)" if report["auto"].get(d) == name else d for d in backend["devices"])
        way = f"by {backend['way']}" if backend.get("way") else ""
        rows.append((name, on or "-", backend["missing"] or way))
    lines.append(_table(rows))
    for verdict in report["verdicts"]:
        what = f"{verdict['op']} ({verdict['face']}, {verdict['dtype']}) on {verdict['device']}"
        failure = f": {verdict['failure']}" if verdict["failure"] else ""
        found = f"{verdict['status']}, {verdict['checked']} checks passed{', quick' if verdict['quick'] else ''}"
        lines.append(f"self-check of {what}: {found}{failure}")
    if not report["verdicts"]:
        lines.append("self-check: not run with these versions; `jasper-fast selfcheck` runs it")
    lines += [f"tuned on {of['device']}: {of['shapes']} shapes, in {of['file']}" for of in report["tuned"]]
    rows = [("package", "version", "for", "how to get it")] + [
        (name, of["version"] or ("- (optional)" if of["optional"] else "missing"), of["for"], of.get("get", ""))
        for name, of in report["packages"].items()
    ]
    return "\n".join([*lines, _table(rows)])
