"""Cases of `python -m bench kernels` with a convolution in training: conv1d, and the sub-block.

The shapes are the distinct main convs of Jasper 10x5: the first (stride 2, from features), eleven at stride 1, and the
decoder's. A sub-block in training is batch norm, ReLU, dropout and mask of one conv's output, and then the next conv.
The first conv has no norm before it. With 16-bit activations the weight is the fp32 master weight of AMP, and eager
PyTorch runs under autocast, which casts it.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import ops
from jasper_fast.bench.cases import common, counts
from jasper_fast.bench.cases.layers import Layer, conv_2d
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice, compiler
from jasper_fast.bench.rivals.cudnn_graphs import FusedConv
from jasper_fast.kernels import layout


class Inputs(common.Held):
    """The tensors of one layer in NCT and in NTC memory, with the same values.

    `weight` is fp32 even with 16-bit activations. `weight_last` is the same weight in channels_last memory. Without it
    a 2D conv in that memory would reorder the weight in every call.
    """

    def __init__(self, N: int, T: int, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(N, dtype, device, x=(layer.C_in, T), dy=(layer.C_out, layer.frames(T)))
        self.layer = layer
        self.weight = torch.empty(
            layer.C_out, layer.C_in, layer.K, dtype=torch.promote_types(dtype, torch.float32), device=device,
            requires_grad=True,
        )  # fmt: skip
        self.weight_last = layout.ntc(self.weight.detach()).requires_grad_()
        self.gamma, self.beta = (torch.empty(layer.C_in, device=device, requires_grad=True) for _ in range(2))
        for memory in (self.nct, self.ntc):
            memory["x"].requires_grad_(not layer.first)
        self.refill(0)

    def fill(self, g: torch.Generator) -> None:
        """Draws new values. x is zero in the padding, as in the model."""
        self.draw_lengths(self.nct["x"].shape[2], g)
        self.draw_norm(self.gamma, self.beta, g)
        x, dy = (self.randn(self.nct[name], g) for name in ("x", "dy"))
        x = common.masked(x, self.lengths)
        if not self.layer.first:
            x = common.masked(common.off_the_edge(x, self.gamma, self.beta, None, self.dtype), self.lengths)
        self.nct["x"].copy_(x)
        self.nct["dy"].copy_(dy)
        self.weight.copy_(self.randn(self.weight, g) * (self.layer.C_in * self.layer.K) ** -0.5)
        self.weight_last.copy_(self.weight)


def eager_conv(x: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """Computes mask and conv as NVIDIA's Jasper does, in NCT memory. The last three arguments are not used."""
    a = i.layer
    return F.conv1d(common.masked(x, i.lengths), weight, None, a.stride, a.padding, a.dilation)


