"""What the cases of `python -m bench kernels` share: constants, masks, the eager chain, tolerance and sizes."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.harness import correct, limits
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.run import Run

P, EPS, MOMENTUM = 0.2, 1e-3, 0.1
MODES = ("both", "forward", "backward")
Cases = Callable[[Run, str | None], Iterable[list[Case]]]  # of one mode or all, in groups made one after another
# of convs, up to 22,000 products summed in another order: plain PyTorch's own layouts differ by 20 roundings
CONV_TOLERANCE = correct.Tolerance(factor=2.0, floor=40.0)
# Four roundings of TF32 (2**-10, where fp32's is 2**-23): tensor cores cut operands off, and whether plain PyTorch
# rounds is cuDNN's choice, so that its own error may be none.
ROUNDED = correct.Tolerance(factor=2.0, floor=4.0 * 2**13)


def off_the_edge(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`y` moved where the ReLU's input lies within roundings of zero: there two right answers may differ altogether."""
    margin = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    y = y.double()
    var, mean = torch.var_mean(y, (0, 2), correction=0)
    scale = (gamma * (var + EPS).rsqrt())[:, None]
    pre = (y - mean[:, None]) * scale + beta[:, None] + (0 if residual is None else residual.double())
    target = 2 * margin * torch.where(pre < 0, -1.0, 1.0)
    return torch.where(pre.abs() < margin, y + (target - pre) / scale, y)


def mask(lengths: Tensor, T: int) -> Tensor:
    """(N, 1, T), true at t >= length, as the reference builds it before every conv."""
    return (torch.arange(T, device=lengths.device) >= lengths[:, None]).unsqueeze(1)


def zeroed(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros where `mask`, in the memory that `x` has: masked_fill would answer in NCT memory."""
    return torch.where(mask, 0.0, x)


def masked(x: Tensor, lengths: Tensor) -> Tensor:
    """x with zeros in the padding, by the reference's masked_fill."""
    return x.masked_fill(mask(lengths, x.shape[2]), 0)


def masked_last(x: Tensor, lengths: Tensor) -> Tensor:
    """The same of x in NTC memory, which it stays in."""
    return zeroed(x, mask(lengths, x.shape[2]))


def eager_chain(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running: tuple[Tensor, Tensor],
    residual: Tensor | None,
    lengths: Tensor,
    p: float,
) -> Tensor:
    """Plain PyTorch as the reference runs it: batch norm, sum, ReLU in place, dropout, the next conv's masked_fill."""
    z = F.batch_norm(y, *running, gamma, beta, True, MOMENTUM, EPS)
    if residual is not None:
        z = z + residual
    return F.dropout(z.relu_(), p, True).masked_fill(mask(lengths, y.shape[2]), 0)


def eager_chain_2d(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running: tuple[Tensor, Tensor],
    residual: Tensor | None,
    lengths: Tensor,
    p: float,
) -> Tensor:
    """The same chain on NTC memory, seen as a channels_last image of height 1."""
    wide = None if residual is None else residual.unsqueeze(2)
    z = F.batch_norm(y.unsqueeze(2), *running, gamma, beta, True, MOMENTUM, EPS)
    if wide is not None:
        z = z + wide
    return zeroed(F.dropout(z.relu_(), p, True), mask(lengths, y.shape[2]).unsqueeze(2)).squeeze(2)


def name(dtype: torch.dtype) -> str:
    """float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


def chosen(run: Run, mode: str | None, every: Sequence[str]) -> tuple[str, ...]:
    """Of an op's modes the one that was asked for, else all of them; when quick forward and backward together."""
    if mode is None:
        return every[:1] if run.quick or run.brief else tuple(every)
    return (mode,) if mode in every else ()


def tolerance(run: Run) -> correct.Tolerance:
    """That of convs in the run's dtype: fp32 may be rounded to TF32 on a GPU, unless PyTorch is told otherwise."""
    rounded = run.dtype is torch.float32 and limits.float32_mode(run.device) == "TF32"
    return ROUNDED if rounded else CONV_TOLERANCE


def slow(run: Run) -> bool:
    """Whether PyTorch's convs take seconds: in fp16 on a CPU."""
    return run.device.type == "cpu" and run.dtype == torch.float16


def size(run: Run) -> tuple[int, int]:
    """(N, T) that a block's interior is timed at; one utterance of 2 s where convs are `slow`."""
    if run.device.type == "cuda":
        return 32, 832
    return (1, 104) if slow(run) else (1 if run.brief else 2, 400)


def batch(run: Run, layer: Layer) -> tuple[int, int]:
    """(N, T) that a layer is timed at; the prologue sees twice the frames."""
    N, T = size(run)
    return N, T * layer.stride
