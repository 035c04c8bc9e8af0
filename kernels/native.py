"""Loads the two native libraries on first use. Importing this module never fails and loads nothing.

`cpu()` and `cuda()` return the ops of `torch.ops.jasper_fast_cpu` and `torch.ops.jasper_fast_cuda`, or raise `Missing`,
which says why the library is missing and how to get it. The environment variable JASPER_FAST_LIB=FOLDER
loads the libraries from another folder, such as those built with sanitizers (`make sanitize`).
"""

import ctypes
import os
import platform
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

BUILD = "run `make install`, or `python setup.py build_native` in a checkout"


class Missing(RuntimeError):
    """Raised if a native library is missing, or does not fit this machine or code. The message says what to do."""


def _library_dir() -> Path:
    if chosen := os.environ.get("JASPER_FAST_LIB"):
        return Path(chosen).resolve()
    root = Path(__file__).resolve().parents[1]  # the checkout, or the installed jasper_fast/
    package = root / "jasper_fast"
    return (package if (package / "__init__.py").is_file() else root) / "lib"


class Library:
    """One shared library. It is loaded once, on first use. If that fails, the reason is kept.

    Args:
        name: "cpu" or "cuda".
        directory: the folder of `libjasper_fast_<name>.so`. None means JASPER_FAST_LIB or else the package's `lib/`.
    """

    def __init__(self, name: str, directory: Path | None = None) -> None:
        self.name = name
        self.path = (directory or _library_dir()) / f"libjasper_fast_{name}.so"
        self._lock = threading.Lock()
        self._ops: _Ops | None = None
        self._why: str | None = None

    def ops(self) -> Any:
        """Returns the namespace of the library's ops. Raises `Missing` if the library cannot be loaded."""
        if self._ops is None and (why := self.why_not()) is not None:
            raise Missing(why)
        return self._ops

    def why_not(self) -> str | None:
        """Returns why the library cannot be used, or None if it can."""
        with self._lock:
            if self._ops is None and self._why is None:
                self._load()
        return self._why

    def _load(self) -> None:
        what = f"backend '{self.name}': "
        if self.name == "cuda" and torch.version.cuda is None:
            self._why = what + f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        elif self.name == "cuda" and not torch.cuda.is_available():
            self._why = what + "torch sees no NVIDIA GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        elif not self.path.is_file():
            needs = "nvcc (CUDA toolkit)" if self.name == "cuda" else "a C++20 compiler"
            self._why = what + f"{self.path} is not built; with {needs} on this machine {BUILD}"
        else:
            try:
                torch.ops.load_library(str(self.path))
                self._ops = _Ops(getattr(torch.ops, f"jasper_fast_{self.name}"), self.path)
            except OSError as error:
                reason = error.__cause__ or error
                self._why = what + f"{self.path} does not load with torch {torch.__version__} ({reason}); {BUILD}"


class _Ops:
    """The namespace of the library's ops. Raises `Missing` for an op that the library is too old to have."""

    def __init__(self, namespace: Any, path: Path) -> None:
        self._namespace, self._path = namespace, path

    def __getattr__(self, name: str) -> Any:
        try:
            op = getattr(self._namespace, name)
        except AttributeError:
            raise Missing(f"{self._path} has no op '{name}': it is older than this code; rebuild it: {BUILD}") from None
        setattr(self, name, op)
        return op


_cpu = Library("cpu")
_cuda = Library("cuda")


def cpu() -> Any:
    """Returns `torch.ops.jasper_fast_cpu`. Raises `Missing` if the CPU library cannot be loaded."""
    return _cpu.ops()


def cpu_functions() -> ctypes.CDLL:
    """Returns the CPU library for its plain C functions (csrc/cpu/ngram_train.cpp). Raises `Missing` like `cpu()`."""
    _cpu.ops()
    return ctypes.CDLL(str(_cpu.path))


def cuda() -> Any:
    """Returns `torch.ops.jasper_fast_cuda`. Raises `Missing` if the CUDA library is missing or does not load, if
    torch is built without CUDA, or if there is no GPU."""
    return _cuda.ops()


def cuda_library() -> ctypes.CDLL:
    """Returns the CUDA library for its plain C functions. Raises `Missing` like `cuda()`."""
    _cuda.ops()
    return ctypes.CDLL(str(_cuda.path))


def typed(library: ctypes.CDLL, fits: bool, signatures: Mapping[str, tuple[type, ...]]) -> ctypes.CDLL:
    """Returns `library` after telling ctypes the argument types of its C functions, which return an error text or NULL.

    fits: whether the library's structs of arguments have the same sizes as ours. If not, or if one of the functions is
    missing, raises `Missing`.
    """
    if not (fits and all(hasattr(library, name) for name in signatures)):
        raise Missing(f"{library._name} was built from another version of this code; {BUILD}")
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    return library


def cpu_available() -> bool:
    """Returns whether the CPU library loads."""
    return _cpu.why_not() is None


def cuda_available() -> bool:
    """Returns whether the CUDA library loads and torch sees a GPU."""
    return _cuda.why_not() is None


def cpu_name() -> str:
    """Returns the system's name for the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "cpu model")))
    return next(named, "") or platform.processor() or platform.machine()


def explain() -> dict[str, str | None]:
    """Returns for each library why it cannot be used, or None if it can."""
    return {library.name: library.why_not() for library in (_cpu, _cuda)}
