"""Tensors that a test makes without naming a device lie on the device of its face, so one test serves machines with and
without a GPU. Fake tensors, which have no memory, stand in for those of a GPU."""

import conftest
import pytest
import torch
from torch._subclasses import FakeTensorMode

from jasper_fast import ops


def test_a_settled_test_lies_where_its_face_runs(monkeypatch):
    monkeypatch.setattr(conftest, "make_face", lambda name: conftest.Face(name, torch.device("cuda")))
    with FakeTensorMode():
        assert conftest.settle("triton") == "triton"
        y, lengths = torch.randn(2, 16, 9), torch.tensor([9, 4])
        assert y.device.type == lengths.device.type == torch.nn.BatchNorm1d(3).weight.device.type == "cuda"
        one = torch.ones(16)
        z = ops.bn_relu_dropout(y, one, one, None, None, lengths=lengths, p=0.2, backend="triton")
        assert (z.device.type, z.shape) == ("cuda", y.shape)


def test_the_next_test_lies_on_the_cpu_again():
    assert torch.ones(2).device.type == "cpu"


def test_what_wants_the_interpreter_is_skipped_where_kernels_are_compiled(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(pytest.skip.Exception, match="not interpreted"):
        conftest.interpreted()
