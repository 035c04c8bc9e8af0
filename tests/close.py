"""The tolerance rule of the tests that compare kernels with fp64."""

from torch import Tensor

from jasper_fast.selfcheck.tolerance import Tolerance, compare


def assert_close(name: str, got: Tensor, low: Tensor, ref: Tensor, factor: float = 2.0) -> None:
    """Fails the test if `got` is too far from the fp64 result `ref`. The allowed error is `factor` times the error of
    PyTorch's result `low`, which has the dtype of `got`, plus one eps of that dtype.

    In fp32 on a GPU 16 eps are added instead of one. There a sequential sum of a thousand terms has an error of about
    ten eps, and so has a sum on tensor cores, because they truncate. PyTorch's own sum may by chance be nearly exact.
    """
    assert got.dtype == low.dtype, f"{name}: {got.dtype}, PyTorch gives {low.dtype}"
    assert got.numel() > 0, f"{name}: nothing to compare"
    found = compare(got, low, ref, Tolerance(factor, floor=16.0 if got.is_cuda else 1.0))
    assert found.right, f"{name}: {found.detail}"
