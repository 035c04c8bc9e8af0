"""The inputs of a check, and its three answers: the kernel's, plain PyTorch's at its precision, fp64's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import ops
from jasper_fast.dispatch import backends
from jasper_fast.kernels.layout import ntc
from jasper_fast.selfcheck.checks import CLEAN_FUNCTIONS, DTYPES, PANES, SMALL_PANES, UNCLEAN, WAVE, Check


@dataclass(frozen=True)
class Case:
    """One set of inputs, ready: results of the face under test, of plain PyTorch at its precision, and in fp64.

    `inputs` are all tensors that these read, by name: values copied into them are the next inputs. `ours` of
    bn_relu_dropout takes the name of another face, which gets the same inputs.
    """

    ours: Callable[..., dict[str, Tensor]]
    low: Callable[[], dict[str, Tensor]]
    reference: Callable[[], dict[str, Tensor]]
    inputs: dict[str, Tensor]


def case(check: Check, device: torch.device, seed: int, *, timed: bool = False) -> Case:
    """The inputs of `check` drawn from `seed`; `timed`: without padding, and a Triton conv's weight packed before."""
    draw = _Draw(device, DTYPES[check.dtype], seed, timed, check.variant == WAVE)
    if check.op == "bn_relu_dropout":
        return _norm_case(check, draw)
    if check.op == "panes":
        return _panes_case(check, draw)
    return _fused_case(check, draw) if check.function == "fused" else _conv_case(check, draw)


