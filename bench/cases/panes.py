"""Cases of `python -m bench kernels` for the panes of a dense block in training: the sum of BN(1x1 conv) over all
earlier block outputs.

A case has a row for each of our two forms. `jasper_fast` is the form that dispatch chooses on this device. The other
form is `jasper_fast_gram` or `jasper_fast_plain`.

In a step the Gram matrix of a block output is computed once, and every later block uses it. In backward the gradients
of the matrix from all these blocks are added up, and then the part of dx that comes from the matrix is computed once.

A dense block is the first to use its newest input. The Gram matrices of its older inputs exist already. So in forward
the time of the Gram form includes `gram` of the newest input. In backward it includes `gram_backward` of the newest
input, and one addition for each older matrix. Summed over the ten blocks, this is the work of a step. In the comparison
with fp64, dx includes the parts that come from older matrices.
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
from jasper_fast.nn.architecture import block_shapes

# The order of the sums, over up to 4,608 products and over N*T rows, depends on the kernel. On one thread in
# channels_last memory, eager's weight gradient of 1,600 rows differs from fp64 by 57 eps.
TOLERANCE = correct.Tolerance(factor=2.0, floor=100.0)
FORMS = ("gram", "plain")


@dataclass(frozen=True)
class Block:
    """The panes of a dense block: the number of channels of each block output that they read, newest last."""

    widths: tuple[int, ...]
    C_out: int

    def key(self, N: int, T: int) -> dict:
        """Returns the key of the block's rows."""
        shape, plural = f"({N}, {sum(self.widths)}->{self.C_out}, {T})", "s" if len(self.widths) > 1 else ""
        return {"shape": shape, "panes": f"{len(self.widths)} input{plural}"}


def blocks() -> list[Block]:
    """Returns the ten dense blocks of Jasper 10x5 in order. They have 1 to 10 inputs."""
    return [Block(tuple(panes), b.filters) for _, b, panes in block_shapes(models.config("jasper10x5")) if panes]


