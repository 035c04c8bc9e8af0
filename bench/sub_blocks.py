"""Cases of `python -m bench kernels` that hold a convolution: conv1d alone, and from y to y (sub_block).

Every distinct main conv of Jasper 10x5 is a shape; the eager rival masks its input as the reference does.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import correct, counts, kernels, models
from bench.harness import Case, Contender, Run, Runner, seeded, stable_seed
from jasper_fast import ops
from jasper_fast.kernels import layout

GRADIENTS = ("dx", "dweight", "dgamma", "dbeta")
# up to 22,000 products summed in another order: plain PyTorch's own layouts differ by 20 roundings
TOLERANCE = correct.Tolerance(factor=2.0, floor=40.0)


def layer_shapes() -> dict[tuple[int, int, int, int], str]:
    """(C_in, C_out, K, dilation) of Jasper 10x5's distinct stride-1 main convs, widest reduction first, and a name."""
    cfg, found = models.config("jasper10x5"), {}
    for conv in counts.convs(cfg, 1, 64):
        layer = int(conv.name.split(".")[2]) if conv.name.startswith("encoder") else None
        if layer is None or ".res." in conv.name or cfg.encoder.blocks[layer].s != 1:
            continue
        found.setdefault((conv.C_in, conv.C_out, conv.K, cfg.encoder.blocks[layer].d), conv.name)
    return dict(sorted(found.items(), key=lambda item: -item[0][0] * item[0][2]))


