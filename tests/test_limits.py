"""The machine's limits: the matmul rate that bounds rows in fp32."""

import pytest
import torch
from bench_runs import CPU, CUDA

from jasper_fast.bench.harness import limits, result_file


@pytest.fixture
def rates(monkeypatch):
    """Replaces measured matmul rates by numbers that depend on the dtype and on whether TF32 is allowed."""

    def rate(device, dtype, size):
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return {"float32": 8.0 if tf32 else 1.0, "float16": 16.0, "bfloat16": 15.0}[dtype]

    monkeypatch.setattr(limits, "_matmul_rate", rate)


@pytest.mark.parametrize(("allowed", "mode", "rate"), [(True, "TF32", 8.0), (False, "IEEE", 1.0)])
def test_fp32_on_a_gpu_is_held_to_the_rate_that_convolutions_may_use(rates, allowed, mode, rate):
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        before = torch.backends.cuda.matmul.fp32_precision
        found = limits.matmul_rates(CUDA)
        assert limits.float32_mode(CUDA) == mode and torch.backends.cuda.matmul.fp32_precision == before
    assert found == {
        "float32": rate,
        "float32 in IEEE": 1.0,
        "float32 in TF32": 8.0,
        "bfloat16": 15.0,
        "float16": 16.0,
    }
    row = {"dtype": "float32", "flops": 16.0, "bytes": 0, "status": "ok", "time_s": {"median": 4.0}}
    result_file.against_limits(row, {"matmul_flops_per_s": found})
    assert row["limit"] == {"bound": "compute", "floor_s": 16.0 / rate, "share": 4.0 / rate}


def test_a_cpu_has_one_fp32(rates):
    found = limits.matmul_rates(CPU)
    assert found["float32"] == 1.0 and not any("TF32" in name for name in found)
    assert limits.float32_mode(CPU) == "IEEE"
