"""Shared by the cases of `python -m bench kernels`: constants, masks, the eager chain, tolerances and sizes."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.harness import correct, limits
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.kernels.layout import mask as masked
from jasper_fast.nn.architecture import BN_EPS as EPS
from jasper_fast.nn.architecture import BN_MOMENTUM as MOMENTUM

P = 0.2  # dropout rate
MODES = ("both", "forward", "backward")
Cases = Callable[[Run, str | None], Iterable[list[Case]]]  # (run, mode or None) -> groups of cases, made lazily
# Convs sum up to 22,000 products in another order: even the two layouts of plain PyTorch differ by 20 roundings.
CONV_TOLERANCE = correct.Tolerance(factor=2.0, floor=40.0)
# Four roundings of TF32 (2**-10; fp32's is 2**-23): tensor cores truncate operands. cuDNN decides whether plain PyTorch
# uses TF32, so the error of PyTorch may be far smaller.
ROUNDED = correct.Tolerance(factor=2.0, floor=4.0 * 2**13)


def off_the_edge(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`y`, moved where the ReLU's input is so close to zero that rounding decides whether the ReLU is open."""
    margin = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    y = y.double()
    var, mean = torch.var_mean(y, (0, 2), correction=0)
    scale = (gamma * (var + EPS).rsqrt())[:, None]
    pre = (y - mean[:, None]) * scale + beta[:, None] + (0 if residual is None else residual.double())
    target = 2 * margin * torch.where(pre < 0, -1.0, 1.0)
    return torch.where(pre.abs() < margin, y + (target - pre) / scale, y)


def mask(lengths: Tensor, T: int) -> Tensor:
    """(N, 1, T), true at t >= length."""
    return (torch.arange(T, device=lengths.device) >= lengths[:, None]).unsqueeze(1)


def masked_last(x: Tensor, lengths: Tensor) -> Tensor:
    """`x` masked, in the memory order of `x`; masked_fill would return NCT memory."""
    return torch.where(mask(lengths, x.shape[2]), 0.0, x)


class Held:
    """The inputs of an op, refilled in place. `answers` keeps reference results by seed, for the cases that share the
    inputs."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.answers: dict[tuple, dict[str, Tensor]] = {}
        self.refills = 0

    @torch.no_grad()
    def refill(self, seed: int) -> None:
        """New values everywhere."""
        self.seed, self.refills = seed, self.refills + 1
        self.fill(seeded(stable_seed(type(self).__module__.rpartition(".")[2], seed), self.device))

    def fill(self, g: torch.Generator) -> None:
        """Draw the new values."""
        raise NotImplementedError

    def randn(self, like: Tensor, g: torch.Generator) -> Tensor:
        """Normal random numbers in the shape of `like`."""
        return torch.randn(like.shape, generator=g, device=self.device)

    def positive(self, like: Tensor, g: torch.Generator) -> Tensor:
        """Uniform random numbers from 0.5 to 1.5, for gammas."""
        return torch.rand(like.shape, generator=g, device=self.device) + 0.5

    def draw_lengths(self, lengths: Tensor, T: int, g: torch.Generator) -> None:
        """Random lengths between half and full; the first is full."""
        lengths.copy_(torch.randint(T // 2, T + 1, lengths.shape, generator=g, device=self.device))
        lengths[0] = T

    def autocast(self, on: bool = True) -> contextlib.AbstractContextManager:
        """Autocast as a user of AMP turns it on; nothing in fp32."""
        return autocast(self.device, self.dtype if on else torch.float32)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision for fp16 and bf16, nothing otherwise."""
    return torch.autocast(device.type, dtype) if dtype.itemsize == 2 else contextlib.nullcontext()


def fresh_running(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics as a new layer has them."""
    return torch.zeros_like(gamma), torch.ones_like(gamma)


def timed(
    mode: str, held: Held, forward: Callable[[], object], gradients: Callable[[object, bool], object]
) -> Callable[[], object]:
    """The function to time for an op in training: `forward`, or `gradients(out, retain)` of one forward repeatedly, or
    both."""
    graph: dict[int, object] = {}

    def backward() -> None:
        if held.refills not in graph:  # a check or another case overwrote tensors that the graph saved
            graph.clear()
            graph[held.refills] = forward()
        gradients(graph[held.refills], True)

    return {"forward": forward, "backward": backward, "both": lambda: gradients(forward(), False)}[mode]


Chain = Callable[..., Tensor]  # (y, gamma, beta, running statistics, residual or None, lengths, p) -> z, all (N, C, T)
Stats = tuple[Tensor, Tensor]


def _chain(y: Tensor, gamma: Tensor, beta: Tensor, running: Stats, residual: Tensor | None, p: float) -> Tensor:
    z = F.batch_norm(y, *running, gamma, beta, True, MOMENTUM, EPS)
    return F.dropout((z if residual is None else z + residual).relu_(), p, True)


def eager_chain(
    y: Tensor, gamma: Tensor, beta: Tensor, running: Stats, residual: Tensor | None, lengths: Tensor, p: float
) -> Tensor:
    """Plain PyTorch as the reference runs it: batch norm, sum, in-place ReLU, dropout, masked_fill for the next
    conv."""
    return masked(_chain(y, gamma, beta, running, residual, p), lengths)


def eager_chain_2d(
    y: Tensor, gamma: Tensor, beta: Tensor, running: Stats, residual: Tensor | None, lengths: Tensor, p: float
) -> Tensor:
    """The same chain on NTC memory, seen as a channels_last image of height 1."""
    wide = None if residual is None else residual.unsqueeze(2)
    return masked_last(_chain(y.unsqueeze(2), gamma, beta, running, wide, p).squeeze(2), lengths)


def chosen(run: Run, mode: str | None, every: Sequence[str]) -> tuple[str, ...]:
    """The modes to run: the one asked for, else all; with --quick only forward and backward together."""
    if mode is None:
        return every[:1] if run.quick or run.brief else tuple(every)
    return (mode,) if mode in every else ()


def tolerance(run: Run) -> correct.Tolerance:
    """The tolerance for convs in the dtype of the run. On a GPU fp32 may be rounded to TF32, unless PyTorch is told
    otherwise."""
    rounded = run.dtype is torch.float32 and limits.float32_mode(run.device) == "TF32"
    return ROUNDED if rounded else CONV_TOLERANCE


def slow(run: Run) -> bool:
    """Whether PyTorch's convs take seconds: in fp16 on a CPU."""
    return run.device.type == "cpu" and run.dtype == torch.float16


def size(run: Run) -> tuple[int, int]:
    """(N, T) at which layers inside a block are timed; one utterance of 2 s if convs are `slow`."""
    if run.device.type == "cuda":
        return 32, 832
    return (1, 104) if slow(run) else (1 if run.brief else 2, 400)


def batch(run: Run, layer: Layer) -> tuple[int, int]:
    """(N, T) at which a layer is timed; the first layer gets twice the frames."""
    N, T = size(run)
    return N, T * layer.stride