class _Draw:
    """Random tensors on a device, the same for the same seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int, timed: bool, busy: bool = False) -> None:
        self.device, self.dtype, self.timed, self.busy = device, dtype, timed, busy
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return x.to(dtype or self.dtype)

    def activation(self, n: int, c: int, t: int) -> Tensor:
        """(N, C, T) in NTC memory."""
        return self.normal(n, t, c).transpose(1, 2)

    def weight(self, *shape: int) -> Tensor:
        """fp32, but of values that the activations' dtype holds, so that packing rounds nothing."""
        return self.normal(*shape, scale=(shape[1] * shape[2]) ** -0.5).float()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def lengths(self, n: int, t: int) -> Tensor:
        """Full, a third, none, one frame, and so on; all full for a timing; full to half where all is to be busy."""
        if self.timed:
            return torch.full((n,), t, device=self.device)
        if self.busy:
            return torch.tensor([t - i * t // (2 * n) for i in range(n)], device=self.device)
        return torch.tensor([(t, t // 3, 0, min(1, t))[i % 4] for i in range(n)], device=self.device)


def _beyond(x: Tensor, lengths: Tensor, value: float) -> Tensor:
    """`x` (N, C, T) with `value` at t >= length, in NTC memory."""
    t = torch.arange(x.shape[2], device=x.device)
    return ntc(x.masked_fill((t >= lengths[:, None])[:, None], value))


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


def _conv_case(check: Check, draw: _Draw) -> Case:
    s, function = check.shape, check.function
    x, dy = draw.activation(s.n, s.c_in, s.t), draw.activation(s.n, s.c_out, s.t_out)
    weight, lengths = draw.weight(s.c_out, s.c_in, s.k), draw.lengths(s.n, s.t)
    mean, beta = (draw.normal(s.c_in, dtype=torch.float32, scale=0.3) for _ in range(2))
    rstd, gamma = (draw.uniform(s.c_in) + 0.5 for _ in range(2))
    seed = torch.tensor([1234567], device=draw.device)
    y = _off_the_edge(draw.activation(s.n, s.c_in, s.t), mean, rstd, gamma, beta)
    z = y
    if function == "dgrad_bn":
        z = backends.face("bn_relu_dropout", "reference").forward(y, mean, rstd, gamma, beta, None, lengths, seed, 0.2)
    zero, clean = _beyond(x, lengths, 0.0), _told_clean(check)
    given = zero if clean else _beyond(x, lengths, float("nan"))
    told = {"clean": True} if clean else {}
    pack = {"packed": backends.face("conv1d", check.face).pack(weight, draw.dtype).data} if draw.timed else {}

    def results(face: str, x: Tensor, dy: Tensor, weight: Tensor, *norm: Tensor) -> dict[str, Tensor]:
        impl, more = backends.face("conv1d", face), {} if face == "reference" else pack
        how = {} if face == "reference" else told
        if function == "forward":
            return {"y": impl.forward(x, weight, s.stride, s.padding, s.dilation, lengths, **more, **how)}
        if function == "forward_stats":
            out = impl.forward_stats(x, weight, s.stride, s.padding, s.dilation, lengths, **more, **how)
            return dict(zip(("y", "mean", "m2"), out, strict=True))
        if function == "dgrad":
            return {"dx": impl.dgrad(dy, weight, s.t, s.stride, s.padding, s.dilation, lengths, **more)}
        if function == "dgrad_bn":
            out = impl.dgrad_bn(dy, weight, s.padding, s.dilation, *norm, lengths, 0.2, **more)
            return dict(zip(("g", "dbeta", "dgamma"), out, strict=True))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return {"dw": impl.wgrad(x, dy, s.k, s.stride, s.padding, s.dilation, lengths, dtype=wide, **how)}

    def low() -> dict[str, Tensor]:
        aten, bn = backends.face("conv1d", "aten"), backends.face("bn_relu_dropout", "reference")
        if function.startswith("forward"):
            out = aten.forward(zero, weight, s.stride, s.padding, s.dilation)
            return {"y": out} | (dict(zip(("mean", "m2"), bn.stats(out), strict=True)) if function != "forward" else {})
        if function == "wgrad":
            return {"dw": aten.wgrad(zero, dy, s.k, s.stride, s.padding, s.dilation, dtype=torch.float32)}
        dx = _beyond(aten.dgrad(dy, weight, s.t, s.stride, s.padding, s.dilation), lengths, 0.0)
        if function == "dgrad":
            return {"dx": dx}
        norm = (y, None, mean, rstd, gamma, beta)
        dbeta, dgamma = bn.backward_reduce(dx, *norm, lengths, seed, 0.2)
        g = bn.backward_apply(dx, *norm, None, None, lengths, seed, 0.2, True)[1]
        return {"g": g, "dbeta": dbeta, "dgamma": dgamma}

    tensors = {"dy": dy, "weight": weight, "y": y, "z": z, "mean": mean, "rstd": rstd}
    return Case(
        lambda: results(check.face, given, *tensors.values()),
        low,
        lambda: results("reference", *_wide(zero, *tensors.values())),
        tensors | pack | {"gamma": gamma, "beta": beta, "x": zero, "given": given, "lengths": lengths, "seed": seed},
    )


def _told_clean(check: Check) -> bool:
    """Whether the kernel is told that x is zero in its padding; the others are given NaN there."""
    return check.face == "triton" and check.function in CLEAN_FUNCTIONS and UNCLEAN not in check.variant.split()


def _fused_case(check: Check, draw: _Draw) -> Case:
    s, variant, words = check.shape, check.variant, check.variant.split()
    x, weight = draw.normal(s.n, s.t, s.c_in), draw.weight(s.c_out, s.c_in, s.k)
    bias, lengths = draw.normal(s.c_out, dtype=torch.float32, scale=0.3), draw.lengths(s.n, s.t)
    x2 = weight2 = None
    if "panes" in words:
        c2 = PANES if s.c_in >= PANES else SMALL_PANES
        x2, weight2 = draw.normal(s.n, s.t, c2), draw.weight(s.c_out, c2, 1)
    out_lengths = torch.div(lengths + 2 * s.padding - s.dilation * (s.k - 1) - 1, s.stride, rounding_mode="floor") + 1
    out_lengths = out_lengths.clamp_(0, s.t_out)
    relu = variant != "log-softmax"
    conv = {"stride": s.stride, "padding": s.padding, "dilation": s.dilation}

    def masked(x: Tensor | None, value: float) -> Tensor | None:
        return None if x is None else _beyond(x.transpose(1, 2), lengths, value).transpose(1, 2)

    impl, clean = backends.face("conv1d", check.face), _told_clean(check) and variant != "features"
    padding = 0.0 if clean else float("nan")
    given = masked(x, padding)
    more: dict[str, Any] = {"in_lengths": lengths, "out_lengths": out_lengths}
    if variant == "features":  # fp32 and (N, C, T), as the network's first kernel reads them, padding as users leave it
        given = given.float().transpose(1, 2).contiguous().transpose(1, 2)
        more = {"in_lengths": lengths, "lengths_out": torch.empty_like(lengths)}
    if clean:
        more |= {"clean": True}
    if variant == "log-softmax":
        more |= {"log_softmax": True}
    if "splits" in words:
        more |= {"workspace": impl.Workspace(x.device)}
    if x2 is not None:
        more |= {"x2": masked(x2, padding), "packed2": impl.pack(weight2.to(x.dtype))}
    pack = impl.pack(weight.to(x.dtype))

    def ours() -> dict[str, Tensor]:
        out = impl.fused(given, pack, bias=bias, relu=relu, **conv, **more)
        return {"z": out} | ({"lengths": more["lengths_out"]} if variant == "features" else {})

    def low() -> dict[str, Tensor]:
        aten = backends.face("conv1d", "aten")
        z = aten.forward(masked(x, 0.0).transpose(1, 2), weight, s.stride, s.padding, s.dilation).transpose(1, 2)
        z = z if x2 is None else z + F.linear(masked(x2, 0.0), weight2[:, :, 0].to(x.dtype))
        return finish(z + bias.to(x.dtype))

    def reference() -> dict[str, Tensor]:
        impl = backends.face("conv1d", "reference")
        wide_x, wide_w, wide_b, wide_x2, wide_w2 = _wide(masked(x, 0.0), weight, bias, masked(x2, 0.0), weight2)
        return finish(impl.fused(wide_x, wide_w, bias=wide_b, x2=wide_x2, weight2=wide_w2, **conv))

    def finish(z: Tensor) -> dict[str, Tensor]:
        z = z.relu() if relu else (z if z.dtype == torch.float64 else z.float()).log_softmax(2)
        z = _beyond(z.transpose(1, 2), out_lengths, 0.0).transpose(1, 2)
        return {"z": z} | ({"lengths": out_lengths} if variant == "features" else {})

    inputs = {"x": x, "given": given, "weight": weight, "packed": pack.data, "bias": bias, "lengths": lengths}
    return Case(ours, low, reference, inputs | {"out_lengths": out_lengths})


def _norm_case(check: Check, draw: _Draw) -> Case:
    (n, c, t), function, variant = check.shape, check.function, check.variant
    mean, beta = (draw.normal(c, dtype=torch.float32, scale=0.3) for _ in range(2))
    rstd, gamma = (draw.uniform(c) + 0.5 for _ in range(2))
    mean_g, mean_gy = (draw.normal(c, dtype=torch.float32, scale=0.1) for _ in range(2))
    lengths = None if variant == "no lengths" else draw.lengths(n, t)
    residual = draw.activation(n, c, t) if variant == "residual" else None
    y = draw.activation(n, c, t)
    halo = 2 if variant == "halo" else None
    if halo is not None:
        y = _beyond(y, lengths + halo, 0.0)
    if residual is None:  # with one, z tells where the ReLU was open
        y = _off_the_edge(y, mean, rstd, gamma, beta)
        y = y if halo is None else _beyond(y, lengths + halo, 0.0)
    dz = draw.activation(n, c, t)
    poisoned = dz if lengths is None else _beyond(dz, lengths, float("nan"))
    p = 0.0 if variant in ("no dropout", "evaluation") else 0.2
    seed = torch.tensor([987654321], device=draw.device) if p else None
    with_means = variant != "evaluation"

    # z as the forward gave it to backward, the same for all
    z = None
    if residual is not None:
        z = backends.face("bn_relu_dropout", "reference").forward(
            y, mean, rstd, gamma, beta, residual, lengths, seed, p
        )

    def results(face: str, y: Tensor, dz: Tensor, residual, z, *vectors: Tensor) -> dict[str, Tensor]:
        impl = backends.face("bn_relu_dropout", face)
        norm, means = vectors[:4], vectors[4:] if with_means else (None, None)
        if function == "backward":
            sums = impl.backward_reduce(dz, y, z, *norm, lengths, seed, p)
            more = {} if halo is None else {"halo": halo}
            dy, dres = impl.backward_apply(dz, y, z, *norm, *means, lengths, seed, p, residual is not None, **more)
            both = dict(zip(("dbeta", "dgamma"), sums, strict=True)) | {"dy": dy}
            return both | ({} if dres is None else {"dres": dres})
        found = {}
        if function in ("stats", "stats_forward"):
            found |= zip(("mean", "m2"), impl.stats(y), strict=True)
        if function in ("forward", "stats_forward"):
            found["z"] = impl.forward(y, *norm, residual, lengths, seed, p)
        return found

    tensors = (residual, z, mean, rstd, gamma, beta, mean_g, mean_gy)
    names = ("residual", "z", "mean", "rstd", "gamma", "beta", "mean_g", "mean_gy")
    named = {"y": y, "dz": dz, "poisoned": poisoned, "lengths": lengths, "seed": seed, **dict(zip(names, tensors))}
    return Case(
        lambda face=check.face: results(face, y, poisoned, *tensors),
        lambda: results("reference", y, dz, *tensors),
        lambda: results("reference", *_wide(y, dz, *tensors)),
        {name: t for name, t in named.items() if t is not None},
    )


def _panes_case(check: Check, draw: _Draw) -> Case:
    """The definition is a 1x1 conv and batch norm a pane; of two block outputs, which a ReLU has made."""
    (n, c, t), eps = check.shape, 1e-3
    widths, c_out = (c, max(8, c // 2)), c
    xs = [_beyond(draw.activation(n, width, t).relu(), draw.lengths(n, t), 0.0) for width in widths]
    weights = [draw.weight(c_out, width, 1) for width in widths]
    gammas = [draw.uniform(c_out) + 0.5 for _ in widths]
    betas = [draw.normal(c_out, dtype=torch.float32, scale=0.3) for _ in widths]
    up = draw.activation(n, c_out, t)

    def ours(xs: list[Tensor], weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor]):
        return ops.panes(xs, [ops.gram(x) for x in xs], weights, gammas, betas, eps=eps)

    def plain(xs: list[Tensor], weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor]):
        out, means, variances = 0.0, [], []
        for x, weight, gamma, beta in zip(xs, weights, gammas, betas, strict=True):
            y = F.linear(x.transpose(1, 2), weight.flatten(1).to(x.dtype)).transpose(1, 2)
            out = out + F.batch_norm(y, None, None, gamma, beta, training=True, eps=eps)
            variance, mean = torch.var_mean(y.detach().to(gamma.dtype), (0, 2))
            means, variances = [*means, mean], [*variances, variance]
        return out, torch.stack(means), torch.stack(variances)

    def results(panes: Callable, wide: bool) -> dict[str, Tensor]:
        """Sum, means, variances, and the gradients of everything, through the Gram matrices too."""
        leaves = [[(x.double() if wide else x.clone()).requires_grad_() for x in of] for of in named.values()]
        out, mean, var = panes(*leaves)
        grads = torch.autograd.grad(out, [x for of in leaves for x in of], up.to(out.dtype))
        names = [f"d{name} {k}" for name in named for k in range(len(xs))]
        return {"out": out.detach(), "mean": mean, "var": var} | dict(zip(names, grads, strict=True))

    named = {"x": xs, "weight": weights, "gamma": gammas, "beta": betas}
    inputs = {f"{name} {k}": x for name, of in named.items() for k, x in enumerate(of)}
    return Case(
        lambda: results(ours, False), lambda: results(plain, False), lambda: results(plain, True), inputs | {"up": up}
    )


def _off_the_edge(y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """`y` (N, C, T) moved where the ReLU's input lies within roundings of zero: two right answers may differ there."""
    a = (gamma * rstd)[:, None].double()
    pre = (y.double() - mean[:, None]) * a + beta[:, None]
    target = torch.where(pre < 0, -0.2, 0.2)
    moved = (target - beta[:, None]) / a + mean[:, None]
    return ntc(torch.where(pre.abs() < 0.02, moved, y.double()).to(y.dtype))
