"""Cases of `python -m bench kernels` for the panes of a dense block in training: the sum of BN(1x1 conv) over all block
outputs so far.

Both of our forms are rows of one case. `jasper_fast` is the form that dispatch takes on this device; the other form is
`jasper_fast_gram` or `jasper_fast_plain`. These cases show which form is faster on a GPU.

The Gram matrix of a block output is computed once per step and used by every later block. In backward its gradients
from all blocks are added, and its part of dx is computed once. Each of the ten dense blocks is the first to use the
newest output, and the older matrices already exist. So the time of the Gram form includes `gram` of the newest input in
forward, and in backward `gram_backward` of the newest input and one addition for each older matrix. Summed over the ten
blocks, that is the cost of a step. Every dx is compared as a whole, with the parts that come from older matrices.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import ops
from jasper_fast.bench.cases import common, counts, models
from jasper_fast.bench.harness import correct
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice, compiler
from jasper_fast.dispatch import choose
from jasper_fast.kernels import layout
from jasper_fast.nn.architecture import block_shapes

# Up to 4,608 products and N*T rows are summed in another order. On one thread, eager's weight gradient in channels_last
# is 57 roundings from fp64 at 1,600 rows.
TOLERANCE = correct.Tolerance(factor=2.0, floor=100.0)
FORMS = ("gram", "plain")


@dataclass(frozen=True)
class Block:
    """The panes of a dense block: the channels of each block output that they read, the newest last."""

    widths: tuple[int, ...]
    C_out: int

    def key(self, N: int, T: int) -> dict:
        """The key of its rows."""
        count = f"{len(self.widths)} input{'s' if len(self.widths) > 1 else ''}"
        return {"shape": f"({N}, {sum(self.widths)}->{self.C_out}, {T})", "panes": count}


def blocks() -> list[Block]:
    """Jasper 10x5's ten dense blocks in order: 1 to 10 inputs."""
    shapes = block_shapes(models.config("jasper10x5"))
    return [Block(tuple(panes), b.filters) for _, b, panes in shapes if panes]


