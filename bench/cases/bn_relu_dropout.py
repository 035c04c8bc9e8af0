"""Cases of `python -m bench kernels --op bn_relu_dropout`: forward, backward and both in training.

The op is compared with the eager chain at each width (number of channels) of Jasper's layers.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import ops
from jasper_fast.bench.cases import common, counts
from jasper_fast.bench.harness import correct
from jasper_fast.bench.harness.case import Answer, Case, Contender, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice, compiler

# Shapes (N, C, T): two that have goals, then the other widths of Jasper 10x5, and on a GPU single utterances.
CPU_SHAPES = ((8, 256, 800), (4, 768, 800), (4, 384, 800), (4, 512, 800), (4, 640, 800), (4, 896, 800), (4, 1024, 800))
GPU_SHAPES = tuple((32, C, 832) for C in (256, 768, 384, 512, 640, 896, 1024)) + ((1, 256, 352), (1, 768, 352))
GRADIENTS = ("dy", "dgamma", "dbeta", "dres")
# The order of the sums over N*T rows depends on the kernel, so up to 40 eps are allowed. Even PyTorch differs from fp64
# by 23 eps (on one thread, in channels_last memory).
TOLERANCE = correct.Tolerance(factor=2.0, floor=40.0)


class Inputs(common.Held):
    """The tensors of one shape in NCT and in NTC memory, with the same values."""

    def __init__(self, N: int, C: int, T: int, dtype: torch.dtype, device: torch.device, residual: bool) -> None:
        super().__init__(
            N, dtype, device, **dict.fromkeys(("y", "dz", "residual") if residual else ("y", "dz"), (C, T))
        )
        self.gamma, self.beta = (torch.empty(C, device=device, requires_grad=True) for _ in range(2))
        for name, t in (*self.nct.items(), *self.ntc.items()):
            t.requires_grad_(name != "dz")
        self.refill(0)

    def fill(self, g: torch.Generator) -> None:
        """Draws new values. Each channel of y has its own mean, as in a conv's output."""
        self.draw_norm(self.gamma, self.beta, g)
        for t in self.nct.values():
            t.copy_(self.randn(t, g))
        y = 1.5 * self.nct["y"] + self.randn(self.gamma, g)[:, None]
        self.nct["y"].copy_(common.off_the_edge(y, self.gamma, self.beta, self.nct.get("residual"), self.dtype))
        self.draw_lengths(y.shape[2], g)


def fused(backend: str, y: Tensor, gamma: Tensor, beta: Tensor, running: common.Stats, residual, lengths, p) -> Tensor:
    """Computes the chain by jasper_fast's op, with the arguments of `eager_chain`."""
    return ops.bn_relu_dropout(
        y,
        gamma,
        beta,
        *running,
        residual=residual,
        lengths=lengths,
        p=p,
        training=True,
        momentum=common.MOMENTUM,
        eps=common.EPS,
        backend=backend,
    )


