"""Native libraries load once and lazily, or raise an error with the reason and the remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jasper_fast.kernels import native

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_importing_loads_no_library() -> None:
    code = "from jasper_fast.kernels import native; print('jasper_fast_cpu.so' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_library_says_what_to_run(tmp_path: Path) -> None:
    library = native.Library("cpu", tmp_path)
    for _ in range(2):
        with pytest.raises(native.Missing, match=r"libjasper_fast_cpu\.so is not built.*make install"):
            library.ops()
    assert "build_native" in library.why_not()


def test_a_broken_library_gives_the_loader_s_reason(tmp_path: Path) -> None:
    (tmp_path / "libjasper_fast_cpu.so").write_bytes(b"not a library")
    with pytest.raises(native.Missing, match=rf"does not load with torch {torch.__version__[:4]}.*(ELF|too short)"):
        native.Library("cpu", tmp_path).ops()


def test_the_cuda_library_is_not_touched_where_torch_has_no_cuda(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "libjasper_fast_cuda.so").write_bytes(b"not a library")
    with pytest.raises(native.Missing, match="built without CUDA; install a CUDA build of torch"):
        native.Library("cuda", tmp_path).ops()


def test_no_gpu_is_the_reason_where_torch_has_cuda(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(native.Missing, match="no NVIDIA GPU"):
        native.Library("cuda", tmp_path).ops()


def test_explain_agrees_with_available() -> None:
    reasons = native.explain()
    assert (reasons["cpu"] is None) == native.cpu_available()
    assert (reasons["cuda"] is None) == native.cuda_available()


@pytest.mark.skipif(not native.cpu_available(), reason="the native CPU library is not built: run `make install`")
def test_an_op_that_an_old_library_lacks_is_named() -> None:
    with pytest.raises(native.Missing, match=r"no op 'no_such_op': it is older than this code; rebuild"):
        native.cpu().no_such_op(torch.ones(1))
    assert native.cpu().bn_stats is native.cpu().bn_stats


@pytest.mark.skipif(not native.cpu_available(), reason="the native CPU library is not built: run `make install`")
def test_the_library_needs_no_python_and_only_torch_s_stable_symbols() -> None:
    """Shows that one build serves every Python and later torch: it needs no symbol of CPython or of torch's C++
    classes."""
    path = native._cpu.path
    try:
        lines = subprocess.run(["nm", "-D", "-u", str(path)], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("nm (binutils) is not installed")
    needed = [line.split()[-1] for line in lines.splitlines() if line.strip()]
    unstable = [name for name in needed if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZNK3c10", "_ZNK2at"))]
    assert any(name.startswith(("aoti_torch", "torch_")) for name in needed)
    assert unstable == []


def test_no_cuda_kernel_spills_registers() -> None:
    """Shows that no CUDA kernel spills registers, by the logs of ptxas from building the library."""
    logs = sorted((ROOT / "build" / "native" / "cuda").glob("*.o.log"))
    if not logs:
        pytest.skip("the CUDA library was not built here: no nvcc, or JASPER_FAST_CUDA=0")
    for log in logs:
        text = log.read_text()
        spills = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'(?:\n.*?)*?(\d+) bytes spill stores", text)
        least = 2 if log.name.startswith("novograd") else 8
        assert len({kernel for kernel, _, _ in spills}) >= least, f"{log} has too few kernels: was the build cut short?"
        spilling = [(kernel, arch, stored) for kernel, arch, stored in spills if stored != "0"]
        assert not spilling, f"{log.name}: {spilling}"
