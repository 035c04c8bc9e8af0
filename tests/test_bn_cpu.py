"""What only the CPU face of bn_relu_dropout has: instruction sets, threads, chunks of rows, conversions and Philox.

test_bn_relu_dropout.py tests what all faces share. Run as a script, this file writes the outputs of CASES to a given
file, so that processes with different values of JASPER_FAST_ISA can be compared.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from close import assert_close
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.kernels import native
from jasper_fast.kernels.bn_relu_dropout import cpu_impl
from jasper_fast.kernels.layout import ntc
from jasper_fast.kernels.operands import Mask, Norm

pytestmark = pytest.mark.skipif(not native.cpu_available(), reason="the native CPU library is not built: make install")

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
EPS, P = 1e-3, 0.2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (N, C, T, lengths): C below, at and above the vector widths, T = 1, and more rows than a block or a chunk
SHAPES = [
    (1, 1, 7, [3]),
    (2, 29, 37, [0, 37]),
    (3, 33, 1, [1, 0, 1]),
    (2, 256, 37, [1, 30]),
    (3, 16, 53, None),
    (2, 1030, 43, [43, 20]),
    (1, 5000, 3, [2]),  # one row is longer than a block
    (1, 3, 5000, [4100]),  # twenty chunks
]
CASES = list(itertools.product(range(len(SHAPES)), (False, True), (0.0, P)))


def philox(counters: np.ndarray, seed: int) -> np.ndarray:
    """Computes Philox4x32-10 in numpy as the paper states it: (n,) 64-bit counters to (n, 4) words."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    counters = counters.astype(np.uint64)
    c = [counters & low, counters >> shift, np.zeros_like(counters), np.zeros_like(counters)]
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for i in range(10):
        k0, k1 = np.uint64((key0 + i * 0x9E3779B9) & 0xFFFFFFFF), np.uint64((key1 + i * 0xBB67AE85) & 0xFFFFFFFF)
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(right >> shift) ^ c[1] ^ k0, right & low, (left >> shift) ^ c[3] ^ k1, left & low]
    return np.stack(c, axis=1)


