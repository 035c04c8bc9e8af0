"""Cases of `python -m bench kernels --op bn_relu_dropout`: training, forward, backward and both, at each width of
Jasper's layers, beside the eager chain."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import ops
from jasper_fast.bench.cases import common, counts
from jasper_fast.bench.harness import correct
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.bench.rivals import compiler
from jasper_fast.kernels import layout

# (N, C, T) on a CPU: the first two are the ones that goals are set for; the others are Jasper 10x5's remaining widths
CPU_SHAPES = ((8, 256, 800), (4, 768, 800), (4, 384, 800), (4, 512, 800), (4, 640, 800), (4, 896, 800), (4, 1024, 800))
GPU_SHAPES = tuple((32, C, 832) for C in (256, 768, 384, 512, 640, 896, 1024)) + ((1, 256, 352), (1, 768, 352))
GRADIENTS = ("dy", "dgamma", "dbeta", "dres")


class Inputs:
    """One shape's tensors in both memories, the same values in each, refilled in place."""

    def __init__(self, N: int, C: int, T: int, dtype: torch.dtype, device: torch.device, residual: bool) -> None:
        self.device, self.dtype = device, dtype
        names = ("y", "dz", "residual") if residual else ("y", "dz")
        self.nct = {n: torch.empty(N, C, T, dtype=dtype, device=device) for n in names}
        self.ntc = {n: layout.ntc(t) for n, t in self.nct.items()}
        self.gamma, self.beta = torch.empty(C, device=device), torch.empty(C, device=device)
        self.lengths = torch.empty(N, dtype=torch.int64, device=device)
        for t in (*self.nct.values(), *self.ntc.values(), self.gamma, self.beta):
            t.requires_grad_()
        self.nct["dz"].requires_grad_(False)
        self.ntc["dz"].requires_grad_(False)
        self.refills = 0
        self.refill(0)

    @torch.no_grad()
    def refill(self, seed: int) -> None:
        """New values everywhere; lengths between half and full, the first full."""
        self.refills += 1
        g = seeded(stable_seed("bn_relu_dropout", seed), self.device)
        N, C, T = self.nct["y"].shape
        self.gamma.copy_(torch.rand(C, generator=g, device=self.device) + 0.5)
        self.beta.copy_(torch.randn(C, generator=g, device=self.device) * 0.3)
        for t in self.nct.values():
            t.copy_(torch.randn(N, C, T, generator=g, device=self.device))
        # channels with a mean of their own, as a conv's output has
        y = 1.5 * self.nct["y"] + torch.randn(C, 1, generator=g, device=self.device)
        self.nct["y"].copy_(common.off_the_edge(y, self.gamma, self.beta, self.nct.get("residual"), self.dtype))
        for name, t in self.nct.items():
            self.ntc[name].copy_(t)
        self.lengths.copy_(torch.randint(T // 2, T + 1, (N,), generator=g, device=self.device))
        self.lengths[0] = T

    def fresh_running(self) -> tuple[Tensor, Tensor]:
        """Running statistics as a new layer has them."""
        C = self.gamma.numel()
        return torch.zeros(C, device=self.device), torch.ones(C, device=self.device)


def fused(backend: str) -> Callable[..., Tensor]:
    """jasper_fast's op with the chain's signature."""

    def call(
        y: Tensor,
        gamma: Tensor,
        beta: Tensor,
        running: tuple[Tensor, Tensor],
        residual: Tensor | None,
        lengths: Tensor,
        p: float,
    ) -> Tensor:
        kwargs = {
            "residual": residual,
            "lengths": lengths,
            "p": p,
            "momentum": common.MOMENTUM,
            "eps": common.EPS,
            "backend": backend,
        }
        return ops.bn_relu_dropout(y, gamma, beta, *running, training=True, **kwargs)

    return call


def named(z: Tensor, gradients: Sequence[Tensor], running: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """All that is compared of an answer; without a residual there is one gradient less."""
    statistics = dict(zip(("running_mean", "running_var"), running, strict=True))
    return {"z": z, **dict(zip(GRADIENTS, gradients, strict=False)), **statistics}


def runner(chain: Callable[..., Tensor], inputs: Inputs, memory: str, mode: str, p: float) -> Runner:
    """A chain on the inputs of its memory; `outputs` are all results and gradients with dropout off."""
    tensors = getattr(inputs, memory)
    residual = tensors.get("residual")
    wanted = [tensors["y"], inputs.gamma, inputs.beta] + ([residual] if residual is not None else [])
    running = inputs.fresh_running()
    forward = lambda q, stats: chain(tensors["y"], inputs.gamma, inputs.beta, stats, residual, inputs.lengths, q)  # noqa: E731

    def everything(q: float) -> dict[str, Tensor]:
        stats = inputs.fresh_running()
        z = forward(q, stats)
        gradients = torch.autograd.grad(z, wanted, tensors["dz"])
        return named(z, gradients, stats)

    def both() -> None:
        torch.autograd.grad(forward(p, running), wanted, tensors["dz"])

    graph: dict[int, Tensor] = {}

    def backward() -> None:
        if inputs.refills not in graph:  # a check has refilled what the graph has saved
            graph.clear()
            graph[inputs.refills] = forward(p, running)
        torch.autograd.grad(graph[inputs.refills], wanted, tensors["dz"], retain_graph=True)

    run = {"forward": lambda: forward(p, running), "backward": backward, "both": both}[mode]
    return Runner(run, lambda: everything(0.0), lambda: dropout_complaints(everything(p), inputs, p))


def answer(inputs: Inputs, dtype: torch.dtype, keep: Tensor | None = None, p: float = 0.0) -> dict[str, Tensor]:
    """Results and gradients by plain PyTorch in `dtype`; `keep` (N, C, T) is the dropout mask to apply, if any."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.nct.items() if n != "dz"}
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    gamma, beta = (t.detach().to(wide).requires_grad_() for t in (inputs.gamma, inputs.beta))
    running = tuple(t.to(wide) for t in inputs.fresh_running())
    z = F.batch_norm(leaves["y"], *running, gamma, beta, True, common.MOMENTUM, common.EPS)
    z = (z + leaves["residual"] if "residual" in leaves else z).relu()
    if keep is not None:
        z = z * keep / (1 - p)
    z = z.masked_fill(common.mask(inputs.lengths, z.shape[2]), 0)
    wanted = [leaves["y"], gamma, beta] + ([leaves["residual"]] if "residual" in leaves else [])
    gradients = torch.autograd.grad(z, wanted, inputs.nct["dz"].to(dtype))
    return named(z.detach(), gradients, running)


def dropout_complaints(got: Mapping[str, Tensor], inputs: Inputs, p: float) -> list[str]:
    """With dropout on: the mask that z shows must have the right rate, and every gradient must follow that mask."""
    keep = got["z"] != 0
    off = answer(inputs, torch.float32)["z"] > 1e-3
    rate = correct.keep_rate_complaint(int((keep & off).sum()), int(off.sum()), p)
    wrong = correct.complaints(
        got, answer(inputs, inputs.dtype, keep, p), answer(inputs, torch.float64, keep, p), TOLERANCE
    )
    return [f"dropout on: {line}" for line in [*([rate] if rate else []), *wrong]]


# sums over N*T rows run in another order: PyTorch's own, on one thread in channels_last memory, is 23 roundings off
TOLERANCE = correct.Tolerance(factor=2.0, floor=40.0)


def case(run: Run, shape: tuple[int, int, int], mode: str, residual: bool, compiled: bool) -> Case:
    """One shape and mode of the op."""
    N, C, T = shape
    inputs = functools.cache(lambda: Inputs(N, C, T, run.dtype, run.device, residual))

    def make(chain: Callable[..., Tensor], memory: str) -> Callable[[], Runner]:
        return lambda: runner(chain, inputs(), memory, mode, common.P)

    def compile_chain() -> Runner:
        compiler.needs_compiler()
        return runner(torch.compile(common.eager_chain, dynamic=False), inputs(), "nct", mode, common.P)

    contenders = [
        Contender("jasper_fast", make(fused(run.backend), "ntc")),
        Contender("eager", make(common.eager_chain, "nct")),
        Contender("eager_2d_channels_last", make(common.eager_chain_2d, "ntc")),
    ]
    if compiled:
        contenders.append(Contender("compile", compile_chain))
    if run.rivals == "all" and run.backend != "reference":
        contenders.append(Contender("reference", make(fused("reference"), "ntc")))
    size = run.dtype.itemsize
    return Case(
        "kernels",
        {
            "op": "bn_relu_dropout" + ("+residual" if residual else ""),
            "shape": f"({N}, {C}, {T})",
            "dtype": common.name(run.dtype),
            "mode": mode,
            "p": common.P,
        },
        contenders,
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(inputs(), torch.float64),
        low=lambda: answer(inputs(), run.dtype),
        tolerance=TOLERANCE,
        flops=counts.bn_relu_dropout_flops(N, C, T, mode),
        nbytes=counts.bn_relu_dropout_bytes(N, C, T, size, mode, residual),
        dtype=common.name(run.dtype),
        needs=("bn_relu_dropout",),
    )


def cases(run: Run, mode: str | None = None) -> list[Case]:
    """Every width, and one with a residual, in every mode, the goals' shapes first; when quick these two, and one
    with a residual, forward and backward together."""
    shapes = GPU_SHAPES if run.device.type == "cuda" else CPU_SHAPES
    goals, others = shapes[:2], shapes[2:]
    asked = run.rivals.split(",")
    compiled = "all" in asked or "compile" in asked or (run.rivals == "default" and not run.quick)
    modes = common.chosen(run, mode, common.MODES)
    made = [case(run, s, m, False, compiled and m == "both") for m, s in itertools.product(modes, goals)]
    if run.brief and mode is None and not run.quick:
        made += [case(run, goals[0], m, False, False) for m in common.MODES[1:]]
    if not run.quick:
        made += [case(run, s, m, False, False) for s, m in itertools.product(others, modes)]
    return made + [case(run, goals[1], m, True, False) for m in modes]