def ends_and_middle() -> list[Block]:
    """The last block, the fifth and the first: the largest first."""
    found = blocks()
    return [found[-1], found[(len(found) - 1) // 2], found[0]]


class Inputs(common.Held):
    """The tensors of one block in NCT and in NTC memory, with the same values, refilled in place. With 16-bit
    activations the parameters are fp32."""

    def __init__(self, N: int, T: int, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self.nct = [torch.empty(N, C, T, dtype=dtype, device=device) for C in block.widths]
        self.ntc = [layout.ntc(x) for x in self.nct]
        self.dy = {"nct": torch.empty(N, block.C_out, T, dtype=dtype, device=device)}
        self.dy["ntc"] = layout.ntc(self.dy["nct"])
        wide = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        self.weights = [torch.empty(block.C_out, C, 1, **wide) for C in block.widths]
        self.gammas, self.betas = ([torch.empty(block.C_out, **wide) for _ in block.widths] for _ in range(2))
        self.lengths = torch.empty(N, dtype=torch.int64, device=device)
        for t in (*self.nct, *self.ntc, *self.weights, *self.gammas, *self.betas):
            t.requires_grad_()
        self.refill(0)

    def fill(self, g: torch.Generator) -> None:
        """Draws new values. Each x is the output of a ReLU whose channels have different means; x and dy are zero in
        the padding, as in the model."""
        self.draw_lengths(self.lengths, self.nct[0].shape[2], g)
        for x, last in zip(self.nct, self.ntc, strict=True):
            means = 0.5 * torch.randn(x.shape[1], 1, generator=g, device=self.device)
            x.copy_(common.masked((self.randn(x, g) + means).relu_(), self.lengths))
            last.copy_(x)
        self.dy["nct"].copy_(common.masked(self.randn(self.dy["nct"], g), self.lengths))
        self.dy["ntc"].copy_(self.dy["nct"])
        for weight, gamma, beta in zip(self.weights, self.gammas, self.betas, strict=True):
            weight.copy_(self.randn(weight, g) * weight.shape[1] ** -0.5)
            gamma.copy_(self.positive(gamma, g))
            beta.copy_(self.randn(beta, g) * 0.3)

    def fresh_running(self, dtype: torch.dtype | None = None) -> list[common.Stats]:
        """Running mean and variance of each pane as a new layer has them."""
        return [common.fresh_running(g.detach().to(dtype or g.dtype)) for g in self.gammas]


@dataclass(frozen=True)
class Leaves:
    """The inputs of a sum of panes that get gradients, one list of each kind."""

    xs: list[Tensor]
    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]

    def named(self) -> dict[str, Tensor]:
        """All tensors, by the names of their gradients."""
        lists = {"dx": self.xs, "dweight": self.weights, "dgamma": self.gammas, "dbeta": self.betas}
        return {f"{name} {k}": t for name, tensors in lists.items() for k, t in enumerate(tensors)}


# ------------------------------------------------------------------ the contenders
# `(leaves, lengths, running statistics, Gram matrices of the older inputs) -> sum (N, C_out, T)`; only the Gram form
# gets Gram matrices, the others get ()

PaneSum = Callable[[Leaves, Tensor, list[common.Stats], Sequence[ops.Gram]], Tensor]


def eager(a: Leaves, lengths: Tensor, running: list[common.Stats], older: Sequence[ops.Gram]) -> Tensor:
    """The reference's panes in NCT memory, one module per step: mask, conv, batch norm, sum."""
    convs = (F.conv1d(common.masked(x, lengths), weight) for x, weight in zip(a.xs, a.weights, strict=True))
    return _sum_of_norms(convs, a, running)


def eager_2d(a: Leaves, lengths: Tensor, running: list[common.Stats], older: Sequence[ops.Gram]) -> Tensor:
    """The same in channels_last memory; for a 1x1 weight all memory orders are the same."""
    xs = (common.masked_last(x, lengths).unsqueeze(2) for x in a.xs)
    convs = (F.conv2d(x, weight.unsqueeze(2)) for x, weight in zip(xs, a.weights, strict=True))
    return _sum_of_norms(convs, a, running).squeeze(2)


def _sum_of_norms(ys: Iterable[Tensor], a: Leaves, running: list[common.Stats]) -> Tensor:
    norms = (
        F.batch_norm(y, *stats, gamma, beta, True, common.MOMENTUM, common.EPS)
        for y, stats, gamma, beta in zip(ys, running, a.gammas, a.betas, strict=True)
    )
    return functools.reduce(torch.add, norms)


def fused(form: str, backend: str) -> PaneSum:
    """jasper_fast's panes in the given form, called as by a block of its model."""

    def call(a: Leaves, lengths: Tensor, running: list[common.Stats], older: Sequence[ops.Gram]) -> Tensor:
        if form == "gram":
            grams = [*older, *map(ops.gram, a.xs[len(older) :])]
            out, mean, var = ops.panes(a.xs, grams, a.weights, a.gammas, a.betas, eps=common.EPS)
        else:
            more = {"lengths": lengths, "eps": common.EPS, "backend": backend}
            out, mean, var = ops.panes_plain(a.xs, a.weights, a.gammas, a.betas, **more)
        with torch.no_grad():
            for stat, buffers in zip((mean, var), zip(*running, strict=True), strict=True):
                torch._foreach_lerp_(list(buffers), list(stat.unbind()), common.MOMENTUM)
        return out

    return call


# ------------------------------------------------------------------ running and checking


def older_grams(xs: Sequence[Tensor]) -> list[ops.Gram]:
    """The Gram matrices of all inputs but the newest, which earlier blocks of the step have computed."""
    with torch.no_grad():
        found = [ops.gram(x) for x in xs[:-1]]
    for t in (t for gram in found for t in (gram.mean, gram.cov)):
        t.requires_grad_()
    return found


def results(out: Tensor, a: Leaves, dy: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """The gradients, with dx zeroed in the padding, where it is undefined because the input is zero there."""
    wanted = a.named()
    found = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), dy), strict=True))
    return {name: common.masked(t, lengths) if name.startswith("dx") else t for name, t in found.items()}


def statistics(running: list[common.Stats]) -> dict[str, Tensor]:
    """The running statistics of each pane, by name."""
    names = ("running_mean", "running_var")
    return {f"{name} {k}": t for k, stats in enumerate(running) for name, t in zip(names, stats, strict=True)}


def runner(function: PaneSum, i: Inputs, memory: str, mode: str, *, amp: bool = False, gram: bool = False) -> Runner:
    """The runner of an implementation, on inputs in its memory order, under autocast with `amp`. `gram`: the Gram
    matrices of the older inputs are given, and their gradients are added to those of later blocks."""
    a, dy = Leaves(getattr(i, memory), i.weights, i.gammas, i.betas), i.dy[memory]
    running, wanted = i.fresh_running(), list(a.named().values())
    made: dict[int, Sequence[ops.Gram]] = {}  # by refill
    sums: list[Tensor] = []

    def older() -> Sequence[ops.Gram]:
        if i.refills not in made:
            made.clear()
            made[i.refills] = older_grams(a.xs) if gram else ()
        return made[i.refills]

    def forward(stats: list[common.Stats] = running, given: Sequence[ops.Gram] | None = None) -> Tensor:
        with i.autocast(amp):
            return function(a, i.lengths, stats, older() if given is None else given)

    def gradients(out: Tensor, retain: bool) -> None:
        matrices = [t for g in older() for t in (g.mean, g.cov)]
        found = torch.autograd.grad(out, wanted + matrices, dy, retain_graph=retain)
        if matrices:
            sums[:] = sums or [torch.zeros_like(t) for t in matrices]
            torch._foreach_add_(sums, list(found[len(wanted) :]))

    def outputs() -> dict[str, Tensor]:
        stats = i.fresh_running()
        if mode == "forward":
            return {"sum": forward(stats), **statistics(stats)}
        out = forward(stats, ())
        return {"sum": out, **statistics(stats), **results(out, a, dy, i.lengths)}

    return Runner(common.timed(mode, i, forward, gradients), outputs)


