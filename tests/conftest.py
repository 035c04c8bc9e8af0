"""Shared fixtures and helpers: the faces of an op, a run of bench, seeds, poisoned uninitialised memory."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Triton reads TRITON_INTERPRET when it is imported. Without a GPU its kernels are interpreted by numpy.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
    # By default cuDNN rounds some convs to TF32 but not others.
    torch.backends.cudnn.allow_tf32 = False

os.environ["JASPER_FAST_TUNE"] = "0"  # off, except in the tests of first-use tuning

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"  # results of NVIDIA's Jasper, described in tests/golden/README.md
FACES = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Face:
    """One face of the ops. `device` is where its tensors lie; `load("bn_relu_dropout")` returns its module for that
    op."""

    name: str
    device: torch.device

    def load(self, op: str) -> ModuleType:
        from jasper_fast.dispatch import backends

        return backends.face(op, self.name)


def make_face(name: str) -> Face:
    """Returns the face called `name`, or skips the test with the reason if this machine cannot run that face."""
    from jasper_fast.kernels import native

    gpu = torch.cuda.is_available()
    obstacles = {
        "cpu": [(not native.cpu_available(), "the native CPU library is not built: run `make install`")],
        "cuda": [
            (not gpu, "no CUDA device"),
            (
                not native.cuda_available(),
                "the native CUDA library is not built: run `make install` where nvcc is found",
            ),
        ],
        "triton": [(importlib.util.find_spec("triton") is None, "triton is not installed")],
    }
    for is_there, reason in obstacles.get(name, ()):
        if is_there:
            pytest.skip(reason)
    return Face(name, torch.device("cuda" if name == "cuda" or (name == "triton" and gpu) else "cpu"))


def settle(name: str) -> str:
    """Returns `name`, or skips the test if this machine cannot run that face. If the face runs on the GPU, the GPU
    becomes the default device of new tensors."""
    face = make_face(name)
    if face.device.type == "cuda":
        torch.set_default_device(face.device)
    return face.name


def interpreted() -> None:
    """Skips the test unless Triton's kernels run in the interpreter, where they take CPU tensors."""
    make_face("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton is not interpreted: there is a GPU")


def check_op(op, args: tuple) -> None:
    """Runs `torch.library.opcheck` with the tests that are worth their time."""
    torch.library.opcheck(
        op,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def raising(error: BaseException):
    """Returns a function that takes any arguments and raises `error`."""

    def function(*_: object, **__: object):
        raise error

    return function


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers of xdist share the cores


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> Face:
    return make_face(request.param)


@pytest.fixture(params=FACES[:3])
def backend(request: pytest.FixtureRequest) -> str:
    """Returns each face in turn, except CUDA, by its name (see `settle`)."""
    return settle(request.param)


@pytest.fixture
def run(tmp_path: Path):
    """A run of bench on the CPU, in fp32 and with the reference face, that takes almost no time."""
    from bench_runs import make_run

    return make_run(tmp_path)


def assert_raises(cases, error: type[Exception] = ValueError) -> None:
    """Checks that each function in `cases`, pairs of (function without arguments, pattern), raises `error` with a
    message of one line that matches its pattern."""
    for wrong, message in cases:
        with pytest.raises(error, match=message) as raised:
            wrong()
        assert "\n" not in str(raised.value)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unsettled():
    """Restores the default device, which `settle` may have changed, and the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_default_device(None)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills uninitialised memory with NaN or the largest integer. If a kernel forgets to write an element, the test
    fails."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch fills new memory only in deterministic mode
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
