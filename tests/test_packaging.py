"""The packages and files of setup.py, without building a wheel."""

import contextlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from unittest import mock

import pytest

from jasper_fast.kernels import nvrtc

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = {"dev", "train", "demo", "bench", "lm", "safetensors"}  # dev includes the others
OPTIONAL = (
    "anyascii",
    "flashlight",
    "inflect",
    "jinja2",
    "jiwer",
    "pynvml",
    "rich",
    "safetensors",
    "soundfile",
    "tensorboard",
)
BUILD = runpy.run_path(str(ROOT / "csrc" / "build.py"))


@pytest.fixture(scope="module")
def described() -> dict:
    """Returns the arguments that setup.py passes to setuptools."""
    with contextlib.chdir(ROOT), mock.patch("setuptools.setup") as setup:
        runpy.run_path("setup.py")
    return setup.call_args.kwargs


def test_every_python_folder_is_packed(described: dict) -> None:
    folders = {
        path.parent.relative_to(ROOT)
        for name in ("jasper_fast", "kernels", "bench")
        for path in (ROOT / name).rglob("*.py")
    }
    names = {".".join(f.parts if f.parts[0] == "jasper_fast" else ("jasper_fast", *f.parts)) for f in folders}
    assert names - set(described["packages"]) == {"jasper_fast.bench.quick"}  # it has only tests


def test_mapped_folders_exist_and_kernels_and_bench_are_no_packages_of_their_own(described: dict) -> None:
    for folder in described["package_dir"].values():
        assert (ROOT / folder).is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the published package called kernels"
    assert not (ROOT / "bench" / "__init__.py").exists(), "its modules would load under two names"


@pytest.mark.parametrize(
    ("package", "wanted"),
    [
        ("bench", "bench/compiled/*.json"),
        ("bench.report", "bench/report/*.[!p]*"),
        ("kernels", "kernels/**/*.[jm][sd]*"),
        ("csrc", "csrc/cuda/*.cuh"),  # the sources that NVRTC compiles
    ],
)
def test_data_that_the_package_reads_is_packed(package: str, wanted: str, described: dict) -> None:
    assert f"jasper_fast.{package}" in described["packages"] and nvrtc.sources() == ROOT / "csrc" / "cuda"
    patterns = described["package_data"][f"jasper_fast.{package}"]
    found = {p for pattern in patterns for p in (ROOT / package.replace(".", "/")).glob(pattern)}
    assert found and found == set(ROOT.glob(wanted))


def test_a_wheel_has_train_py_as_a_module_of_the_package(described: dict) -> None:
    from setuptools import Distribution

    command = described["cmdclass"]["build_py"](Distribution({"packages": ["jasper_fast"], "script_name": "setup.py"}))
    command.finalize_options()
    assert ("jasper_fast", "train", "train.py") in command.find_package_modules(
        "jasper_fast", str(ROOT / "jasper_fast")
    )
    assert "train.py" not in {m[2] for m in command.find_package_modules("jasper_fast.cli", "jasper_fast/cli")}


WITHOUT = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
INFERENCE = """
import torch
from jasper_fast import InferenceEngine, Jasper, JasperConfig, LogMelFeatures
from jasper_fast.selfcheck import checks, child

block = {"filters": 8, "kernel_size": [3], "residual": False}
config = {"encoder": {"in_feats": 64, "blocks": [block]}, "decoder": {"in_feats": 8, "n_classes": 4}}
model = Jasper(JasperConfig.from_dict(config)).eval()
log_probs, lengths = InferenceEngine(model)(*LogMelFeatures().eval()(torch.randn(1, 16000), torch.tensor([16000])))
assert torch.isfinite(log_probs).all()
assert checks.plan(torch.device("cpu"), quick=True) and callable(child.child)
"""


# Code that needs an optional package, and text that its error must contain if the package is missing.
HINTS = {
    "from jasper_fast.speech.metrics import wer; wer(['a'], ['b'])": "jiwer is not installed: pip install",
    "from jasper_fast.speech.text import normalize; normalize('5')": "'jasper-fast[train]'",
    "from jasper_fast.lm.words import *; WordSearch(WordLM('x', (), (' ',)), 1, 1, 1)": "'jasper-fast[lm]'",
    "from jasper_fast.training.runs import RunLog; RunLog('unused')": "tensorboard is not installed",
    "from jasper_fast.demo import report; report.render({}, (), ())": "'jasper-fast[demo]'",
    "from jasper_fast.cli.command import main; sys.exit(main(['demo']))": "error: rich is not installed",
}
IN_TURN = """
for code in sys.argv[1:]:
    try:
        exec(code)
        print("no error")
    except ImportError as error:
        print(error)
    except SystemExit:
        pass  # the command has printed its error
"""


