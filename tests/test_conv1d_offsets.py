"""The Triton convs reject, before any launch, utterances beyond 32-bit offsets and a workspace on another device.

The tests use tensors on the meta device, which have sizes and strides but no memory.
"""

import pytest
import torch
from conftest import assert_raises

pytest.importorskip("triton")

from jasper_fast.kernels import launch
from jasper_fast.kernels.conv1d import triton_impl
from jasper_fast.kernels.layout import empty_ntc
from jasper_fast.kernels.operands import Geometry

HALF = torch.float16
TOO_LONG = "exceeds 32-bit offsets: cut it into shorter ones"
FRAMES = 1 << 22  # with 512 channels an utterance has 2^31 elements
PACK = triton_impl.Packed(torch.empty(1, 16, 16, dtype=HALF, device="meta"), 16, 16, 1)


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[str]:
    """Records the names of launches instead of running them."""
    names: list[str] = []
    monkeypatch.setattr(launch, "run", lambda kernel, *args, **meta: names.append(kernel.__name__))
    return names


def made(n: int, c: int, t: int) -> torch.Tensor:
    return empty_ntc(n, c, t, like=torch.empty(0, dtype=HALF, device="meta"))


def weight(c_out: int, c_in: int, taps: int = 1) -> torch.Tensor:
    return torch.empty(c_out, c_in, taps, dtype=HALF, device="meta")


def test_an_output_wider_than_its_input_is_refused_where_it_alone_is_too_long(launched):
    packed = torch.empty(triton_impl.packed_shape(weight(528, 16)), dtype=HALF, device="meta")
    narrow, wide, how = made(1, 16, FRAMES), made(1, 528, FRAMES), Geometry()
    assert_raises([
        (lambda: triton_impl.forward(narrow, weight(528, 16), how, packed=packed), TOO_LONG),
        (lambda: triton_impl.wgrad(narrow, wide, 1, how), TOO_LONG),
        (lambda: triton_impl.dgrad(wide, weight(528, 16), FRAMES, how, packed=packed), TOO_LONG),
    ])  # fmt: skip
    assert not launched


def test_many_utterances_may_be_longer_than_that_together(launched):
    triton_impl.wgrad(made(8, 16, FRAMES // 4), made(8, 528, FRAMES // 4), 1, Geometry())
    assert "conv1d_wgrad_kernel" in launched


@pytest.mark.parametrize("place", ["x", "x2", "out"])
def test_a_slice_of_a_wide_history_buffer_is_judged_by_its_strides(launched, place):
    """The slice has few elements, 16 of 1024 channels, but they are far apart in memory."""
    frames = (1 << 21) + 1
    history = torch.empty(1, frames, 1024, dtype=HALF, device="meta")[:, :, :16]
    given = {name: torch.empty(1, frames, 16, dtype=HALF, device="meta") for name in ("x", "x2", "out")}

    def call(frames: int) -> None:
        cut = {name: x[:, :frames] for name, x in (given | {place: history}).items()}
        triton_impl.fused(cut["x"], PACK, Geometry(), panes=(cut["x2"], PACK), out=cut["out"])

    with pytest.raises(ValueError, match=TOO_LONG):
        call(frames)
    assert not launched
    call(frames - 1)  # with one frame less, all offsets fit into 32 bits
    assert launched == ["conv1d_fused_kernel"]


def test_a_workspace_of_another_device_is_refused(launched):
    x = torch.empty(1, 9, 16, dtype=HALF, device="meta")
    with pytest.raises(ValueError, match="the workspace is on cpu, x on meta: make one for each device"):
        triton_impl.fused(x, PACK, Geometry(), workspace=triton_impl.Workspace("cpu"))
    assert not launched
    triton_impl.fused(x, PACK, Geometry(), workspace=triton_impl.Workspace("meta"))
    assert launched == ["conv1d_fused_kernel"]
