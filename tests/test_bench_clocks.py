"""Clocks read from a stand-in for the driver's library, recorded versions, intervals of few samples, CuPy's timing."""

import itertools
import sys
from types import SimpleNamespace

import numpy
import pynvml
import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, CUDA, softplus_case, timed
from conftest import raising

from jasper_fast.bench.harness import clocks, limits, machine, nvml, ratios


class Driver:
    """A stand-in for the library libnvidia-ml, with one GPU. Its functions return a status; 0 means success."""

    UUID = b"GPU-12345678-0000"

    def __init__(self) -> None:
        for name, value in (
            ("nvmlDeviceGetTemperature", 61),
            ("nvmlDeviceGetCurrentClocksThrottleReasons", 0x1 | 0x4 | 0x40),
            ("nvmlSystemGetCudaDriverVersion_v2", 13020),
        ):
            setattr(self, name, lambda *args, value=value: self.write(args[-1], value))
        self.nvmlInitWithFlags = lambda flags: 0
        self.nvmlDeviceGetPowerUsage = lambda *args: 3  # not supported
        self.nvmlDeviceGetClockInfo = lambda at, kind, into: self.write(into, {1: 1755, 2: 2619}[kind.value])
        self.nvmlSystemGetDriverVersion = lambda into, size: self.write(into, b"580.65.06")
        self.nvmlDeviceGetHandleByUUID = lambda uuid, into: 0 if uuid.value == self.UUID else 6

    def write(self, into: object, value: object) -> int:
        getattr(into, "_obj", into).value = value
        return 0


@pytest.fixture
def driver(monkeypatch):
    """Sets a `Driver` as the driver's library, and returns a function that sets another library or None."""

    def fresh(found: object) -> None:
        for cached in (nvml.library, nvml.handle, pynvml._nvmlGetFunctionPointer_cache):
            getattr(cached, "cache_clear", getattr(cached, "clear", None))()
        monkeypatch.setattr(pynvml, "nvmlLib", found)

    monkeypatch.setattr(pynvml, "CDLL", raising(OSError("no such library")))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12345678-0000"))
    fresh(Driver())
    yield fresh
    fresh(None)


def test_the_driver_s_library_is_read_and_what_it_lacks_is_left_out(driver, monkeypatch):
    assert machine.clocks(CUDA) == {
        "sm_mhz": 1755, "memory_mhz": 2619, "temperature_c": 61,
        "held_by": ["software power cap", "hardware thermal slowdown"],
    }  # fmt: skip
    assert (nvml.driver(), nvml.cuda_driver()) == ("580.65.06", "13.2")
    old = Driver()
    del old.nvmlDeviceGetCurrentClocksThrottleReasons
    driver(old)
    found = machine.clocks(CUDA)
    assert "held_by" not in found and found["sm_mhz"] > 0, "a driver that lacks one function still reports the rest"
    driver(None)
    assert (machine.clocks(CUDA), nvml.driver(), nvml.cuda_driver()) == ({}, None, None), "no driver"
    driver(Driver())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="other"))
    assert machine.clocks(CUDA) == {}, "a GPU that the library does not know is not taken for another"


def test_without_pynvml_the_fields_stay_empty_and_a_line_says_why_once(driver, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for _ in range(2):
        assert (machine.clocks(CUDA), nvml.driver(), nvml.cuda_driver()) == ({}, None, None)
    assert capsys.readouterr().err.count("pip install nvidia-ml-py") == 1


def test_rows_tell_their_clocks_and_which_of_them_ran_slowly(run, monkeypatch):
    rates = {"fast": 1980, "a little slower": 1900, "slow": 1500}
    now: list[str] = []
    monkeypatch.setattr(machine, "clocks", lambda _: {"sm_mhz": rates[now[-1]], "temperature_c": 60 + len(now)})
    for name in rates:
        now.append(name)
        run.cases("test", [softplus_case({"eager": F.softplus}, name)])
    rows = {row["key"]["op"]: row for row in run.results.data["rows"] if row["ours"]}
    assert [name for name, row in rows.items() if row["throttled"]] == ["slow"]
    assert rows["slow"]["clocks"]["mhz"] == 1500 and rows["slow"]["clocks"]["temperature_c"] == 63
    clocks.mark_throttled(rows.values(), {"clocks": {"sm_mhz": 2200}})
    assert all(row["throttled"] for row in rows.values()), "the limits were measured at a higher clock than any row"


def test_a_cpu_is_told_by_its_fastest_core_and_its_load():
    readings = [
        {"cpu_mhz": [800, 3000], "load_average": 0.5},
        {"cpu_mhz": [2000, 900], "load_average": 2.5},
        {"cpu_mhz": [2500, 2500]},
    ]
    assert clocks.clocks_during(readings) == {"mhz": 2500, "mhz_lowest": 2000, "load_average": 2.5, "readings": 3}
    assert clocks.clocks_during([{"temperature_c": 50.0}]) == {"temperature_c": 50.0, "readings": 1}


def test_clocks_are_read_seldom_but_never_not_at_all(monkeypatch):
    readings = itertools.count(1)
    monkeypatch.setattr(machine, "clocks", lambda _: {"sm_mhz": next(readings)})
    m, _ = timed(softplus_case({"eager": F.softplus}))
    assert [r["sm_mhz"] for r in m.readings] == [1, 2]  # after the first of the few rounds, and at the end


def test_a_machine_that_tells_no_clock_has_rows_all_the_same(run, monkeypatch):
    monkeypatch.setattr(machine, "clocks", lambda _: {})
    rows = run.cases("test", [softplus_case({"eager": F.softplus})])
    assert all(row["status"] == "ok" and "clocks" not in row and "throttled" not in row for row in rows)


# ------------------------------------------------------------------ versions


def test_whatever_is_installed_is_recorded(monkeypatch):
    names = (
        "torch", "cupy-cuda13x", "nvidia_cudnn_frontend", "torch_tensorrt", "tensorrt-cu12", "onnxscript", "onnx",
        "onnxruntime-gpu", "nvidia-cuda-runtime", "openvino", "Triton", "pytest", "torchvision", "cudatoolkitten",
    )  # fmt: skip
    installed = [SimpleNamespace(metadata={"Name": name}, version=str(i)) for i, name in enumerate(names)]
    installed.append(SimpleNamespace(metadata={"Name": "triton"}, version="hidden by the one before"))
    monkeypatch.setattr(machine.importlib.metadata, "distributions", lambda: installed)
    found = machine.packages.__wrapped__()
    expected = {name.lower().replace("_", "-") for name in names} - {"pytest", "torchvision", "cudatoolkitten"}
    assert set(found) == expected and found["triton"] == str(names.index("Triton"))


def test_compilers_are_recorded(monkeypatch):
    versions = {"g++": "g++ 14.2\nCopyright", "nvcc": "Cuda compilation tools, release 13.0, V13.0.88"}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in versions else None)
    monkeypatch.setattr(machine, "_run", lambda program, *_: versions.get(program))
    assert {"nvcc": "13.0.88", "c++": "g++ 14.2"}.items() <= machine.compilers.__wrapped__().items()


