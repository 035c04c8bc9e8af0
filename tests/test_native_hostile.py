"""The ops of the CPU library refuse arguments that they cannot work with, and name them, instead of crashing."""

import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from language_models import needs_native

from jasper_fast.kernels import native
from jasper_fast.kernels.prefix_beam import cpu_impl as prefix_beam
from jasper_fast.lm import train

pytestmark = needs_native
X, Y, Z = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)
HUGE = 2**62


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    torch.set_num_threads(request.param)  # conftest.unsettled restores the number


def conv(taps=3, stride=1, dilation=1, padding=1, level=0, y=Y) -> None:
    ops = native.cpu()
    packed = torch.zeros(ops.conv1d_packed_size(y.shape[2], 3, taps, False, level, False))
    given = y.shape[2], taps, stride, dilation, padding, level, None, None, False, None, None, None
    ops.conv1d_fwd(X, packed, *given, y)


def conv_wgrad(taps=3, stride=1, dilation=1, padding=1, level=0, y=Y) -> None:
    native.cpu().conv1d_wgrad(X, y, None, stride, dilation, padding, level, False, torch.zeros(y.shape[2], 3, taps))


def depthwise(taps=3, stride=1, dilation=1, padding=1, up=1, y=Z) -> None:
    native.cpu().depthwise_sum(X, torch.zeros(taps * 32), taps, stride, dilation, padding, up, None, None, y)


def depthwise_wgrad(taps=3, stride=1, dilation=1, padding=1) -> None:
    native.cpu().depthwise_wgrad(X, X, stride, dilation, padding, None, None, torch.zeros(3, 1, taps))


@pytest.mark.parametrize("function", [conv, conv_wgrad])
@pytest.mark.parametrize(
    "geometry",
    [
        {"taps": 5, "dilation": HUGE, "padding": 0},  # dilation * (K - 1) is 0 in 64 bits
        {"taps": 1, "padding": 2**63 - 1, "y": Y[:, :3]},  # 2 * padding is -2
        {"dilation": 2**40, "padding": 2**40},
        {"stride": HUGE, "y": Y[:, :1]},
        {"taps": 4, "dilation": 2**61, "padding": 2**61 + 2**60, "level": 2},
    ],
)
def test_a_conv_refuses_a_geometry_whose_row_numbers_overflow(function, geometry):
    with pytest.raises(RuntimeError, match=r"conv1d: K, stride, dilation, padding .* must be below 2\^31, got K = \d"):
        function(**geometry)


@pytest.mark.parametrize("function", [depthwise, depthwise_wgrad])
@pytest.mark.parametrize(
    "geometry", [{"stride": 2**59}, {"dilation": HUGE}, {"padding": 2**63 - 1}, {"padding": -(2**63)}]
)
def test_a_depthwise_conv_refuses_a_geometry_whose_row_numbers_overflow(function, geometry):
    with pytest.raises(RuntimeError, match=r"depthwise: K, stride, dilation.* must be below 2\^31, got K = 3"):
        function(**geometry)


@pytest.fixture
def little_memory():
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_that_a_task_does_not_get_is_an_error(little_memory):
    for function, op, padding in ((conv, "conv1d", 2**26), (conv_wgrad, "conv1d", 2**26), (depthwise, "depthwise", 1)):
        with pytest.raises(RuntimeError, match=f"{op}: not enough memory for this K, stride and dilation"):
            function(dilation=2**26, padding=padding)
        function()  # the working memory of the thread is still good


@pytest.mark.parametrize("sizes", [(-1, 3, 3), (4, -3, 3), (4, 3, 0), (2**40, 2**40, 3)])
def test_a_pack_has_a_size(sizes):
    with pytest.raises(RuntimeError, match=r"C_out and C_in must be >= 0 and K >= 1, with less than 1e15 weights"):
        native.cpu().conv1d_packed_size(*sizes, False, 0, False)


def test_a_conv_without_outputs_does_nothing():
    conv(y=Y[..., :0])


@pytest.mark.parametrize(("function", "channels"), [(conv, 4), (depthwise, 3)])
def test_rows_of_the_result_share_no_memory(function, channels):
    for y in (torch.zeros(2, 1, channels), torch.zeros(1, 5, channels), torch.zeros(1, 1, channels)):
        with pytest.raises(RuntimeError, match="rows of y share memory"):
            function(y=y.expand(2, 5, channels))
    wide = torch.full((5, 2, 9), 7.0)  # rows of a wider buffer, in which utterances are closer together than frames
    function(y=wide[..., 1 : 1 + channels].transpose(0, 1))
    assert (wide == 0).sum() == 2 * 5 * channels


@pytest.mark.parametrize(
    ("xs", "weights", "message"),
    [
        ([X], [torch.zeros(4)], r"weights\[0\] must be \(4, 3, 1\)"),
        ([X, X], [torch.zeros(4, 3, 1), torch.zeros(4, 2, 1)], r"weights\[1\] must be \(4, 3, 1\)"),
        ([X, X[0]], [torch.zeros(4, 3, 1)] * 2, r"xs\[1\] must be \(N, T, C\) with C > 0"),
        ([X[..., :0]], [torch.zeros(4, 0, 1)], r"xs\[0\] must be \(N, T, C\) with C > 0"),
    ],
)
def test_panes_name_the_operand_that_does_not_fit(xs, weights, message):
    with pytest.raises(RuntimeError, match=message):
        native.cpu().panes_outputs(xs, weights, None, torch.zeros(len(xs), 10, 4))


def test_a_beam_may_be_larger_than_memory():
    log_probs, lengths = torch.randn(2, 4, 4).log_softmax(2), torch.tensor([4, 3])
    want = prefix_beam.search(log_probs, lengths, 10**4, 3)
    torch.testing.assert_close(prefix_beam.search(log_probs, lengths, 2**61, 3), want, rtol=0, atol=0)


def test_a_search_names_the_counts_that_do_not_fit():
    log_probs, lengths = torch.zeros(1, 2, 3), torch.tensor([2])
    outputs = [torch.zeros(8, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2).double()]
    with pytest.raises(RuntimeError, match=r"counts must be \(N, n_best\)"):
        native.cpu().prefix_beam(log_probs, lengths, 8, [], 0, 0.0, 0.0, [], 0, [], 0, *outputs)


def test_a_symbol_that_is_nan_does_not_hide_others():
    log_probs, lengths = torch.randn(1, 20, 301).log_softmax(2), torch.tensor([20])
    log_probs[..., 1::3] = -torch.inf
    want = prefix_beam.search(log_probs, lengths, 8, 4)
    log_probs[..., 1::3] = torch.nan
    torch.testing.assert_close(prefix_beam.search(log_probs, lengths, 8, 4), want, rtol=0, atol=0)


def test_a_sorted_file_that_cannot_be_read_is_an_error(tmp_path):
    """Without the error, the n-grams in the file would be missing from the model."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        trainer = train._Trainer(1, folder, 0, [0])
        words = np.arange(3, 5003, dtype=np.int32)
        trainer.call("add", words.ctypes.data_as(train.ctypes.c_void_p), train.ctypes.c_int64(len(words)))
        files = [fd for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(fd)]
        assert files
        unreadable = os.open("/dev/null", os.O_WRONLY)
        for fd in files:
            os.dup2(unreadable, int(fd.name))
        os.close(unreadable)
        with pytest.raises(OSError, match="a temporary file cannot be read: "):
            trainer.call("step", 0)
        trainer.close()