def keep_of(first: int, count: int, seed: int, p: float) -> Tensor:
    counters = np.arange(first // 4, (first + count - 1) // 4 + 1, dtype=np.int64)
    words = philox(counters, seed).reshape(-1)[first % 4 :][:count]
    return torch.from_numpy(words.astype(np.float64) >= p * 2.0**32)


def make(index: int, residual: bool, p: float, dtype: torch.dtype) -> dict:
    n, c, t, lengths = SHAPES[index]
    generator = torch.Generator().manual_seed(100 * index + 10 * residual + (p > 0))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return {
        "y": ntc((draw(n, c, t) + 0.5).to(dtype)),
        "dz": ntc(draw(n, c, t).to(dtype)),
        "residual": ntc(draw(n, c, t).to(dtype)) if residual else None,
        "gamma": 0.5 + draw(c).abs(),
        "beta": draw(c),
        "lengths": None if lengths is None else torch.tensor(lengths),
        "seed": torch.tensor([-(3 << 40) + 77 + index]) if p > 0 else None,
        "p": p,
    }


def run(case: dict) -> dict[str, Tensor]:
    """Runs forward and backward through the face's four functions, with the statistics of the batch."""
    y, mask = case["y"], Mask(case["lengths"], case["seed"], case["p"])
    rows = y.shape[0] * y.shape[2]
    mean, m2 = cpu_impl.stats(y)
    norm = Norm(mean, (m2.double() / rows + EPS).rsqrt().float(), case["gamma"], case["beta"])
    z = cpu_impl.forward(y, norm, case["residual"], mask)
    residual = case["residual"] is not None
    saved = (case["dz"], y, z if residual else None, norm)
    dbeta, dgamma = cpu_impl.backward_reduce(*saved, mask)
    dy, dres = cpu_impl.backward_apply(*saved, (dbeta / rows, dgamma / rows), mask, residual)
    out = {"mean": mean, "m2": m2, "z": z, "dbeta": dbeta, "dgamma": dgamma, "dy": dy}
    return out | ({"dres": dres} if residual else {})


def chain(case: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Computes the same with PyTorch's batch norm, sum, ReLU, dropout (numpy's mask), masked_fill and autograd."""
    n, c, t = case["y"].shape
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    y = case["y"].to(dtype).detach().clone().requires_grad_()
    gamma, beta = (case[k].to(vectors).detach().clone().requires_grad_() for k in ("gamma", "beta"))
    residual = None if case["residual"] is None else case["residual"].to(dtype).detach().clone().requires_grad_()
    alive = torch.ones(n, c, t, dtype=torch.bool)
    if case["p"] > 0:
        alive &= keep_of(0, n * c * t, case["seed"].item(), case["p"]).reshape(n, t, c).transpose(1, 2)
    if case["lengths"] is not None:
        alive &= (torch.arange(t) < case["lengths"][:, None])[:, None]
    pre = F.batch_norm(y, None, None, gamma, beta, True, 0.0, EPS)
    if residual is not None:
        pre = pre + residual
    z = (F.relu(pre) / (1 - case["p"])).masked_fill(~alive, 0.0)
    z.backward(case["dz"].to(dtype))
    out = {"z": z.detach(), "dbeta": beta.grad, "dgamma": gamma.grad, "dy": y.grad}
    return out | ({} if residual is None else {"dres": residual.grad})


@functools.cache
def expected(index: int, residual: bool, p: float, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    case = make(index, residual, p, dtype)
    var, mean = torch.var_mean(case["y"].double(), (0, 2), correction=0)
    ref = chain(case, torch.float64) | {"mean": mean, "m2": var * case["y"][:, 0].numel()}
    return chain(case, dtype), ref


def best_level() -> int:
    return LEVELS.index(native.cpu().isa())


def at_level(level: str, out: Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JASPER_FAST_ISA": level, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, __file__, str(out)], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_against_fp64(level, tmp_path):
    if LEVELS.index(level) > best_level():
        pytest.skip(f"this machine has {LEVELS[best_level()]} only")
    done = at_level(level, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "out.pt")
    assert results.pop("isa") == level
    assert len(results) == len(CASES) * len(DTYPES)
    for (index, residual, p, dtype), got in results.items():
        low, ref = expected(index, residual, p, dtype)
        for name in low:
            label = f"{name} of {SHAPES[index]}, residual {residual}, p {p}, {dtype}"
            assert_close(label, got[name], low[name], ref[name])
        assert torch.allclose(got["mean"].double(), ref["mean"], rtol=1e-6, atol=1e-7)
        assert torch.allclose(got["m2"].double(), ref["m2"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_an_unknown_or_absent_instruction_set_is_an_error(tmp_path):
    done = at_level("sse9", tmp_path / "out.pt")
    assert done.returncode != 0
    assert "JASPER_FAST_ISA=sse9" in done.stderr
    assert "generic, avx2, avx512 or avx512_bf16" in done.stderr


def test_philox_known_answer():
    """Counter 0 under key 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8: p = word / 2**32 keeps the word."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert tuple(philox(np.zeros(1, np.int64), 0)[0]) == words
    for i, word in enumerate(words):
        at, above = (keep_bits(0, 4, 0, (word + more) / 2.0**32) for more in (0, 1))
        assert at[i] and not above[i], hex(word)
        assert torch.equal(at, torch.tensor([w >= word for w in words]))


def keep_bits(first: int, count: int, seed: int, p: float) -> Tensor:
    keep = torch.zeros(count, dtype=torch.bool)
    native.cpu().dropout_keep(torch.tensor([seed]), p, first, keep)
    return keep


@pytest.mark.parametrize("first", [0, 3, 61, (1 << 34) - 70, (1 << 36) + 12345])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_dropout_bits_at_any_element(first, seed):
    """Shows that the dropout bits equal the definition's, also where the counter needs more than 32 bits (element
    2**34)."""
    for p in (0.2, 0.5, 1e-9, 1 - 2.0**-32):
        assert torch.equal(keep_bits(first, 200, seed, p), keep_of(first, 200, seed, p))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        for index, residual in ((1, True), (3, False), (5, True), (7, False)):
            case = make(index, residual, P, dtype)
            torch.set_num_threads(1)
            first = run(case)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                for name, value in run(case).items():
                    assert torch.equal(value, first[name]), f"{name} with {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 255, 256, 257, 6200])
@pytest.mark.parametrize("offset", [0.0, 1e4, -3e5])
def test_variance_under_an_offset_at_every_chunk_edge(rows, offset):
    y = ntc((torch.randn(1, 16, rows) + offset).float())
    mean, m2 = cpu_impl.stats(y)
    var, mean64 = torch.var_mean(y.double(), (0, 2), correction=0)
    assert torch.allclose(mean.double(), mean64, rtol=1.2e-7, atol=1e-12)  # equal to the last bit of fp32
    assert ((m2.double() - rows * var).abs() <= 3e-6 * rows * var).all()


def test_zero_padding_before_data_far_from_zero():
    y = torch.randn(2, 8, 900) + 1e4
    y[1, :, :500] = 0
    y = ntc(y)
    mean, m2 = cpu_impl.stats(y)
    var, mean64 = torch.var_mean(y.double(), (0, 2), correction=0)
    assert torch.allclose(mean.double(), mean64, rtol=1e-6)
    assert torch.allclose(m2.double(), var * 1800, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_survives_loading_and_storing(dtype):
    """Shows that with identity parameters z equals y for every positive bit pattern, subnormal to infinity, and that
    NaN stays NaN."""
    patterns = torch.arange(0, 1 << 31, 40961) if dtype == torch.float32 else torch.arange(0, 1 << 15)
    y = patterns.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)[: len(patterns) // 16 * 16]
    y = y.reshape(1, -1, 16).transpose(1, 2)
    one, zero = torch.ones(16), torch.zeros(16)
    z = cpu_impl.forward(y, Norm(zero, one, one, zero), None, Mask())
    assert torch.equal(z.isnan(), y.isnan())
    assert torch.equal(z[~z.isnan()], y[~y.isnan()])


def test_shapes_dtypes_and_memory_are_checked():
    y, one = ntc(torch.randn(2, 8, 5)), torch.ones(8)

    def forward(y=y, mean=one, residual=None, lengths=None, seed=None, p=0.0):
        cpu_impl.forward(y, Norm(mean, one, one, one), residual, Mask(lengths, seed, p))

    forward()
    for message, wrong in {
        "y must have NTC memory": {"y": torch.randn(2, 8, 5)},
        "y must be fp32, fp16 or bf16": {"y": y.double()},
        r"y must have shape \(N, C, T\)": {"y": y[0]},
        r"mean must have shape \(8,\), has \(7,\)": {"mean": torch.ones(7)},
        "mean must be fp32": {"mean": one.double()},
        "residual must have the dtype of y": {"residual": y.half()},
        "residual must have the shape of y": {"residual": y[:, :, :4]},
        "residual must have NTC memory": {"residual": torch.randn(2, 8, 5)},
        "lengths must be a contiguous int64 tensor": {"lengths": torch.tensor([1, 2], dtype=torch.int32)},
        "seed is needed where p > 0": {"p": 0.1},
        "seed must be an int64 tensor": {"p": 0.1, "seed": torch.ones(1)},
        "p must be at least 0": {"p": -0.1},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            forward(**wrong)
    with pytest.raises(RuntimeError, match="no rows"):
        cpu_impl.stats(torch.empty(0, 8, 5))
    with pytest.raises(RuntimeError, match="z is needed where there is a residual"):
        cpu_impl.backward_apply(y, y, None, Norm(one, one, one, one), None, Mask(), True)


def test_lengths_beyond_the_batch_mean_all_frames_and_negative_ones_none():
    y, one, zero = ntc(torch.rand(2, 8, 5) + 1), torch.ones(8), torch.zeros(8)
    z = cpu_impl.forward(y, Norm(zero, one, one, zero), None, Mask(torch.tensor([9, -4])))
    assert torch.equal(z[0], y[0])
    assert (z[1] == 0).all()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    saved = {(*case, dtype): run(make(*case, dtype)) for case in CASES for dtype in DTYPES}
    torch.save(saved | {"isa": native.cpu().isa()}, sys.argv[1])
