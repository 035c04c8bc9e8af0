"""The values of `backend=`, whether this machine can run each of them, and the module of each face."""

import functools
import importlib.util
import os
from types import ModuleType

import torch

from jasper_fast.kernels import native
from jasper_fast.kernels.conv1d import cuda_launch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
NORM, PANES, NOVOGRAD, CTC, DEPTHWISE = "bn_relu_dropout", "panes", "novograd", "ctc", "depthwise"
OLDEST = (8, 0)  # the Triton kernels need this compute capability, because they use bf16 and cp.async


class BackendMissing(RuntimeError):
    """This machine cannot run a backend that was requested by name. The message says how to get it."""


def check(backend: str) -> str:
    """Returns `backend`, or raises ValueError, which lists the known backends."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    return backend


def why_missing(backend: str, device: torch.device | str) -> str | None:
    """Returns None if `backend` runs on tensors of `device`, else a sentence that says why not and what to do."""
    device = torch.device(device)
    if backend in ("auto", "reference"):
        return None
    if backend in ("cpu", "cuda") and device.type != backend:
        where = "the CPU" if backend == "cpu" else "a GPU"
        needs = f"the {backend} backend needs {backend.upper()} tensors, not {device.type}"
        return f"{needs}; move the model to {where} or use 'auto'"
    if backend == "cpu":
        return None if native.cpu_available() else native.explain()["cpu"]
    if backend == "cuda":
        return None if native.cuda_available() or cuda_launch.way() == "NVRTC" else native.explain()["cuda"]
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6' (Linux x86-64)"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else OLDEST
        if found >= OLDEST:
            return None
        return (
            f"the Triton kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or later, but this GPU has "
            f"{found[0]}.{found[1]}; use 'auto', which takes the cuda backend on such a GPU"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "the triton backend needs a CUDA tensor; on a CPU it needs Triton's interpreter: set TRITON_INTERPRET=1"


def named(backend: str, reason: str) -> str:
    return reason if reason.startswith("backend ") else f"backend '{backend}': {reason}"


@functools.cache
def face(op: str, name: str) -> ModuleType:
    """Returns the module of a face: `jasper_fast.kernels.<op>.reference`, `.cpu_impl`, `.triton_impl` and so on."""
    return importlib.import_module(f"jasper_fast.kernels.{op}.{name if name == 'reference' else f'{name}_impl'}")


def is_available(backend: str, device: torch.device | str = "cpu") -> bool:
    """Returns whether `backend` runs on `device`."""
    return why_missing(check(backend), device) is None


def require(backend: str) -> str:
    """Returns `backend` if a device of this machine can run it. Otherwise raises BackendMissing, which says how to get
    it."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    reasons = [why_missing(check(backend), d) for d in devices]
    if all(reasons):
        if backend == "cuda" and not torch.cuda.is_available():
            raise BackendMissing("backend 'cuda': PyTorch sees no CUDA GPU; on the CPU use 'auto' or 'cpu'")
        raise BackendMissing(named(backend, reasons[-1]))
    return backend
