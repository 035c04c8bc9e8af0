"""Native libraries load once and lazily, or raise an error with the reason and the remedy."""

import re
import shutil
import subprocess

import pytest
import torch
from bench_runs import ROOT, python
from conftest import assert_raises
from language_models import needs_native

from jasper_fast.kernels import native


@pytest.mark.slow
def test_importing_loads_no_library() -> None:
    code = "from jasper_fast.kernels import native; print('jasper_fast_cpu.so' in open('/proc/self/maps').read())"
    assert python(code).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "content", "cuda", "why"),
    [
        ("cpu", None, None, r"libjasper_fast_cpu\.so is not built.*make install"),
        ("cpu", b"not a library", None, rf"does not load with torch {torch.__version__[:4]}.*(ELF|too short)"),
        ("cuda", b"not a library", None, "built without CUDA; install a CUDA build of torch"),
        ("cuda", None, "13.0", "no NVIDIA GPU"),
    ],
    ids=["missing", "broken", "torch without CUDA", "no GPU"],
)
def test_a_library_that_cannot_be_used_says_why(name, content, cuda, why, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if content is not None:
        (tmp_path / f"libjasper_fast_{name}.so").write_bytes(content)
    library = native.Library(name, tmp_path)
    assert_raises([(library.ops, why)] * 2, native.Missing)
    assert re.search(why, library.why_not())


def test_explain_agrees_with_available() -> None:
    found = {name: why is None for name, why in native.explain().items()}
    assert found == {"cpu": native.cpu_available(), "cuda": native.cuda_available()}


@needs_native
def test_an_op_that_an_old_library_lacks_is_named() -> None:
    with pytest.raises(native.Missing, match=r"no op 'no_such_op': it is older than this code; rebuild"):
        native.cpu().no_such_op(torch.ones(1))
    assert native.cpu().bn_stats is native.cpu().bn_stats


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_needs_no_python_and_only_torch_s_stable_symbols() -> None:
    """A library that needs no other symbols works with every Python and with later versions of torch."""
    command = ["nm", "-D", "-u", str(native._cpu.path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = [line.split()[-1] for line in lines.splitlines() if line.strip()]
    unstable = [name for name in needed if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZNK3c10", "_ZNK2at"))]
    assert any(name.startswith(("aoti_torch", "torch_")) for name in needed)
    assert unstable == []


def test_no_cuda_kernel_spills_registers() -> None:
    """Reads the logs of ptxas from the build of the library."""
    logs = sorted((ROOT / "build" / "native" / "cuda").glob("*.o.log"))
    if not logs:
        pytest.skip("the CUDA library was not built here: no nvcc, or JASPER_FAST_CUDA=0")
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'(?:\n.*?)*?(\d+) bytes spill stores"
    for log in logs:
        spills = re.findall(pattern, log.read_text())
        least = 2 if log.name.startswith("novograd") else 8
        assert len({kernel for kernel, *_ in spills}) >= least, f"{log} has too few kernels: was the build cut short?"
        assert not [found for found in spills if found[2] != "0"], log.name