def ends_and_middle() -> list[Block]:
    """Returns the last, the fifth and the first dense block, largest first."""
    found = blocks()
    return [found[-1], found[(len(found) - 1) // 2], found[0]]


class Inputs(common.Held):
    """The tensors of one block in NCT and in NTC memory, with the same values. With 16-bit activations the parameters
    are fp32."""

    def __init__(self, N: int, T: int, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(N, dtype, device, **{f"x{k}": (C, T) for k, C in enumerate(block.widths)}, dy=(block.C_out, T))
        wide = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        self.weights = [torch.empty(block.C_out, C, 1, **wide) for C in block.widths]
        self.gammas, self.betas = ([torch.empty(block.C_out, **wide) for _ in block.widths] for _ in range(2))
        for t in (*self.xs("nct"), *self.xs("ntc"), *self.weights, *self.gammas, *self.betas):
            t.requires_grad_()
        self.refill(0)

    def fill(self, g: torch.Generator) -> None:
        """Draws new values. Each x is the output of a ReLU whose channels have different means. x and dy are zero in
        the padding, as in the model."""
        dy = self.nct["dy"]
        self.draw_lengths(dy.shape[2], g)
        for x in self.xs("nct"):
            means = 0.5 * torch.randn(x.shape[1], 1, generator=g, device=self.device)
            x.copy_(common.masked((self.randn(x, g) + means).relu_(), self.lengths))
        dy.copy_(common.masked(self.randn(dy, g), self.lengths))
        for weight, gamma, beta in zip(self.weights, self.gammas, self.betas, strict=True):
            weight.copy_(self.randn(weight, g) * weight.shape[1] ** -0.5)
            self.draw_norm(gamma, beta, g)

    def xs(self, memory: str) -> list[Tensor]:
        """Returns the inputs of the panes in the memory order "nct" or "ntc"."""
        return [t for name, t in getattr(self, memory).items() if name != "dy"]

    def fresh_running(self, dtype: torch.dtype | None = None) -> list[common.Stats]:
        """Returns the running mean and variance of each pane, with the values of a new layer."""
        return [common.fresh_running(g.detach().to(dtype or g.dtype)) for g in self.gammas]


@dataclass(frozen=True)
class Leaves:
    """The inputs of a sum of panes that get gradients, with one element per pane in each list."""

    xs: list[Tensor]
    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]

    def named(self) -> dict[str, Tensor]:
        """Returns all tensors, by the names of their gradients."""
        lists = {"dx": self.xs, "dweight": self.weights, "dgamma": self.gammas, "dbeta": self.betas}
        return {f"{name} {k}": t for name, tensors in lists.items() for k, t in enumerate(tensors)}


# ------------------------------------------------------------------ the contenders


# `(leaves, lengths, running statistics, Gram matrices of the older inputs) -> sum (N, C_out, T)`. Only the Gram form
# gets Gram matrices. The other contenders get ().
PaneSum = Callable[[Leaves, Tensor, list[common.Stats], Sequence[ops.Gram]], Tensor]


def eager(a: Leaves, lengths: Tensor, running: list[common.Stats], older: Sequence[ops.Gram]) -> Tensor:
    """Computes the panes as NVIDIA's Jasper does, in NCT memory: mask, conv, batch norm and sum one after the other."""
    convs = (F.conv1d(common.masked(x, lengths), weight) for x, weight in zip(a.xs, a.weights, strict=True))
    return _sum_of_norms(convs, a, running)


def eager_2d(a: Leaves, lengths: Tensor, running: list[common.Stats], older: Sequence[ops.Gram]) -> Tensor:
    """Computes the same as `eager` in channels_last memory. A weight with one tap is the same in both orders."""
    xs = (common.masked_last(x, lengths).unsqueeze(2) for x in a.xs)
    convs = (F.conv2d(x, weight.unsqueeze(2)) for x, weight in zip(xs, a.weights, strict=True))
    return _sum_of_norms(convs, a, running).squeeze(2)


def _sum_of_norms(ys: Iterable[Tensor], a: Leaves, running: list[common.Stats]) -> Tensor:
    norms = (
        F.batch_norm(y, *stats, gamma, beta, True, common.MOMENTUM, common.EPS)
        for y, stats, gamma, beta in zip(ys, running, a.gammas, a.betas, strict=True)
    )
    return functools.reduce(torch.add, norms)


def fused(
    form: str, backend: str, a: Leaves, lengths: Tensor, running: list[common.Stats], older: Sequence[ops.Gram]
) -> Tensor:
    """Computes jasper_fast's panes in the form "gram" or "plain", as a block of its model does."""
    norms = a.weights, a.gammas, a.betas
    if form == "gram":
        grams = [*older, *map(ops.gram, a.xs[len(older) :])]
        out, mean, var = ops.panes(a.xs, grams, *norms, eps=common.EPS)
    else:
        out, mean, var = ops.panes_plain(a.xs, *norms, lengths=lengths, eps=common.EPS, backend=backend)
    with torch.no_grad():
        for stat, buffers in zip((mean, var), zip(*running, strict=True), strict=True):
            torch._foreach_lerp_(list(buffers), list(stat.unbind()), common.MOMENTUM)
    return out


# ------------------------------------------------------------------ running and checking


def older_grams(xs: Sequence[Tensor]) -> list[ops.Gram]:
    """Returns the Gram matrices of all inputs except the newest. In a step, earlier blocks have computed them."""
    with torch.no_grad():
        found = [ops.gram(x) for x in xs[:-1]]
    for t in (t for gram in found for t in (gram.mean, gram.cov)):
        t.requires_grad_()
    return found


def results(out: Tensor, a: Leaves, dy: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Returns the gradients. In the padding dx is set to zero, because contenders may differ there."""
    wanted = a.named()
    found = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), dy), strict=True))
    return {name: common.masked(t, lengths) if name.startswith("dx") else t for name, t in found.items()}


def statistics(running: list[common.Stats]) -> dict[str, Tensor]:
    """Returns the running statistics of each pane, by name."""
    found = {f"running_mean {k}": mean for k, (mean, _) in enumerate(running)}
    return found | {f"running_var {k}": var for k, (_, var) in enumerate(running)}


def runner(function: PaneSum, i: Inputs, memory: str, mode: str, *, amp: bool = False, gram: bool = False) -> Runner:
    """Returns the runner of an implementation, on inputs in its memory order.

    With `amp` the implementation runs under autocast. With `gram` it gets the Gram matrices of the older inputs, and
    the gradients of these matrices are added to a sum, as in a step.
    """
    a, dy = Leaves(i.xs(memory), i.weights, i.gammas, i.betas), getattr(i, memory)["dy"]
    running, wanted = i.fresh_running(), list(a.named().values())
    older = i.once_per_refill(lambda: older_grams(a.xs) if gram else ())
    sums: list[Tensor] = []

    def forward(stats: list[common.Stats] = running, given: Sequence[ops.Gram] | None = None) -> Tensor:
        with i.autocast(amp):
            return function(a, i.lengths, stats, older() if given is None else given)

    def gradients(out: Tensor, retain_graph: bool = False) -> None:
        matrices = [t for g in older() for t in (g.mean, g.cov)]
        found = torch.autograd.grad(out, wanted + matrices, dy, retain_graph=retain_graph)
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
    """Returns the sum, running statistics and gradients of plain PyTorch in `dtype` (for 16 bits, under autocast).

    The answer is computed once per seed and dtype.
    """
    key = (i.seed, dtype)
    if key not in i.answers:
        wide = torch.promote_types(dtype, torch.float32)
        of = lambda tensors, dtype: [t.detach().to(dtype).requires_grad_() for t in tensors]  # noqa: E731
        a = Leaves(of(i.xs("nct"), dtype), *(of(tensors, wide) for tensors in (i.weights, i.gammas, i.betas)))
        running = i.fresh_running(wide)
        with i.autocast(dtype is not torch.float64):
            out = eager(a, i.lengths, running, ())
        found = results(out, a, i.nct["dy"].to(out.dtype), i.lengths)
        i.answers[key] = {"sum": out.detach(), **statistics(running), **found}
    found = i.answers[key]
    return {k: t for k, t in found.items() if not k.startswith("d")} if mode == "forward" else found


def case(run: Run, N: int, T: int, block: Block, mode: str, shared: Callable[[], Inputs] | None = None) -> Case:
    """Returns the case of one block's panes in one mode, for `N` utterances of `T` frames. Cases of one block may share
    inputs."""
    inputs = shared or functools.cache(lambda: Inputs(N, T, block, run.dtype, run.device))
    form = choose.pane_form(run.backend, run.device, run.dtype)

    def ours(name: str, form: str) -> Contender:
        call = functools.partial(fused, form, run.backend)
        return Contender(name, lambda: runner(call, inputs(), "ntc", mode, gram=form == "gram"))

    def rival(name: str, build: Callable[[], PaneSum], memory: str) -> Contender:
        return Contender(name, lambda: runner(build(), inputs(), memory, mode, amp=True))

    known = {
        "eager": (lambda: eager, "nct"),
        "eager_2d_channels_last": (lambda: eager_2d, "ntc"),
        "compile_max_autotune": (lambda: compiler.max_autotuned(eager, mode), "nct"),
    }
    panes = [counts.Conv("", N, C, block.C_out, 1, T, T, place="pane") for C in block.widths]
    return Case(
        "kernels",
        {"op": "panes", **block.key(N, T), "dtype": run.dtype_name, "mode": mode},
        [
            ours("jasper_fast", form),
            *(ours(f"jasper_fast_{other}", other) for other in FORMS if other != form),
            *(rival(name, *known[name]) for name in choice.for_sub_blocks(run) if name in known),
        ],
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(inputs(), torch.float64, mode),
        low=lambda: answer(inputs(), run.dtype, mode),
        tolerance=TOLERANCE,
        flops=counts.DIRECTIONS[mode] * sum(pane.flops for pane in panes),
        nbytes=counts.panes_bytes(panes, run.dtype.itemsize, mode),
        needs=("panes",) if form == "gram" else ("bn_relu_dropout",),
    )


def block_cases(run: Run, block: Block, modes: Sequence[str], N: int, T: int) -> list[Case]:
    """Returns one case per mode of a block, with shared inputs."""
    inputs = functools.cache(lambda: Inputs(N, T, block, run.dtype, run.device))
    return [case(run, N, T, block, mode, inputs) for mode in modes]


def cases(run: Run, mode: str | None = None) -> Iterator[list[Case]]:
    """Yields the cases of one block after another, so that only one block's tensors are in memory.

    On a GPU the blocks are all ten, from the last to the first; on a CPU the last, the fifth and the first. A `quick`
    or `brief` run has only the fifth.
    """
    if run.quick or run.brief:
        chosen = ends_and_middle()[1:2]
    else:
        chosen = blocks()[::-1] if run.device.type == "cuda" else ends_and_middle()
    N, T = common.size(run)
    for block in chosen:
        yield block_cases(run, block, common.chosen(run, mode, common.MODES), N, T)
