"""Tests parts of bn_relu_dropout that only the CPU face has: threads, chunks of rows, conversions, its own Philox."""

from functools import partial

import pytest
import torch
from conftest import assert_raises, make_face
from test_bn_relu_dropout import Case, assert_same, assert_statistics, check, dtypes, make, rectified, residuals, run
from torch import Tensor

from jasper_fast.kernels import native, philox
from jasper_fast.kernels.bn_relu_dropout import cpu_impl
from jasper_fast.kernels.layout import ntc
from jasper_fast.kernels.operands import Mask, Norm

pytestmark = pytest.mark.skipif(not native.cpu_available(), reason="the native CPU library is not built: make install")

# (N, C, T, lengths)
SHAPES = {
    "channels of two chunks": (2, 1030, 43, [43, 20]),
    "one row is longer than a block": (1, 5000, 3, [2]),
    "twenty chunks of rows": (1, 3, 5000, [4100]),
    "one channel": (1, 1, 7, [3]),
    "no lengths": (3, 16, 53, None),
}


def case_of(name: str, dtype: torch.dtype, residual: bool) -> Case:
    n, c, t, lengths = SHAPES[name]
    return make(n, c, t, dtype=dtype, device="cpu", residual=residual, lengths=lengths, p=0.2)


@dtypes
@residuals
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_and_chunks(name, residual, dtype):
    check(make_face("cpu"), case_of(name, dtype, residual))


def keep_bits(first: int, count: int, seed: int, p: float) -> Tensor:
    keep = torch.zeros(count, dtype=torch.bool)
    native.cpu().dropout_keep(torch.tensor([seed]), p, first, keep)
    return keep


def test_words_at_the_threshold():
    """An element whose random word is w is kept at p = w / 2**32 and dropped at the next larger p."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # from Philox with counter 0 and key 0
    for i, word in enumerate(words):
        at, above = (keep_bits(0, 4, 0, (word + more) / 2.0**32) for more in (0, 1))
        assert torch.equal(at, torch.tensor([w >= word for w in words])) and not above[i], hex(word)


@pytest.mark.parametrize("first", [0, 3, 61, (1 << 34) - 70, (1 << 36) + 12345])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_dropout_bits_at_any_element(first, seed):
    """The dropout bits equal the definition's. From element 2**34 on, the counter needs more than 32 bits."""
    words = philox.words(first // 4, 51, seed).flatten()[first % 4 :][:200]
    for p in (0.2, 0.5, 1e-9, 1 - 2.0**-32):
        assert torch.equal(keep_bits(first, 200, seed, p), words >= philox.threshold(p))


@dtypes
@residuals
@pytest.mark.parametrize("name", SHAPES)
def test_results_do_not_depend_on_the_number_of_threads(name, residual, dtype):
    case = case_of(name, dtype, residual)
    torch.set_num_threads(1)
    want = run(cpu_impl, case, training=True)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same(run(cpu_impl, case, training=True), want)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 255, 256, 257, 6200])
@pytest.mark.parametrize("offset", [0.0, 1e4, -3e5])
def test_variance_under_an_offset_at_every_chunk_edge(rows, offset):
    assert_statistics(cpu_impl.stats, ntc(torch.randn(1, 16, rows) + offset), mean=torch.finfo().eps, m2=3e-6)


def test_zero_padding_before_data_far_from_zero():
    y = torch.randn(2, 8, 900) + 1e4
    y[1, :, :500] = 0
    assert_statistics(cpu_impl.stats, ntc(y), mean=1e-6, m2=1e-6)


@dtypes
def test_every_value_survives_loading_and_storing(dtype):
    """z equals y for all numbers from 0 to infinity in 16 bits, and for a sample of the finite ones in fp32. NaN stays
    NaN."""
    patterns = torch.arange(0, 1 << 31, 40961) if dtype == torch.float32 else torch.arange(0, 1 << 15)
    y = patterns.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)[: len(patterns) // 16 * 16]
    y = y.reshape(1, -1, 16).transpose(1, 2)
    torch.testing.assert_close(rectified(cpu_impl, y, Mask()), y, rtol=0, atol=0, equal_nan=True)


def test_shapes_dtypes_and_memory_are_checked():
    y, one = ntc(torch.randn(2, 8, 5)), torch.ones(8)

    def forward(y=y, mean=one, residual=None, lengths=None, seed=None, p=0.0):
        cpu_impl.forward(y, Norm(mean, one, one, one), residual, Mask(lengths, seed, p))

    forward()
    assert_raises(
        [
            (partial(forward, y=torch.randn(2, 8, 5)), "y must have NTC memory"),
            (partial(forward, y=y.double()), "y must be fp32, fp16 or bf16"),
            (partial(forward, y=y[0]), r"y must have shape \(N, C, T\)"),
            (partial(forward, mean=torch.ones(7)), r"mean must have shape \(8,\), has \(7,\)"),
            (partial(forward, mean=one.double()), "mean must be fp32"),
            (partial(forward, residual=y.half()), "residual must have the dtype of y"),
            (partial(forward, residual=y[:, :, :4]), "residual must have the shape of y"),
            (partial(forward, residual=torch.randn(2, 8, 5)), "residual must have NTC memory"),
            (partial(forward, lengths=torch.tensor([1, 2]).int()), "lengths must be a contiguous int64 tensor"),
            (partial(forward, p=0.1), "seed is needed where p > 0"),
            (partial(forward, p=0.1, seed=torch.ones(1)), "seed must be an int64 tensor"),
            (partial(forward, p=-0.1), "p must be at least 0"),
            (partial(cpu_impl.stats, torch.empty(0, 8, 5)), "no rows"),
            (
                partial(cpu_impl.backward_apply, y, y, None, Norm(one, one, one, one), None, Mask(), True),
                "z is needed where there is a residual",
            ),
        ],
        RuntimeError,
    )


def test_lengths_beyond_the_batch_mean_all_frames_and_negative_ones_none():
    y = ntc(torch.rand(2, 8, 5) + 1)
    z = rectified(cpu_impl, y, Mask(torch.tensor([9, -4])))
    assert torch.equal(z[0], y[0])
    assert (z[1] == 0).all()