def named(z: Tensor, gradients: Sequence[Tensor], running: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Returns the tensors of an answer that are compared, by name. Without a residual there is no "dres"."""
    found = {"z": z, "running_mean": running[0], "running_var": running[1]}
    return found | dict(zip(GRADIENTS, gradients, strict=False))


def runner(chain: common.Chain, inputs: Inputs, memory: str, mode: str, p: float) -> Runner:
    """Returns the runner of a chain on inputs in the order `memory`. Its `outputs` are all results and gradients."""
    tensors = getattr(inputs, memory)
    residual = tensors.get("residual")
    wanted = [tensors["y"], inputs.gamma, inputs.beta] + ([residual] if residual is not None else [])
    running = common.fresh_running(inputs.gamma)
    gradients = functools.partial(torch.autograd.grad, inputs=wanted, grad_outputs=tensors["dz"])

    def forward(q: float = p, stats: common.Stats = running) -> Tensor:
        return chain(tensors["y"], inputs.gamma, inputs.beta, stats, residual, inputs.lengths, q)

    def everything(q: float) -> dict[str, Tensor]:
        stats = common.fresh_running(inputs.gamma)
        z = forward(q, stats)
        return named(z, gradients(z), stats)

    return Runner(
        common.timed(mode, inputs, forward, gradients),
        lambda: everything(0.0),
        lambda: dropout_complaints(everything(p), inputs, p),
    )


def answer(inputs: Inputs, dtype: torch.dtype, keep: Tensor | None = None, p: float = 0.0) -> dict[str, Tensor]:
    """Returns the results and gradients of plain PyTorch in `dtype`. `keep` (N, C, T) is the dropout mask, if any."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.nct.items() if n != "dz"}
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    gamma, beta = (t.detach().to(wide).requires_grad_() for t in (inputs.gamma, inputs.beta))
    running = common.fresh_running(gamma.detach())
    z = F.batch_norm(leaves["y"], *running, gamma, beta, True, common.MOMENTUM, common.EPS)
    z = (z + leaves["residual"] if "residual" in leaves else z).relu()
    if keep is not None:
        z = z * keep / (1 - p)
    z = common.masked(z, inputs.lengths)
    wanted = [leaves["y"], gamma, beta] + ([leaves["residual"]] if "residual" in leaves else [])
    return named(z.detach(), torch.autograd.grad(z, wanted, inputs.nct["dz"].to(dtype)), running)


def dropout_complaints(got: Answer, inputs: Inputs, p: float) -> list[str]:
    """Returns complaints about an answer with dropout on.

    The dropout mask (where z is not zero) must have the right rate, and z and every gradient must match that mask.
    """
    keep = got["z"] != 0
    undropped = answer(inputs, torch.float32)["z"] > 1e-3
    wrong = correct.keep_rate_complaints(int((keep & undropped).sum()), int(undropped.sum()), p)
    low, ref = (answer(inputs, dtype, keep, p) for dtype in (inputs.dtype, torch.float64))
    return [f"dropout on: {line}" for line in wrong + correct.complaints(got, low, ref, TOLERANCE)]


def case(run: Run, shape: tuple[int, int, int], mode: str, residual: bool, compiled: bool) -> Case:
    """Returns the case of one shape and mode of the op."""
    N, C, T = shape
    inputs = functools.cache(lambda: Inputs(N, C, T, run.dtype, run.device, residual))

    def contender(name: str, build: Callable[[], common.Chain], memory: str = "ntc") -> Contender:
        return Contender(name, lambda: runner(build(), inputs(), memory, mode, common.P))

    def compile_chain() -> common.Chain:
        compiler.needs_compiler()
        return torch.compile(common.eager_chain, dynamic=False)

    rivals = {
        "eager": contender("eager", lambda: common.eager_chain, "nct"),
        "eager_2d_channels_last": contender("eager_2d_channels_last", lambda: common.eager_chain_2d),
        choice.CUDA_FACE: contender(
            choice.CUDA_FACE, lambda: functools.partial(fused, choice.cuda_backend(run, convs=False))
        ),
    }
    contenders = [contender("jasper_fast", lambda: functools.partial(fused, run.backend))]
    contenders += [rivals[name] for name in choice.for_sub_blocks(run) if name in rivals]
    if compiled:
        contenders.append(contender("compile", compile_chain, "nct"))
    if run.rivals == "all" and run.backend != "reference":
        contenders.append(contender("reference", lambda: functools.partial(fused, "reference")))
    return Case(
        "kernels",
        {
            "op": "bn_relu_dropout" + ("+residual" if residual else ""),
            "shape": f"({N}, {C}, {T})",
            "dtype": run.dtype_name,
            "mode": mode,
            "p": common.P,
        },
        contenders,
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(inputs(), torch.float64),
        low=lambda: answer(inputs(), run.dtype),
        tolerance=TOLERANCE,
        flops=counts.bn_relu_dropout_flops(N, C, T, mode),
        nbytes=counts.bn_relu_dropout_bytes(N, C, T, run.dtype.itemsize, mode, residual),
        needs=("bn_relu_dropout",),
    )


def cases(run: Run, mode: str | None = None) -> list[Case]:
    """Returns the cases: every shape in every mode, and the second shape also with a residual.

    The first two shapes have goals. A `quick` run has no others. If `mode` is None, a `quick` run has only the mode
    "both", and so has a `brief` run, except for the first shape.
    """
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
