"""The profiler of bench counts launches, names ops and adds no output, and its errors are reported."""

import os

import pytest
import torch
from bench_runs import CPU, make_run
from conftest import raising

from jasper_fast.bench.commands import launches, profile
from jasper_fast.bench.harness import allocations, kineto
from jasper_fast.bench.harness.case import Runner


def test_launches_are_counted():
    x = torch.randn(4, 4)
    assert launches.count(Runner(lambda: x.t().relu().exp().reshape(16).sum(), dict), CPU) == {"ops": 4}


def test_a_profile_leaves_nothing_on_the_terminal_and_hides_no_error(tmp_path, capfd):
    def step():
        os.write(2, b"USDT: of the step's own\n")
        return torch.ones(3) + 1

    assert any(r["name"] == "aten::add" for r in profile.profile(step, CPU, tmp_path / "trace.json"))
    assert allocations.peak(lambda: torch.ones(256), "cpu") == 1024
    out, err = capfd.readouterr()
    assert (out, set(err.splitlines())) == ("", {"USDT: of the step's own"})  # output of the step is kept
    with pytest.raises(RuntimeError), kineto.without_marks():
        os.write(2, b"USDT:2026 profiler_start\nERROR:2026 A.cpp:48] gpuGetDeviceCount failed with code 35\n")
        os.write(2, b"ERROR: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\n")
        raise RuntimeError
    assert capfd.readouterr().err == "ERROR: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\n"


def test_a_step_that_fails_stops_the_profiler(tmp_path):
    with pytest.raises(ValueError), kineto.recorded([torch.profiler.ProfilerActivity.CPU]):
        raise ValueError
    assert not torch.autograd._profiler_enabled()


def test_a_gpu_s_profile_without_kernels_is_a_failure(tmp_path, monkeypatch):
    """Shows that a GPU profile without kernels is reported as failed. Without CUPTI the profiler records no kernel."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    with pytest.raises(profile.NoKernels, match="CUPTI"):
        profile.profile(lambda: torch.ones(3) + 1, torch.device("cuda"), tmp_path / "trace.json")

    monkeypatch.setattr(profile, "profile", raising(profile.NoKernels("no CUPTI")))
    found = profile.main(make_run(tmp_path), "small", "inference", 1, 64)
    assert [(f["status"], f["why"], f["records"]) for f in found] == [("failed", "no CUPTI", [])] * 2


def test_launches_that_cannot_be_counted_are_not_told_as_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert launches.count(Runner(lambda: torch.ones(4).exp(), dict), torch.device("cuda")) == {"ops": 2}
    assert "CUPTI" in capsys.readouterr().err