class Inputs:
    """One conv's tensors in both memories, the same values, refilled in place."""

    def __init__(
        self, N: int, T: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        C_in, C_out, K, self.dilation = shape
        self.device, self.dtype, self.padding = device, dtype, (K // 2) * self.dilation
        self.nct = {
            "x": torch.empty(N, C_in, T, dtype=dtype, device=device),
            "dy": torch.empty(N, C_out, T, dtype=dtype, device=device),
        }
        self.ntc = {n: layout.ntc(t) for n, t in self.nct.items()}
        self.weight = torch.empty(C_out, C_in, K, dtype=dtype, device=device, requires_grad=True)
        self.gamma, self.beta = (torch.empty(C_in, device=device, requires_grad=True) for _ in range(2))
        self.lengths = torch.empty(N, dtype=torch.int64, device=device)
        for memory in (self.nct, self.ntc):
            memory["x"].requires_grad_()
        self.refill(0)

    @torch.no_grad()
    def refill(self, seed: int) -> None:
        """New values everywhere; lengths between half and full; x zero in the padding, as every op leaves it."""
        g = seeded(stable_seed("conv", seed), self.device)
        N, _, T = self.nct["x"].shape
        self.lengths.copy_(torch.randint(T // 2, T + 1, (N,), generator=g, device=self.device))
        self.lengths[0] = T
        self.gamma.copy_(torch.rand(self.gamma.shape, generator=g, device=self.device) + 0.5)
        self.beta.copy_(torch.randn(self.beta.shape, generator=g, device=self.device) * 0.3)
        for t in self.nct.values():
            t.copy_(torch.randn(t.shape, generator=g, device=self.device))
        x = self.nct["x"].masked_fill(kernels.mask(self.lengths, T), 0)
        self.nct["x"].copy_(kernels.off_the_edge(x, self.gamma, self.beta, None, self.dtype))
        self.nct["x"].masked_fill_(kernels.mask(self.lengths, T), 0)
        for name, t in self.nct.items():
            self.ntc[name].copy_(t)
        scale = (self.weight.shape[1] * self.weight.shape[2]) ** -0.5
        self.weight.copy_(torch.randn(self.weight.shape, generator=g, device=self.device) * scale)

    def fresh_running(self) -> tuple[Tensor, Tensor]:
        """Running statistics as a new layer has them."""
        return torch.zeros_like(self.gamma), torch.ones_like(self.gamma)


def masked(x: Tensor, lengths: Tensor) -> Tensor:
    """x with zeros in the padding, by the reference's masked_fill."""
    return x.masked_fill(kernels.mask(lengths, x.shape[2]), 0)


def eager_conv(x: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """The reference's masked conv in NCT memory."""
    return F.conv1d(masked(x, i.lengths), weight, None, 1, i.padding, i.dilation)


def eager_conv_2d(x: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """The same as a 2D conv over a height of 1 in channels_last memory."""
    x = masked(x, i.lengths).unsqueeze(2)
    return F.conv2d(x, weight.unsqueeze(2), None, 1, (0, i.padding), (1, i.dilation)).squeeze(2)


def eager_sub_block(y: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """Batch norm, ReLU, dropout, mask and the next conv, one module a step in NCT memory."""
    stats = tuple(s.to(gamma.dtype) for s in i.fresh_running())
    z = kernels.eager_chain(y, gamma, beta, stats, None, i.lengths, p)
    return F.conv1d(z, weight, None, 1, i.padding, i.dilation)


def fused_conv(backend: str) -> Callable[..., Tensor]:
    """jasper_fast's conv1d."""

    def call(x: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
        return ops.conv1d(x, weight, lengths=i.lengths, padding=i.padding, dilation=i.dilation, backend=backend)

    return call


def fused_sub_block(backend: str) -> Callable[..., Tensor]:
    """jasper_fast's sub_block."""

    def call(y: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
        more = {"padding": i.padding, "dilation": i.dilation, "p": p, "backend": backend}
        return ops.sub_block(y, gamma, beta, *i.fresh_running(), weight, lengths=i.lengths, **more)

    return call


def leaves(op: str, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> list[Tensor]:
    """What gets a gradient."""
    return [x, weight] + ([gamma, beta] if op == "sub_block" else [])


def results(op: str, out: Tensor, wanted: list[Tensor], dy: Tensor, i: Inputs) -> dict[str, Tensor]:
    """Output and gradients; a conv's dx in the padding belongs to no one, because its input is zero there."""
    found = {"y": out, **dict(zip(GRADIENTS, torch.autograd.grad(out, wanted, dy), strict=False))}
    return found | ({"dx": masked(found["dx"], i.lengths)} if op == "conv1d" else {})


def runner(op: str, function: Callable[..., Tensor], i: Inputs, memory: str, mode: str) -> Runner:
    """An implementation on the inputs of its memory."""
    x, dy = (getattr(i, memory)[n] for n in ("x", "dy"))
    wanted = leaves(op, x, i.weight, i.gamma, i.beta)

    def forward() -> Tensor:
        return function(x, i, i.weight, i.gamma, i.beta, kernels.P)

    def both() -> None:
        torch.autograd.grad(forward(), wanted, dy)

    def outputs() -> dict[str, Tensor]:
        return results(op, function(x, i, i.weight, i.gamma, i.beta, 0.0), wanted, dy, i)

    return Runner(forward if mode == "forward" else both, outputs)


def answer(op: str, i: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients by plain PyTorch in `dtype`."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (i.nct["x"], i.weight))
    gamma, beta = (t.detach().to(wide).requires_grad_() for t in (i.gamma, i.beta))
    function = {"conv1d": eager_conv, "sub_block": eager_sub_block}[op]
    return results(
        op, function(x, i, weight, gamma, beta, 0.0), leaves(op, x, weight, gamma, beta), i.nct["dy"].to(dtype), i
    )


def case(run: Run, op: str, N: int, T: int, shape: tuple[int, int, int, int], mode: str) -> Case:
    """One conv shape and mode."""
    C_in, C_out, K, dilation = shape
    inputs = functools.cache(lambda: Inputs(N, T, shape, run.dtype, run.device))
    fused = {"conv1d": fused_conv, "sub_block": fused_sub_block}[op](run.backend)
    eager = {"conv1d": eager_conv, "sub_block": eager_sub_block}[op]

    def contender(name: str, function: Callable[..., Tensor], memory: str) -> Contender:
        return Contender(name, lambda: runner(op, function, inputs(), memory, mode))

    contenders = [contender("jasper_fast", fused, "ntc"), contender("eager", eager, "nct")]
    if op == "conv1d":
        contenders.append(contender("eager_2d_channels_last", eager_conv_2d, "ntc"))
    conv = counts.Conv("", N, C_in, C_out, K, T, T)
    times, size = (1 if mode == "forward" else 3), run.dtype.itemsize
    norm = counts.bn_relu_dropout_bytes(N, C_in, T, size, mode) if op == "sub_block" else 0
    taps = f"K = {K}" + (f" d = {dilation}" if dilation > 1 else "")
    key = {
        "op": op,
        "shape": f"({N}, {C_in}->{C_out}, {T})",
        "taps": taps,
        "dtype": kernels.name(run.dtype),
        "mode": mode,
    }
    return Case(
        "kernels",
        key,
        contenders,
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(op, inputs(), torch.float64),
        low=lambda: answer(op, inputs(), run.dtype),
        tolerance=TOLERANCE,
        flops=times * conv.flops,
        nbytes=times * conv.nbytes(size) + norm,
        dtype=kernels.name(run.dtype),
    )


def cases(op: str) -> Callable[[Run], list[Case]]:
    """All shapes forward + backward, forward too where that is cheap; the heaviest two layers only when quick."""

    def make(run: Run) -> list[Case]:
        shapes = list(layer_shapes())
        N, T = (32, 832) if run.device.type == "cuda" else (1 if run.brief else 2, 400)
        if run.quick or run.brief:
            shapes = [(768, 768, 25, 1), (256, 256, 11, 1)]
        modes = ("both",) if run.quick or run.brief else ("both", "forward")
        return [case(run, op, N, T, shape, mode) for shape in shapes for mode in modes]

    return make
