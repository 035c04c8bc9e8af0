"""What the cases of `python -m bench kernels` share: constants, masks, the eager chain, tolerances and sizes."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.harness import correct, limits
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.kernels import layout
from jasper_fast.kernels.layout import mask as masked
from jasper_fast.nn.architecture import BN_EPS as EPS, BN_MOMENTUM as MOMENTUM

P = 0.2  # dropout rate
MODES = ("both", "forward", "backward")
Cases = Callable[[Run, str | None], Iterable[list[Case]]]  # (run, mode or None) -> groups of cases
# An output of a conv is the sum of up to 22,272 products, and the order of the sum depends on the kernel. Even
# PyTorch's own convs in NCT and in channels_last memory differ by 20 eps.
CONV_TOLERANCE = correct.Tolerance(factor=2.0, floor=40.0)
# For fp32 convs that may use TF32. The floor is four eps of TF32 (2**-10), in units of the eps of fp32 (2**-23),
# because tensor cores truncate the operands. PyTorch's own error cannot set the limit, because cuDNN may choose a
# kernel without TF32.
ROUNDED = correct.Tolerance(factor=2.0, floor=4.0 * 2**13)


def off_the_edge(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns `y`, changed where the ReLU's input is so close to zero that rounding would decide its sign."""
    margin = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    y = y.double()
    var, mean = torch.var_mean(y, (0, 2), correction=0)
    scale = (gamma * (var + EPS).rsqrt())[:, None]
    pre = (y - mean[:, None]) * scale + beta[:, None] + (0 if residual is None else residual.double())
    target = 2 * margin * torch.where(pre < 0, -1.0, 1.0)
    return torch.where(pre.abs() < margin, y + (target - pre) / scale, y)


def masked_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Returns `x` (N, C, T) with zeros at t >= length, in the memory order of `x`. masked_fill would return NCT
    memory."""
    return torch.where(layout.padding(lengths, x.shape[2]), 0.0, x)


class Held:
    """The inputs of an op, which are refilled in place. A subclass has the method `fill(g)`, which draws new values.

    `nct` and `ntc` have the same activations in both memory orders, by name; `shapes` are their (C, T). `answers`
    caches reference results by seed, for the cases that share the inputs. `refills` counts the refills.
    """

    def __init__(self, N: int, dtype: torch.dtype, device: torch.device, **shapes: tuple[int, int]) -> None:
        self.dtype, self.device = dtype, device
        self.nct = {name: torch.empty(N, C, T, dtype=dtype, device=device) for name, (C, T) in shapes.items()}
        self.ntc = {name: layout.ntc(t) for name, t in self.nct.items()}
        self.lengths = torch.empty(N, dtype=torch.int64, device=device)
        self.answers: dict[tuple, dict[str, Tensor]] = {}
        self.refills = 0

    @torch.no_grad()
    def refill(self, seed: int) -> None:
        """Writes new values into all inputs. Those of `ntc` are copies of those of `nct`."""
        self.seed, self.refills = seed, self.refills + 1
        self.fill(seeded(stable_seed(type(self).__module__.rpartition(".")[2], seed), self.device))
        for name, t in self.nct.items():
            self.ntc[name].copy_(t)

    def once_per_refill(self, make: Callable) -> Callable:
        """Returns a function that calls `make` at its first call after each refill, and otherwise returns the last
        result."""
        after = functools.lru_cache(1)(lambda refills: make())
        return lambda: after(self.refills)

    def randn(self, like: Tensor, g: torch.Generator) -> Tensor:
        """Returns normal random numbers in the shape of `like`."""
        return torch.randn(like.shape, generator=g, device=self.device)

    def draw_norm(self, gamma: Tensor, beta: Tensor, g: torch.Generator) -> None:
        """Draws a gamma from 0.5 to 1.5 and a beta around zero."""
        gamma.copy_(torch.rand(gamma.shape, generator=g, device=self.device) + 0.5)
        beta.copy_(self.randn(beta, g) * 0.3)

    def draw_lengths(self, T: int, g: torch.Generator) -> None:
        """Draws lengths from T / 2 to T. The first utterance has the length T."""
        self.lengths.copy_(torch.randint(T // 2, T + 1, self.lengths.shape, generator=g, device=self.device))
        self.lengths[0] = T

    def autocast(self, on: bool = True) -> contextlib.AbstractContextManager:
        """Returns `autocast` in the dtype of the activations, or a context that does nothing if `on` is false."""
        return autocast(self.device, self.dtype if on else torch.float32)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Returns torch.autocast for fp16 and bf16, and a context that does nothing for other dtypes."""
    return torch.autocast(device.type, dtype) if dtype.itemsize == 2 else contextlib.nullcontext()