def eager_conv_2d(x: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """Computes the same as `eager_conv` in channels_last memory."""
    return conv_2d(common.masked_last(x, i.lengths), weight, i.layer)


def eager_sub_block(y: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """Computes batch norm, ReLU, dropout, mask and the next conv one after the other, in NCT memory."""
    z = common.eager_chain(y, gamma, beta, common.fresh_running(gamma.detach()), None, i.lengths, p)
    return F.conv1d(z, weight, None, 1, i.layer.padding, i.layer.dilation)


def eager_sub_block_2d(y: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """Computes the same as `eager_sub_block` in channels_last memory."""
    z = common.eager_chain_2d(y, gamma, beta, common.fresh_running(i.gamma), None, i.lengths, p)
    return conv_2d(z, weight, i.layer)


def fused_conv(backend: str, x: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
    """Computes jasper_fast's conv1d with the arguments of `eager_conv`."""
    return ops.conv1d(
        x,
        weight,
        lengths=i.lengths,
        stride=i.layer.stride,
        padding=i.layer.padding,
        dilation=i.layer.dilation,
        backend=backend,
    )


def fused_sub_block(
    backend: str, y: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float
) -> Tensor:
    """Computes jasper_fast's sub_block with the arguments of `eager_sub_block`."""
    return ops.sub_block(
        y,
        gamma,
        beta,
        *common.fresh_running(i.gamma),
        weight,
        lengths=i.lengths,
        padding=i.layer.padding,
        dilation=i.layer.dilation,
        p=p,
        backend=backend,
    )


def cudnn_statistics(op: str, i: Inputs) -> Callable[..., Tensor]:
    """Returns a function without backward: the mask (op "conv1d") or the chain ("sub_block") in channels_last memory,
    and then cuDNN's conv that also computes the sums for the next batch norm."""
    a = i.layer
    conv = FusedConv(i.ntc["x"].detach(), i.weight.detach().to(i.dtype), a.stride, a.padding, a.dilation, stats=True)

    def call(y: Tensor, i: Inputs, weight: Tensor, gamma: Tensor, beta: Tensor, p: float) -> Tensor:
        conv.weight.copy_(weight.detach().unsqueeze(2))  # the cast of AMP, once per step
        if op == "conv1d":
            return conv(common.masked_last(y, i.lengths))
        return conv(common.eager_chain_2d(y, gamma, beta, common.fresh_running(i.gamma), None, i.lengths, p))

    return call


# op: (ours, eager, eager in channels_last memory)
OPS = {
    "conv1d": (fused_conv, eager_conv, eager_conv_2d),
    "sub_block": (fused_sub_block, eager_sub_block, eager_sub_block_2d),
}

# ------------------------------------------------------------------ running and checking


def leaves(op: str, i: Inputs, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that get a gradient, by the name of the gradient."""
    if i.layer.first:
        return {"dweight": weight}
    return {"dx": x, "dweight": weight} | ({"dgamma": gamma, "dbeta": beta} if op == "sub_block" else {})


def results(op: str, out: Tensor, wanted: dict[str, Tensor], dy: Tensor, i: Inputs) -> dict[str, Tensor]:
    """Returns the output and gradients. In the padding the dx of conv1d is set to zero, because contenders may differ
    there."""
    found = {"y": out, **dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), dy), strict=True))}
    if op == "conv1d" and "dx" in found:
        found["dx"] = common.masked(found["dx"], i.lengths)
    return found


def runner(
    op: str, function: Callable[..., Tensor], i: Inputs, memory: str, mode: str, *, amp: bool, last: bool = False
) -> Runner:
    """Returns the runner of an implementation, on inputs in its memory order.

    With `amp` the implementation runs under autocast. With `last` its weight is `weight_last`.
    """
    x, dy = (getattr(i, memory)[n] for n in ("x", "dy"))
    weight = i.weight_last if last else i.weight
    wanted = leaves(op, i, x, weight, i.gamma, i.beta)

    def forward(p: float = common.P) -> Tensor:
        with i.autocast(amp):
            return function(x, i, weight, i.gamma, i.beta, p)

    def outputs() -> dict[str, Tensor]:
        out = forward(0.0)
        return {"y": out} if mode == "forward" else results(op, out, wanted, dy, i)

    gradients = functools.partial(torch.autograd.grad, inputs=list(wanted.values()), grad_outputs=dy)
    return Runner(common.timed(mode, i, forward, gradients), outputs)


def answer(op: str, i: Inputs, dtype: torch.dtype, mode: str) -> dict[str, Tensor]:
    """Returns the output and gradients of plain PyTorch in `dtype` (for 16 bits, under autocast).

    The answer for an op, a seed and a dtype is kept. Its gradients, which are twice the work, are computed only for a
    mode that needs them.
    """
    every = (op, i.seed, dtype)
    key = every if every in i.answers or mode != "forward" else (*every, mode)
    if key not in i.answers:
        wide = torch.promote_types(dtype, torch.float32)
        x = i.nct["x"].detach().to(dtype).requires_grad_(not i.layer.first)
        weight, gamma, beta = (t.detach().to(wide).requires_grad_() for t in (i.weight, i.gamma, i.beta))
        with i.autocast(dtype is not torch.float64):
            out = OPS[op][1](x, i, weight, gamma, beta, 0.0)
        wanted, dy = leaves(op, i, x, weight, gamma, beta), i.nct["dy"].to(dtype)
        found = {} if mode == "forward" else results(op, out, wanted, dy, i)
        i.answers[key] = found | {"y": out.detach()}
    found = i.answers[key]
    return {"y": found["y"]} if mode == "forward" else found


def case(
    run: Run, op: str, N: int, T: int, layer: Layer, mode: str, shared: Callable[[], Inputs] | None = None
) -> Case:
    """Returns the case of one layer and mode, for `N` utterances of `T` frames. Cases of one layer may share inputs.

    If only the forward pass is timed, only its output is checked. In the other modes the gradients are checked too. The
    first layer's sub-block is only a conv1d, because there is no norm before it.
    """
    inputs = shared or functools.cache(lambda: Inputs(N, T, layer, run.dtype, run.device))
    norm = op == "sub_block" and not layer.first
    computed = "sub_block" if norm else "conv1d"
    ours, eager, eager_2d = OPS[computed]

    def cudnn() -> Callable[..., Tensor]:
        if mode != "forward":
            raise Absent("cuDNN's Python frontend has no fused pattern with a backward pass")
        return cudnn_statistics(computed, inputs())

    def contender(name: str) -> Contender:
        build, memory, amp = builders[name]
        how = {"amp": amp, "last": name == "eager_2d_channels_last"}
        return Contender(name, lambda: runner(computed, build(), inputs(), memory, mode, **how))

    builders: dict[str, tuple[Callable[[], Callable[..., Tensor]], str, bool]] = {
        "jasper_fast": (lambda: functools.partial(ours, run.backend), "ntc", False),
        "eager": (lambda: eager, "nct", True),
        "eager_2d_channels_last": (lambda: eager_2d, "ntc", True),
        "compile_max_autotune": (lambda: compiler.max_autotuned(eager, mode), "nct", True),
        "cudnn": (cudnn, "ntc", False),
        choice.CUDA_FACE: (lambda: functools.partial(ours, choice.cuda_backend(run, convs=True)), "ntc", False),
    }
    conv = counts.Conv("", N, layer.C_in, layer.C_out, layer.K, T, layer.frames(T))
    times = counts.DIRECTIONS[mode] - (layer.first and mode != "forward")  # the features need no gradient
    size = run.dtype.itemsize
    return Case(
        "kernels",
        {"op": op, **layer.key(N, T), "dtype": run.dtype_name, "mode": mode},
        [contender(name) for name in ("jasper_fast", *choice.for_sub_blocks(run))],
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(computed, inputs(), torch.float64, mode),
        low=lambda: answer(computed, inputs(), run.dtype, mode),
        tolerance=common.tolerance(run),
        flops=times * conv.flops,
        nbytes=counts.sub_block_bytes(conv, size, mode) if norm else times * conv.nbytes(size),
        seeds=(1,) if common.slow(run) else (1, 2),
        needs=("bn_relu_dropout", "conv1d") if norm else ("conv1d",),
    )