@pytest.mark.slow
def test_only_extras_need_optional_packages_and_say_how_to_get_them() -> None:
    """Shows that inference works without optional packages, and that errors name the package or extra to install."""
    command = [sys.executable, "-c", f"{WITHOUT}{INFERENCE}sys.stderr = sys.stdout{IN_TURN}", *HINTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(hint in line for hint, line in zip(HINTS.values(), lines, strict=True)), lines


def test_configs_are_found_as_resources() -> None:
    found = {path.name for path in resources.files("jasper_fast.configs").iterdir() if path.name.endswith(".yaml")}
    assert found == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_pins_satisfy_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {name.lower().replace("_", "-"): version for name, version in pairs}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (t for e in INSTALLED for t in project["optional-dependencies"][e])
    for wanted in map(Requirement, [*project["dependencies"], *extras]):
        if wanted.name == project["name"]:
            assert wanted.extras <= INSTALLED, f"{wanted} is not all that make install brings"
        else:
            assert wanted.name in pins, f"{wanted.name} is not pinned in constraints.txt"
            assert wanted.specifier.contains(pins[wanted.name]), f"{wanted}, but {pins[wanted.name]} is pinned"


def test_ninja_file_compiles_every_source_and_each_instruction_set() -> None:
    text, names = BUILD["ninja_file"](Path("/torch"), "c++", None)
    assert names == ["libjasper_fast_cpu.so"]
    for source in (ROOT / "csrc" / "cpu").glob("*.cpp"):
        assert f"build cpu/{source.stem}.o: cxx {source}" in text
    for source in (ROOT / "csrc" / "cpu" / "isa").glob("*.cpp"):
        for isa in BUILD["ISAS"]:
            assert f"build cpu/{source.stem}.{isa}.o: cxx {source}\n  isa = -DJF_ISA={isa}" in text


def test_a_build_takes_paths_with_spaces_and_dollars(tmp_path: Path) -> None:
    root = tmp_path / "my $HOME: here"
    for folder in ("csrc/cpu", "csrc/cuda", "torch/include", "torch/lib"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "build.py", root / "csrc")
    (root / "csrc" / "one.h").write_text("#define ONE 1\n")
    (root / "torch" / "include" / "two.h").write_text("#define TWO 2\n")
    (root / "csrc" / "cpu" / "sum.cpp").write_text(
        '#include "one.h"\n#include <two.h>\nint sum() { return ONE + TWO; }\n'
    )
    (root / "cxx").symlink_to(shutil.which("c++"))
    text, _ = runpy.run_path(str(root / "csrc" / "build.py"))["ninja_file"](root / "torch", str(root / "cxx"), None)
    (root / "build.ninja").write_text(text)
    ninja = [sys.executable, "-m", "ninja", "-C", str(root), "cpu/sum.o"]
    for said in ("[1/1]", "no work to do"):
        assert said in subprocess.run(ninja, capture_output=True, text=True, check=True).stdout
    (root / "csrc" / "one.h").touch()
    assert "[1/1]" in subprocess.run(ninja, capture_output=True, text=True, check=True).stdout, "it misses a header"


@pytest.mark.parametrize(
    ("asked", "gpus", "archs"),
    [
        (None, ["9.0", "8.9", "8.9"], ["89", "90a"]),
        (None, ["12.0"], ["75", "80", "90a"]),  # this nvcc does not know the GPU
        (None, None, ["75", "80", "90a"]),  # there is no nvidia-smi
        (None, ["NVIDIA-SMI has failed", "[N/A]"], ["75", "80", "90a"]),  # the driver does not run
        ("all", ["9.0"], ["75", "80", "89", "90a"]),
        ("8.0;9.0a", ["8.9"], ["80", "90a"]),
        ("100;90a;80", None, ["100", "90a", "80"]),  # in any order
    ],
)
def test_architectures_come_from_the_environment_or_the_gpus(asked, gpus, archs, tmp_path: Path, monkeypatch) -> None:
    programs = {"nvcc": [f"compute_{arch}" for arch in (75, 80, 89, 90)]} | ({"nvidia-smi": gpus} if gpus else {})
    for name, lines in programs.items():
        (tmp_path / name).write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JASPER_FAST_CUDA_ARCHS", asked or "")
    nvcc = str(tmp_path / "nvcc")
    assert BUILD["cuda_archs"](nvcc) == archs
    flags = BUILD["gencode"](nvcc)
    assert re.findall(r"code=sm_(\w+)", flags) == archs
    newest = max((arch for arch in archs if arch.isdigit()), key=int)
    assert flags.endswith(f"arch=compute_{newest},code=compute_{newest}"), "PTX of 90a runs on no other GPU"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"CXX": "", "PATH": "/nowhere"}, "no C++ compiler: install g++ or clang++, or set CXX"),
        ({"JASPER_FAST_CUDA": "0"}, "the CUDA library is left out (JASPER_FAST_CUDA=0)"),
    ],
    ids=["no compiler", "no CUDA"],
)
def test_what_cannot_be_built_is_left_out_with_one_line(environment, line, tmp_path, monkeypatch, capsys) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    build = runpy.run_path(str(ROOT / "csrc" / "build.py"))
    build["compile_libraries"].__globals__.update(WORK=tmp_path / "work", ninja_file=lambda *_: ("", []))
    assert build["compile_libraries"](tmp_path / "lib") == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and line in said[0]