def fresh_running(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the running mean and variance of a new layer."""
    return torch.zeros_like(gamma), torch.ones_like(gamma)


def timed(
    mode: str, held: Held, forward: Callable[[], object], gradients: Callable[..., object]
) -> Callable[[], object]:
    """Returns the function to time for an op in training.

    In the mode "forward" the returned function calls `forward`. In "backward" it calls only `gradients(out,
    retain_graph=True)`, and all its calls share the `out` of one forward pass. In "both" it calls `forward` and then
    `gradients`.
    """
    shared = held.once_per_refill(forward)  # a refill overwrites tensors that the graph has saved
    backward = lambda: gradients(shared(), retain_graph=True)  # noqa: E731
    return {"forward": forward, "backward": backward, "both": lambda: gradients(forward())}[mode]


Chain = Callable[..., Tensor]  # (y, gamma, beta, running statistics, residual or None, lengths, p) -> z (N, C, T)
Stats = tuple[Tensor, Tensor]


def _chain(y: Tensor, gamma: Tensor, beta: Tensor, running: Stats, residual: Tensor | None, p: float) -> Tensor:
    z = F.batch_norm(y, *running, gamma, beta, True, MOMENTUM, EPS)
    return F.dropout((z if residual is None else z + residual).relu_(), p, True)


def eager_chain(
    y: Tensor, gamma: Tensor, beta: Tensor, running: Stats, residual: Tensor | None, lengths: Tensor, p: float
) -> Tensor:
    """Computes the chain as NVIDIA's Jasper does: batch norm, sum, in-place ReLU, dropout, and masked_fill for the next
    conv."""
    return masked(_chain(y, gamma, beta, running, residual, p), lengths)


def eager_chain_2d(
    y: Tensor, gamma: Tensor, beta: Tensor, running: Stats, residual: Tensor | None, lengths: Tensor, p: float
) -> Tensor:
    """Computes the same as `eager_chain` in NTC memory, which is a channels_last image of height 1."""
    wide = None if residual is None else residual.unsqueeze(2)
    return masked_last(_chain(y.unsqueeze(2), gamma, beta, running, wide, p).squeeze(2), lengths)


def chosen(run: Run, mode: str | None, every: Sequence[str]) -> tuple[str, ...]:
    """Returns the modes to run: `mode`, or none if `every` lacks it. If `mode` is None, they are all of `every`, or
    only the first if the run is `quick` or `brief`."""
    if mode is None:
        return every[:1] if run.quick or run.brief else tuple(every)
    return (mode,) if mode in every else ()


def tolerance(run: Run) -> correct.Tolerance:
    """Returns the tolerance for convs in the dtype of the run. On a GPU, PyTorch by default allows TF32 for fp32
    convs."""
    rounded = run.dtype is torch.float32 and limits.float32_mode(run.device) == "TF32"
    return ROUNDED if rounded else CONV_TOLERANCE


def slow(run: Run) -> bool:
    """Whether PyTorch's convs take seconds, as in fp16 on a CPU."""
    return run.device.type == "cpu" and run.dtype == torch.float16


def size(run: Run) -> tuple[int, int]:
    """Returns the (N, T) at which layers inside a block are timed: one utterance of 2 s if convs are `slow`."""
    if run.device.type == "cuda":
        return 32, 832
    return (1, 104) if slow(run) else (1 if run.brief else 2, 400)


def batch(run: Run, layer: Layer) -> tuple[int, int]:
    """Returns the (N, T) at which a layer is timed. The first layer, with stride 2, gets twice the frames."""
    N, T = size(run)
    return N, T * layer.stride