def answer(i: Inputs, dtype: torch.dtype, mode: str) -> dict[str, Tensor]:
    """Sum, running statistics and gradients by plain PyTorch in `dtype` (16 bits: under autocast). Computed once per
    seed."""
    key = (i.seed, dtype)
    if key not in i.answers:
        wide = torch.promote_types(dtype, torch.float32)
        of = lambda tensors, dtype: [t.detach().to(dtype).requires_grad_() for t in tensors]  # noqa: E731
        a = Leaves(of(i.nct, dtype), *(of(tensors, wide) for tensors in (i.weights, i.gammas, i.betas)))
        running = i.fresh_running(wide)
        with i.autocast(dtype is not torch.float64):
            out = eager(a, i.lengths, running, ())
        found = results(out, a, i.dy["nct"].to(out.dtype), i.lengths)
        i.answers[key] = {"sum": out.detach(), **statistics(running), **found}
    found = i.answers[key]
    return {k: t for k, t in found.items() if not k.startswith("d")} if mode == "forward" else found


def case(run: Run, N: int, T: int, block: Block, mode: str, shared: Callable[[], Inputs] | None = None) -> Case:
    """The case of one block's panes in one mode, for `N` utterances of `T` frames; cases of one block may share
    inputs."""
    inputs = shared or functools.cache(lambda: Inputs(N, T, block, run.dtype, run.device))
    form = choose.pane_form(run.backend, run.device, run.dtype)

    def ours(name: str, form: str) -> Contender:
        make = lambda: runner(fused(form, run.backend), inputs(), "ntc", mode, gram=form == "gram")  # noqa: E731
        return Contender(name, make)

    def rival(name: str, build: Callable[[], PaneSum], memory: str) -> Contender:
        return Contender(name, lambda: runner(build(), inputs(), memory, mode, amp=True))

    contenders = [ours("jasper_fast", form)]
    contenders += [ours(f"jasper_fast_{other}", other) for other in FORMS if other != form]
    known = {
        "eager": (lambda: eager, "nct"),
        "eager_2d_channels_last": (lambda: eager_2d, "ntc"),
        "compile_max_autotune": (lambda: compiler.max_autotuned(eager, mode), "nct"),
    }
    contenders += [rival(name, *known[name]) for name in choice.for_sub_blocks(run) if name in known]
    panes = [counts.Conv("", N, C, block.C_out, 1, T, T, place="pane") for C in block.widths]
    directions = {"forward": 1, "backward": 2, "both": 3}
    return Case(
        "kernels",
        {"op": "panes", **block.key(N, T), "dtype": run.dtype_name, "mode": mode},
        contenders,
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(inputs(), torch.float64, mode),
        low=lambda: answer(inputs(), run.dtype, mode),
        tolerance=TOLERANCE,
        flops=directions[mode] * sum(pane.flops for pane in panes),
        nbytes=counts.panes_bytes(panes, run.dtype.itemsize, mode),
        needs=("panes",) if form == "gram" else ("bn_relu_dropout",),
    )


def block_cases(run: Run, block: Block, modes: Sequence[str], N: int, T: int) -> list[Case]:
    """The modes of one block, over the same inputs."""
    inputs = functools.cache(lambda: Inputs(N, T, block, run.dtype, run.device))
    return [case(run, N, T, block, mode, inputs) for mode in modes]


def cases(run: Run, mode: str | None = None) -> Iterator[list[Case]]:
    """The cases block by block, so that only one block's tensors are in memory: all ten blocks on a GPU; the last, the
    fifth and the first on a CPU; with --quick only the fifth."""
    if run.quick or run.brief:
        chosen = ends_and_middle()[1:2]
    else:
        chosen = blocks()[::-1] if run.device.type == "cuda" else ends_and_middle()
    N, T = common.size(run)
    for block in chosen:
        yield block_cases(run, block, common.chosen(run, mode, common.MODES), N, T)