@pytest.mark.parametrize("checkout", ["0123456789", None])
def test_a_copy_without_git_is_told_its_commit(checkout, monkeypatch):
    monkeypatch.setattr(machine, "_git", lambda *args: checkout)
    monkeypatch.delenv("JASPER_FAST_COMMIT", raising=False)
    assert machine.commit() == checkout
    monkeypatch.setenv("JASPER_FAST_COMMIT", "fedcba9876")
    assert machine.commit() == (checkout or "fedcba9876")


# ------------------------------------------------------------------ intervals of few samples


@pytest.mark.parametrize(("n", "claimed"), [(1, 0.0), (3, 0.75), (5, 0.9375), (6, 0.95), (100, 0.95)])
def test_few_pairs_claim_less(n, claimed):
    assert ratios.ratio([2.0] * n, [1.0] * n)["confidence"] == claimed
    assert ratios.summary([1.0] * n, 1)["confidence"] == claimed


@pytest.mark.parametrize("n", [6, 12, 30])
def test_intervals_hold_the_truth_as_often_as_they_claim(n):
    samples = 1 + 0.1 * torch.randn(200, n, generator=torch.Generator().manual_seed(n))
    intervals = [ratios.interval(values, 50) for values in samples.tolist()]
    assert sum(low <= 1.0 <= high for low, high in intervals) >= 0.93 * 200


def test_quantiles_that_are_the_extremes_are_named():
    few = [ratios.summary([float(i) for i in range(n)], 1)["too_few_for"] for n in (4, 10, 99, 100)]
    assert few == [["p05", "p20", "p80", "p90", "p95", "p99"], ["p05", "p95", "p99"], ["p99"], []]


def test_the_median_has_an_interval_of_its_own():
    found = ratios.summary((1 + 0.1 * torch.randn(200)).tolist(), 1)
    assert found["p20"] < found["median_low"] < 1.0 < found["median_high"] < found["p80"]


# ------------------------------------------------------------------ launches, timed by CuPy


def cupy(monkeypatch, benchmark) -> None:
    contents = {"cupy": {"__version__": "14.0"}, "cupyx": {}, "cupyx.profiler": {"benchmark": benchmark}}
    for name, content in contents.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(limits.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_cupy_times_the_launch_at_the_host_and_on_the_device(monkeypatch):
    def benchmark(call, n_repeat: int, n_warmup: int, devices: tuple[int, ...]):
        call()
        assert devices == (0,)
        return SimpleNamespace(cpu_times=numpy.array([3e-6, 1e-6, 2e-6]), gpu_times=numpy.array([[5e-6, 4e-6, 9e-6]]))

    cupy(monkeypatch, benchmark)
    assert limits.cupy_launch(CPU) == ({"cupy_host": 2e-6, "cupy_device": 5e-6}, "14.0")


def test_a_cupy_that_is_absent_or_broken_says_so(monkeypatch):
    monkeypatch.setattr(limits.importlib.util, "find_spec", lambda name: None)
    times, why = limits.cupy_launch(CPU)
    assert not times and why.startswith("absent: pip install cupy-cuda")
    cupy(monkeypatch, raising(RuntimeError("CUDA driver version is insufficient")))
    assert limits.cupy_launch(CPU) == ({}, "failed: RuntimeError: CUDA driver version is insufficient")
