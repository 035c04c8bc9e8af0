"""The values of `backend=`, and whether this machine can run each of them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from jasper_fast.kernels import native
from jasper_fast.kernels.conv1d import cuda_launch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
NORM, PANES, NOVOGRAD, CTC, DEPTHWISE = "bn_relu_dropout", "panes", "novograd", "ctc", "depthwise"
OLDEST = (8, 0)  # compute capability that the Triton kernels are written for: bf16, cp.async
_MODULE = {
    "reference": "reference",
    "aten": "aten_impl",
    "cpu": "cpu_impl",
    "triton": "triton_impl",
    "cuda": "cuda_impl",
}


class BackendMissing(RuntimeError):
    """A backend asked for by name that this machine cannot run; the message says how to get it."""


def check(backend: str) -> str:
    """`backend` itself; raises ValueError naming the known ones."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    return backend


def why_missing(backend: str, device: torch.device | str) -> str | None:
    """None if `backend` runs on tensors of `device`, else one sentence that says what to do."""
    device = torch.device(device)
    device_type = device.type
    if backend == "reference":
        return None
    if backend == "cpu":
        if device_type != "cpu":
            return f"the cpu backend takes CPU tensors, not {device_type}; move the model to the CPU or ask for 'auto'"
        return None if native.cpu_available() else native.explain()["cpu"]
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'triton>=3.6' (Linux x86-64)"
        if device_type == "cuda":
            return _too_old(device)
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the triton backend needs a CUDA tensor (on the CPU only its interpreter runs: set TRITON_INTERPRET=1)"
    if device_type != "cuda":
        return f"the cuda backend takes CUDA tensors, not {device_type}; move the model to a GPU or ask for 'auto'"
    return None if native.cuda_available() or cuda_launch.way() == "NVRTC" else native.explain()["cuda"]


def _too_old(device: torch.device) -> str | None:
    """Why this GPU is too old for the Triton kernels; None if it is not, or if PyTorch sees no GPU."""
    found = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else OLDEST
    if found >= OLDEST:
        return None
    return (
        f"its kernels are written for compute capability {OLDEST[0]}.{OLDEST[1]} and later, this GPU has "
        f"{found[0]}.{found[1]}: there 'auto' runs {NORM} on the cuda backend and the convs on cuDNN"
    )


def named(backend: str, reason: str) -> str:
    return reason if reason.startswith("backend ") else f"backend '{backend}': {reason}"


@functools.cache
def face(op: str, name: str) -> ModuleType:
    """The module `kernels/<op>/<face>` that holds the op's functions."""
    return importlib.import_module(f"jasper_fast.kernels.{op}.{_MODULE[name]}")


def is_available(backend: str, device: torch.device | str = "cpu") -> bool:
    """Whether `backend` runs on `device`."""
    return why_missing(check(backend), device) is None


def require(backend: str) -> str:
    """`backend` itself, if some device of this machine can run it; else raises BackendMissing, saying how to get it."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    reasons = [why_missing(check(backend), d) for d in devices] if backend != "auto" else [None]
    if all(reasons):
        if backend == "cuda" and not torch.cuda.is_available():
            raise BackendMissing("backend 'cuda': PyTorch sees no CUDA GPU; on the CPU ask for 'auto' or 'cpu'")
        raise BackendMissing(named(backend, reasons[-1]))
    return backend
