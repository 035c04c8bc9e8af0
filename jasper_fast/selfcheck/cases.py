"""A check's inputs and its three results: the kernel's, plain PyTorch's at the same precision, and the fp64 result."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import ops
from jasper_fast.dispatch import backends
from jasper_fast.kernels.layout import mask, ntc, wide_dtype
from jasper_fast.kernels.novograd.operands import Tensors, Watched
from jasper_fast.kernels.operands import Lengths, Mask, Norm
from jasper_fast.selfcheck.checks import CLEAN_FUNCTIONS, DTYPES, PANES, SMALL_PANES, UNCLEAN, WAVE, Check


@dataclass(frozen=True)
class Case:
    """One set of inputs, and three functions that compute results from it.

    `ours` runs the face under test, `low` plain PyTorch at the same precision, and `reference` PyTorch in fp64.
    `inputs` has tensors that these functions read, by name. To change an input, copy values into its tensor.
    """

    ours: Callable[[], dict[str, Tensor]]
    low: Callable[[], dict[str, Tensor]]
    reference: Callable[[], dict[str, Tensor]]
    inputs: dict[str, Tensor]


def case(check: Check, device: torch.device, seed: int, *, timed: bool = False) -> Case:
    """Returns the case of `check`, with inputs drawn from `seed`.

    With `timed`, the inputs suit a timing: the lengths are those of a batch of speech, about a quarter of a large
    batch is padding, and a conv's weight is already packed.
    """
    makers = {
        "conv1d": _conv_case,
        "conv1d.fused": _fused_case,
        "bn_relu_dropout": _norm_case,
        "depthwise": _depthwise_case,
        "panes": _panes_case,
        "novograd": _step_case,
        "ctc": _loss_case,
    }
    return makers[check.op](check, _Draw(device, DTYPES[check.dtype], seed, timed, check.variant == WAVE))


class _Draw:
    """Draws random tensors on a device. The same seed always draws the same tensors. On the meta device they have no
    values."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int, timed: bool, busy: bool = False) -> None:
        self.device, self.dtype, self.timed, self.busy = device, dtype, timed, busy
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype or self.dtype)

    def activation(self, n: int, c: int, t: int) -> Tensor:
        """Returns a random activation (N, C, T) in NTC memory order."""
        return self.normal(n, t, c).transpose(1, 2)

    def weight(self, *shape: int) -> Tensor:
        """Returns a random fp32 weight whose values are exact in the activations' dtype, so packing rounds nothing."""
        return self.normal(*shape, scale=(shape[1] * shape[2]) ** -0.5).float()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def norm(self, c: int) -> Norm:
        mean, beta = (self.normal(c, dtype=torch.float32, scale=0.3) for _ in range(2))
        rstd, gamma = (self.uniform(c) + 0.5 for _ in range(2))
        return Norm(mean, rstd, gamma, beta)

    def lengths(self, n: int, t: int) -> Tensor:
        """Returns N lengths: t, t / 3, 0, 1, t and so on. With `timed` or `busy` they fall evenly from t to t / 2."""
        if self.timed or self.busy:
            return torch.tensor([t - i * t // (2 * n) for i in range(n)], device=self.device)
        return torch.tensor([(t, t // 3, 0, min(1, t))[i % 4] for i in range(n)], device=self.device)


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


# the names of the tensors that each function of a conv returns
RESULTS = {"forward": ("y",), "forward_stats": ("y", "mean", "m2"), "dgrad": ("dx",), "wgrad": ("dw",),
           "dgrad_bn": ("g", "dbeta", "dgamma")}  # fmt: skip


def _conv_case(check: Check, draw: _Draw) -> Case:
    s, function, p = check.shape, check.function, 0.2
    x, dy = draw.activation(s.n, s.c_in, s.t), draw.activation(s.n, s.c_out, s.t_out)
    weight, lengths = draw.weight(s.c_out, s.c_in, s.k), draw.lengths(s.n, s.t)
    norm, zeroed = draw.norm(s.c_in), Mask(lengths, torch.tensor([1234567], device=draw.device), p)
    y = _off_the_edge(draw.activation(s.n, s.c_in, s.t), norm)
    bn = backends.face("bn_relu_dropout", "reference")
    z = bn.forward(y, norm, None, zeroed) if function == "dgrad_bn" else y
    zero, clean = ntc(mask(x, lengths)), _clean(check)
    given = zero if clean else ntc(mask(x, lengths, float("nan")))
    impl = backends.face("conv1d", check.face)
    packed = impl.pack(weight, draw.dtype).data if draw.timed and hasattr(impl, "pack") else None

    def named(*out: Tensor) -> dict[str, Tensor]:
        return dict(zip(RESULTS[function], out, strict=True))

    def results(face: str, x: Tensor, dy: Tensor, weight: Tensor, y: Tensor, z: Tensor, *norm: Tensor):
        forward = x, weight, s.geometry, lengths, packed, clean
        arguments = {
            "forward": forward,
            "forward_stats": forward,
            "dgrad": (dy, weight, s.t, s.geometry, lengths, packed),
            "dgrad_bn": (dy, weight, s.geometry, y, z, Norm(*norm), zeroed, packed),
            "wgrad": (x, dy, s.k, s.geometry, lengths, wide_dtype(x), clean),
        }
        out = getattr(backends.face("conv1d", face), function)(*arguments[function])
        return named(*(out if isinstance(out, tuple) else (out,)))

    def low() -> dict[str, Tensor]:
        aten = backends.face("conv1d", "aten")
        if function.startswith("forward"):
            out = aten.forward(zero, weight, s.geometry)
            return named(out, *(bn.stats(out) if function != "forward" else ()))
        if function == "wgrad":
            return named(aten.wgrad(zero, dy, s.k, s.geometry, dtype=torch.float32))
        dx = ntc(mask(aten.dgrad(dy, weight, s.t, s.geometry), lengths))
        if function == "dgrad":
            return named(dx)
        saved = dx, y, None, norm  # z is None, so dropout is drawn again
        return named(bn.backward_apply(*saved, None, zeroed, True)[1], *bn.backward_reduce(*saved, zeroed))

    tensors = {"dy": dy, "weight": weight, "y": y, "z": z} | norm._asdict()
    more = {"x": zero, "given": given, "lengths": lengths, "seed": zeroed.seed}
    return Case(
        lambda: results(check.face, given, *tensors.values()),
        low,
        lambda: results("reference", *_wide(zero, *tensors.values())),
        tensors | more | ({} if packed is None else {"packed": packed}),
    )


def _clean(check: Check) -> bool:
    """Returns whether the kernel is called with `clean`, the promise that the padding of x is zero. Kernels without
    that promise get NaN in the padding."""
    return check.face == "triton" and check.function in CLEAN_FUNCTIONS and UNCLEAN not in check.variant.split()


def _depthwise_case(check: Check, draw: _Draw) -> Case:
    s, function, c = check.shape, check.function, check.shape.c_in
    x, dy, weight = draw.activation(s.n, c, s.t), draw.activation(s.n, c, s.t_out), draw.weight(c, 1, s.k)
    before = draw.lengths(s.n, s.t)
    masks = Lengths(before, s.geometry.frames(before, s.k).clamp_(0, s.t_out))
    given, given_dy = (ntc(mask(v, of, float("nan"))) for v, of in ((x, masks.before), (dy, masks.after)))

    def results(face: str, x: Tensor, dy: Tensor, weight: Tensor) -> dict[str, Tensor]:
        arguments = {
            "forward": (x, weight, s.geometry, masks),
            "dgrad": (dy, weight, s.t, s.geometry, masks),
            "wgrad": (x, dy, s.k, s.geometry, masks, wide_dtype(x)),
        }
        return {RESULTS[function][0]: getattr(backends.face("depthwise", face), function)(*arguments[function])}

    return Case(
        lambda: results(check.face, given, given_dy, weight),
        lambda: results("aten", x, dy, weight),
        lambda: results("reference", *_wide(x, dy, weight)),
        {"x": x, "dy": dy, "given": given, "given dy": given_dy, "weight": weight, "lengths": masks.before},
    )


def _fused_case(check: Check, draw: _Draw) -> Case:
    s, variant, words = check.shape, check.variant, check.variant.split()
    x, weight = draw.normal(s.n, s.t, s.c_in), draw.weight(s.c_out, s.c_in, s.k)
    bias, lengths = draw.normal(s.c_out, dtype=torch.float32, scale=0.3), draw.lengths(s.n, s.t)
    x2 = weight2 = None
    if "panes" in words:
        c2 = PANES if s.c_in >= PANES else SMALL_PANES
        x2, weight2 = draw.normal(s.n, s.t, c2), draw.weight(s.c_out, c2, 1)
    out_lengths = s.geometry.frames(lengths, s.k).clamp_(0, s.t_out)
    relu, features = variant != "log-softmax", variant == "features"

    def masked(x: Tensor | None, value: float) -> Tensor | None:
        return None if x is None else ntc(mask(x.transpose(1, 2), lengths, value)).transpose(1, 2)

    impl, clean = backends.face("conv1d", check.face), _clean(check) and not features
    padding = 0.0 if clean else float("nan")
    given, given2 = masked(x, padding), masked(x2, padding)
    masks = Lengths(lengths, out_lengths)
    if features:  # The network's first kernel reads fp32 (N, C, T) features from a user, with anything in the padding.
        given = given.float().transpose(1, 2).contiguous().transpose(1, 2)
        masks = Lengths(lengths, made=torch.empty_like(lengths))
    if check.face == "cpu":  # the inference engine keeps activations in fp32 on a CPU
        given, given2 = given.float(), None if x2 is None else given2.float()
    workspace = impl.Workspace(x.device) if "splits" in words else None
    wished = {"clean": clean, "log_softmax": not relu, "workspace": workspace}
    more = {name: value for name, value in wished.items() if value}  # those that are set: the CPU face takes none
    pack = impl.pack_once(weight, x.dtype, s.stride)
    panes = None if x2 is None else (given2, impl.pack_once(weight2, x.dtype))

    def ours() -> dict[str, Tensor]:
        out = impl.fused(given, pack, s.geometry, lengths=masks, bias=bias, relu=relu, panes=panes, **more)
        return {"z": out.to(x.dtype) if relu else out} | ({"lengths": masks.made} if features else {})

    def low() -> dict[str, Tensor]:
        z = backends.face("conv1d", "aten").forward(masked(x, 0.0).transpose(1, 2), weight, s.geometry).transpose(1, 2)
        z = z if x2 is None else z + F.linear(masked(x2, 0.0), weight2[:, :, 0].to(x.dtype))
        return finish(z + bias.to(x.dtype))

    def reference() -> dict[str, Tensor]:
        wide_x, wide_w, wide_b, *wide_panes = _wide(masked(x, 0.0), weight, bias, masked(x2, 0.0), weight2)
        how = {"bias": wide_b, "panes": None if x2 is None else wide_panes}
        return finish(backends.face("conv1d", "reference").fused(wide_x, wide_w, s.geometry, **how))

    def finish(z: Tensor) -> dict[str, Tensor]:
        z = z.relu() if relu else (z if z.dtype == torch.float64 else z.float()).log_softmax(2)
        z = mask(z.transpose(1, 2), out_lengths).transpose(1, 2)
        return {"z": z} | ({"lengths": out_lengths} if features else {})

    inputs = {"x": x, "given": given, "weight": weight, "packed": pack.data, "bias": bias, "lengths": lengths}
    return Case(ours, low, reference, inputs | {"out_lengths": out_lengths})


def _norm_case(check: Check, draw: _Draw) -> Case:
    (n, c, t), function, variant = check.shape, check.function, check.variant
    norm, means = draw.norm(c), tuple(draw.normal(c, dtype=torch.float32, scale=0.1) for _ in range(2))
    lengths = None if variant == "no lengths" else draw.lengths(n, t)
    residual = draw.activation(n, c, t) if variant == "residual" else None
    y = draw.activation(n, c, t)
    # Without a residual, backward computes the sign of the ReLU's input again, which rounding could change near zero.
    if residual is None:
        y = _off_the_edge(y, norm)
    halo = 2 if variant == "halo" else None
    if halo is not None:
        y = ntc(mask(y, lengths + halo))
    dz = draw.activation(n, c, t)
    poisoned = ntc(mask(dz, lengths, float("nan")))
    p = 0.0 if variant in ("no dropout", "evaluation") else 0.2
    zeroed = Mask(lengths, torch.tensor([987654321], device=draw.device) if p else None, p)

    # All faces get the same z, which the reference computes.
    z = None if residual is None else backends.face("bn_relu_dropout", "reference").forward(y, norm, residual, zeroed)

    def results(face: str, y: Tensor, dz: Tensor, residual, z, *vectors: Tensor) -> dict[str, Tensor]:
        impl, norm = backends.face("bn_relu_dropout", face), Norm(*vectors[:4])
        if function == "backward":
            means = None if variant == "evaluation" else vectors[4:]
            sums = impl.backward_reduce(dz, y, z, norm, zeroed)
            dy, dres = impl.backward_apply(dz, y, z, norm, means, zeroed, residual is not None, halo)
            more = {} if dres is None else {"dres": dres}
            return dict(zip(("dbeta", "dgamma"), sums, strict=True)) | {"dy": dy} | more
        stats = zip(("mean", "m2"), impl.stats(y), strict=True) if function.startswith("stats") else ()
        return dict(stats) | ({"z": impl.forward(y, norm, residual, zeroed)} if function.endswith("forward") else {})

    tensors = {"residual": residual, "z": z, **norm._asdict(), "mean_g": means[0], "mean_gy": means[1]}
    named = {"y": y, "dz": dz, "poisoned": poisoned, "lengths": lengths, "seed": zeroed.seed, **tensors}
    return Case(
        lambda: results(check.face, y, poisoned, *tensors.values()),
        lambda: results("reference", y, dz, *tensors.values()),
        lambda: results("reference", *_wide(y, dz, *tensors.values())),
        {name: t for name, t in named.items() if t is not None},
    )


def _panes_case(check: Check, draw: _Draw) -> Case:
    """Returns the case of two panes (each a 1x1 conv and batch norm of a block output), whose outputs are added.

    Block outputs come from a ReLU, so the inputs are not negative. The plain form (function "plain") may leave any
    values in the gradients of x beyond the lengths, so these gradients are masked before the comparison.
    """
    (n, c, t), eps = check.shape, 1e-3
    widths, c_out, lengths = (c, max(8, c // 2)), c, draw.lengths(n, t)
    xs = [ntc(mask(draw.activation(n, width, t).relu(), lengths)) for width in widths]
    weights = [draw.weight(c_out, width, 1) for width in widths]
    gammas = [draw.uniform(c_out) + 0.5 for _ in widths]
    betas = [draw.normal(c_out, dtype=torch.float32, scale=0.3) for _ in widths]
    up = draw.activation(n, c_out, t)

    def ours(xs: list[Tensor], weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor]):
        if check.function == "plain":
            return ops.panes_plain(xs, weights, gammas, betas, lengths=lengths, eps=eps, backend=check.face)
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
        """Returns the sum of the panes, their means and variances, and the gradients of all inputs.

        In the Gram form the gradients of x include those through its Gram matrix.
        """
        leaves = [[(x.double() if wide else x.clone()).requires_grad_() for x in of] for of in named.values()]
        out, mean, var = panes(*leaves)
        grads = list(torch.autograd.grad(out, [x for of in leaves for x in of], up.to(out.dtype)))
        if check.function == "plain":
            grads[: len(xs)] = [mask(dx, lengths) for dx in grads[: len(xs)]]
        names = [f"d{name} {k}" for name in named for k in range(len(xs))]
        return {"out": out.detach(), "mean": mean, "var": var} | dict(zip(names, grads, strict=True))

    named = {"x": xs, "weight": weights, "gamma": gammas, "beta": betas}
    inputs = {f"{name} {k}": x for name, of in named.items() for k, x in enumerate(of)}
    return Case(
        lambda: results(ours, False), lambda: results(plain, False), lambda: results(plain, True), inputs | {"up": up}
    )


def _step_case(check: Check, draw: _Draw) -> Case:
    """Returns the case of NovoGrad's step on a sub-block's weight, gamma and beta.

    Variant "plain" is the bare step. "all" adds the loss scale, the moving averages and beta2 > 0. "not finite" is
    "all" with an infinity in a gradient.
    """
    s, variant = check.shape, check.variant
    shapes = [(s.c_out, s.c_in, s.k), (s.c_out,), (s.c_out,)]
    lists = [[draw.normal(*shape, dtype=torch.float32) for shape in shapes] for _ in range(3)]
    squares = [draw.uniform(1)[0] for _ in shapes]
    averages = [] if variant == "plain" else [draw.normal(*shape, dtype=torch.float32) for shape in shapes]
    live, its = draw.normal(s.c_out, dtype=torch.float32), draw.normal(s.c_out, dtype=torch.float32)
    scale = None if variant == "plain" else torch.full((1,), 8.0, device=draw.device)
    beta2 = 0.0 if variant == "plain" else 0.5
    settings = torch.tensor([[0.02, 0.95, 1.0, beta2, 1 - beta2, 1e-8, 1e-2, 0.1]], device=draw.device).double()
    if variant == "not finite":
        lists[0][1][-1] = float("inf")
    named = dict(zip(("g", "p", "m", "v", "a"), (*lists, squares, averages), strict=True))

    def results(face: str, wide: bool) -> dict[str, Tensor]:
        """Returns the results of a step on copies of the inputs, because the step changes them in place."""
        copied = [[x.double() if wide else x.clone() for x in of] for of in (*named.values(), (live, its))]
        tensors = Tensors(*copied[:5], [0] * len(shapes))
        watched = Watched(copied[5][:1], copied[5][1:]) if averages else Watched([], [])
        step = backends.face("novograd", face).step
        outcome = step(tensors, watched, settings, scale, None, 1.0 if averages else 0.0, True, {})
        finite = outcome.nan_to_num(0.0, 0.0, 0.0)  # infinity and NaN are the same outcome: the norm is not finite
        found = {"outcome": finite.double() if wide else finite.float()}
        for name, of in zip(("p", "m", "v", "a"), (*copied[1:5],), strict=True):
            found |= {f"{name} {i}": x for i, x in enumerate(of)}
        return found | ({"watched": copied[5][1]} if averages else {})

    inputs = {f"{name} {i}": x for name, of in named.items() for i, x in enumerate(of)}
    return Case(
        lambda: results(check.face, False),
        lambda: results("reference", False),
        lambda: results("reference", True),
        inputs | {"live": live, "its": its},
    )


def _loss_case(check: Check, draw: _Draw) -> Case:
    """Returns the case of the CTC loss and its gradient, with targets and utterances of several lengths."""
    n, t, v, u = check.shape
    log_probs = draw.normal(n, t, v, dtype=torch.float32, scale=3.0).log_softmax(2)
    targets = (draw.uniform(n * u) * (v - 1)).long().view(n, u)
    target_lengths = torch.tensor([(u, u // 2, 0, 1)[i % 4] for i in range(n)], device=draw.device)
    lengths = torch.tensor([t - (i % 2) * (t // 3) for i in range(n)], device=draw.device)
    given, up = (lengths, targets, target_lengths), draw.uniform(n)

    def results(face: str, log_probs: Tensor, up: Tensor) -> dict[str, Tensor]:
        impl = backends.face("ctc", face)
        losses, alpha = impl.forward(log_probs, *given, v - 1)
        return {"loss": losses, "dx": impl.backward(up, log_probs, *given, losses, alpha, v - 1, False)}

    return Case(
        lambda: results(check.face, log_probs, up),
        lambda: results("reference", log_probs, up),
        lambda: results("reference", *_wide(log_probs, up)),
        {"log_probs": log_probs, "targets": targets, "lengths": lengths, "up": up},
    )


def _off_the_edge(y: Tensor, norm: Norm) -> Tensor:
    """Returns `y` (N, C, T), changed where the ReLU's input is so close to zero that rounding could change its sign."""
    mean, rstd, gamma, beta = norm
    a = (gamma * rstd)[:, None].double()
    pre = (y.double() - mean[:, None]) * a + beta[:, None]
    moved = (torch.where(pre < 0, -0.2, 0.2) - beta[:, None]) / a + mean[:, None]
    return ntc(torch.where(pre.abs() < 0.02, moved, y.double()).to(y.dtype))
