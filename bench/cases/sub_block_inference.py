"""Cases of sub-blocks in inference: conv, batch norm, ReLU and mask.

The first layer reads fp32 features in NCT memory, as the front end makes them. The decoder ends in log-softmax. The
weights of every contender are in the precision under test. Rows of the output at t >= length are not compared.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast.bench.cases import common, counts
from jasper_fast.bench.cases.common import masked, masked_last
from jasper_fast.bench.cases.layers import Layer, conv_2d
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.bench.rivals import choice, compiler
from jasper_fast.bench.rivals.cudnn_graphs import FusedConv
from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels import layout
from jasper_fast.kernels.operands import FULL, Geometry, Lengths
from jasper_fast.nn import block


class SubBlock(nn.Module):
    """The modules of NVIDIA's Jasper in evaluation mode: mask, conv, batch norm, ReLU; or the decoder's conv with bias
    and log-softmax."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        a = self.layer = layer
        self.conv = nn.Conv1d(a.C_in, a.C_out, a.K, a.stride, a.padding, a.dilation, bias=a.head)
        self.norm = nn.Identity() if a.head else nn.BatchNorm1d(a.C_out, common.EPS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Returns z (N, C_out, T') for `x` (N, C_in, T). The decoder returns log-probabilities (N, V, T') in fp32."""
        return self.tail(self.conv(self.masked(x, lengths)))

    def masked(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Returns the input of the conv: `x` masked, except for the decoder."""
        return x.to(self.conv.weight.dtype) if self.layer.head else masked(x.to(self.conv.weight.dtype), lengths)

    def masked_last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Returns `masked(x, lengths)` in NTC memory."""
        x = layout.ntc(x.to(self.conv.weight.dtype))
        return x if self.layer.head else masked_last(x, lengths)

    def tail(self, y: Tensor) -> Tensor:
        """Computes the steps after the conv."""
        return y.float().log_softmax(dim=1) if self.layer.head else self.norm(y).relu_()

    def channels_last(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns a function that computes what `forward` does with a 2D conv in channels_last memory. The weight is
        reordered once, in advance."""
        weight = layout.ntc(self.conv.weight)

        def forward(x: Tensor, lengths: Tensor) -> Tensor:
            y = conv_2d(self.masked_last(x, lengths), weight, self.layer)
            return self.tail(y if self.conv.bias is None else y + self.conv.bias[:, None])

        return forward

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns the weight (C_out, C_in, K) and bias (C_out,) with the batch norm folded in, in fp32 or fp64."""
        wide = torch.promote_types(self.conv.weight.dtype, torch.float32)
        weight = self.conv.weight.detach().to(wide)
        if self.layer.head:
            return weight, self.conv.bias.detach().to(wide)
        scale, shift = (v.detach() for v in block.fold(self.norm, wide))
        return scale[:, None, None] * weight, shift


class Inputs(common.Held):
    """The weights and the input of one layer. The input is refilled in place."""

    def __init__(self, N: int, T: int, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        feed = torch.float32 if layer.first and dtype.itemsize == 2 else dtype
        super().__init__(N, feed, device, x=(layer.C_in, T))
        self.layer, self.dtype = layer, dtype
        if layer.first:  # a front end makes fp32 features in NCT memory
            self.ntc = self.nct
        g = seeded(stable_seed("sub_block_inference", layer), device)
        self.module = SubBlock(layer).to(device).eval().requires_grad_(False)
        with torch.no_grad():
            for name, t in [*self.module.named_parameters(), *self.module.named_buffers()]:
                if t.is_floating_point():
                    spread = (layer.C_in * layer.K) ** -0.5 if name == "conv.weight" else 0.3
                    centre = 1.0 if name in ("norm.weight", "norm.running_var") else 0.0
                    t.copy_(torch.randn(t.shape, generator=g, device=device).clamp(-2, 2) * spread + centre)
        self.module.to(dtype)
        self.refill(0)

    def fill(self, g: torch.Generator) -> None:
        """Draws new values. The padding is zero, as in the model."""
        x = self.nct["x"]
        self.draw_lengths(x.shape[2], g)
        x.copy_(masked(self.randn(x, g), self.lengths))

    def answer(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns z by plain PyTorch in `dtype`. Weights and input are rounded to the precision under test."""
        module = SubBlock(self.layer).to(self.device, dtype).eval()
        module.load_state_dict(self.module.state_dict())
        x = self.nct["x"].to(self.dtype).to(dtype)
        with torch.no_grad():
            y = module.conv(module.masked(x, self.lengths))
            z = y.log_softmax(dim=1) if self.layer.head and dtype is torch.float64 else module.tail(y)
        return {"z": self.valid(z)}

    def valid(self, z: Tensor) -> Tensor:
        """Returns z with zeros beyond the lengths of the output."""
        return masked(z, self.layer.frames(self.lengths))


# ------------------------------------------------------------------ the contenders: `(x, lengths) -> z (N, C_out, T')`

SubBlockCall = Callable[[Tensor, Tensor], Tensor]


def fused(i: Inputs, backend: str) -> SubBlockCall:
    """Returns jasper_fast's fused sub-block. Its weights are folded and packed only once, as in InferenceEngine."""
    a, (weight, bias) = i.layer, i.module.folded()
    name = choose.fused_faces(backend, i.device, i.dtype)[0]
    if backend == "reference" or name == "aten":
        weight, bias = layout.ntc(weight.to(i.dtype)), bias.to(i.dtype)
        return lambda x, lengths: _folded_aten(i, weight, bias, x, lengths)
    impl = backends.face("conv1d", name)
    more, made = {"relu": not a.head, "bias": bias}, None
    packed = impl.pack_once(weight, i.dtype, a.stride) if name == "cpu" else impl.pack(weight, i.dtype)
    if name in choose.CONVS:
        # The kernel itself reads fp32 features with any strides, masks them and computes log-softmax.
        more |= {"log_softmax": a.head, "workspace": impl.Workspace(i.device)}
        if a.stride > 1:
            made = torch.empty_like(i.lengths)

    def call(x: Tensor, lengths: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # (N, T, C)
        masks = FULL if a.head else Lengths(lengths, a.frames(lengths) if made is None else None, made)
        x = x if name in choose.CONVS else x.float().contiguous()
        z = impl.fused(x, packed, Geometry(a.stride, a.padding, a.dilation), lengths=masks, **more)
        return (z.float().log_softmax(dim=2) if a.head and name not in choose.CONVS else z).transpose(1, 2)

    return call


def _folded_aten(i: Inputs, weight: Tensor, bias: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
    y = conv_2d(i.module.masked_last(x, lengths), weight, i.layer) + bias[:, None]
    return y.float().log_softmax(dim=1) if i.layer.head else masked_last(y.relu_(), i.layer.frames(lengths))


def max_autotuned_frozen(i: Inputs) -> SubBlockCall:
    """Returns the sub-block compiled by torch.compile with max-autotune and freezing, which folds the batch norm."""
    compiler.fresh_compiler()
    import torch._inductor.config as inductor

    compiled = torch.compile(i.module, mode="max-autotune", dynamic=False)
    with inductor.patch(freezing=True), torch.inference_mode():
        compiled(i.nct["x"], i.lengths)
    return compiled


def cudnn(i: Inputs) -> SubBlockCall:
    """Returns cuDNN's fused conv, bias and ReLU with the batch norm folded in. The mask is a separate pass."""
    a, (weight, bias) = i.layer, i.module.folded()
    x = layout.ntc(i.nct["x"].to(i.dtype))
    conv = FusedConv(x, weight.to(i.dtype), a.stride, a.padding, a.dilation, bias=bias)
    return lambda x, lengths: conv(i.module.masked_last(x, lengths))


def case(run: Run, N: int, T: int, layer: Layer) -> Case:
    """Returns the case of one layer in inference."""
    inputs = functools.cache(lambda: Inputs(N, T, layer, run.dtype, run.device))

    builders: dict[str, Callable[[Inputs], SubBlockCall]] = {
        "jasper_fast": lambda i: fused(i, run.backend),
        "eager": lambda i: i.module,
        "eager_2d_channels_last": lambda i: i.module.channels_last(),
        "compile_max_autotune": max_autotuned_frozen,
        "cudnn": cudnn,
        choice.CUDA_FACE: lambda i: fused(i, choice.cuda_backend(run, convs=True)),
    }

    def build(name: str) -> Runner:
        i = inputs()
        call, x = builders[name](i), (i.nct if name in ("eager", "compile_max_autotune") else i.ntc)["x"]

        def timed() -> Tensor:
            with torch.inference_mode():
                return call(x, i.lengths)

        return Runner(timed, lambda: {"z": i.valid(timed())})

    conv = counts.Conv("", N, layer.C_in, layer.C_out, layer.K, T, layer.frames(T), bias=True)
    return Case(
        "kernels",
        {"op": "sub_block", **layer.key(N, T), "dtype": run.dtype_name, "mode": "inference"},
        [Contender(name, functools.partial(build, name)) for name in ("jasper_fast", *choice.for_sub_blocks(run))],
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: inputs().answer(torch.float64),
        low=lambda: inputs().answer(run.dtype),
        tolerance=common.tolerance(run),
        flops=conv.flops,
        nbytes=conv.nbytes(run.dtype.itemsize),
        needs=("conv1d.fused",),
    )
