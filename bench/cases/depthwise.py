"""Cases of `python -m bench kernels --op depthwise`: QuartzNet's depthwise convs, compared with PyTorch's grouped conv.

The mode "inference" is the forward pass with a weight that was packed before, as in the engine. The other modes are
those of training.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import ops
from jasper_fast.bench.cases import common, counts
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice
from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels.operands import Geometry, Lengths

# Shapes (N, C, K, T). The report compares our speed-up at GOAL with a fixed goal (bench/report/goals.py). GOAL is one
# utterance of 2 s, which has 100 frames after the network's stride of 2.
GOAL = (1, 512, 63, 100)
CPU_SHAPES = (GOAL, (4, 256, 33, 400), (4, 512, 75, 400))
GPU_SHAPES = ((32, 512, 63, 832), (32, 256, 33, 832), (32, 512, 75, 832), GOAL)
MODES = ("inference", *common.MODES)


class Inputs(common.Held):
    """The tensors of one shape in NCT and in NTC memory, with the same values.

    The weight is fp32 even with 16-bit activations. All utterances are as long as the tensor, because PyTorch's conv
    has no mask.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        N, C, self.K, T = shape
        self.geometry = Geometry(1, self.K // 2)
        super().__init__(N, dtype, device, x=(C, T), dy=(C, T))
        self.weight = torch.empty(C, 1, self.K, device=device, requires_grad=True)
        for memory in (self.nct, self.ntc):
            memory["x"].requires_grad_()
        self.refill(0)

    def fill(self, g: torch.Generator) -> None:
        for t in self.nct.values():
            t.copy_(self.randn(t, g))
        self.weight.copy_(self.randn(self.weight, g) * self.K**-0.5)


def eager(x: Tensor, i: Inputs, weight: Tensor) -> Tensor:
    """Computes PyTorch's grouped conv in NCT memory, as NeMo does."""
    return F.conv1d(x, weight, None, *i.geometry, weight.shape[0])


def eager_2d(x: Tensor, i: Inputs, weight: Tensor) -> Tensor:
    """Computes PyTorch's grouped conv as a 2D conv in channels_last memory."""
    return F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), None, 1, (0, i.K // 2), 1, weight.shape[0]).squeeze(2)


def runner(chain: Callable[..., Tensor], i: Inputs, memory: str, mode: str, autocast: bool) -> Runner:
    """Returns the runner of an implementation on inputs in the order `memory`. Its outputs are y and both gradients."""
    tensors = getattr(i, memory)
    gradients = functools.partial(torch.autograd.grad, inputs=[tensors["x"], i.weight], grad_outputs=tensors["dy"])

    def forward() -> Tensor:
        with i.autocast(autocast):
            return chain(tensors["x"], i, i.weight)

    def everything() -> dict[str, Tensor]:
        y = forward()
        return {"y": y.detach(), **dict(zip(("dx", "dw"), gradients(y), strict=True))}

    run = torch.no_grad()(forward) if mode == "inference" else common.timed(mode, i, forward, gradients)
    return Runner(run, everything)


def packed(i: Inputs, backend: str) -> Runner:
    """Returns the runner of our forward pass with a weight that was packed before, as in the engine."""
    name = choose.depthwise_face(backend, i.device, i.dtype)
    face = backends.face("depthwise", "aten" if name == "reference" else name)
    weight = i.once_per_refill(lambda: face.pack_once(i.weight.detach(), i.dtype))
    x = i.ntc["x"].detach().transpose(1, 2)
    out = torch.empty_like(x)

    def run() -> None:
        face.into(out, x, weight(), i.geometry, Lengths())

    def answer() -> dict[str, Tensor]:
        run()
        trained = runner(functools.partial(fused, backend), i, "ntc", "both", False).outputs()
        return trained | {"y": out.transpose(1, 2).clone()}

    return Runner(run, answer)


def fused(backend: str, x: Tensor, i: Inputs, weight: Tensor) -> Tensor:
    """Computes the conv by jasper_fast's op, with the arguments of `eager`."""
    return ops.depthwise(x, weight, padding=i.K // 2, backend=backend)


def answer(i: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the output and gradients of plain PyTorch in `dtype`."""
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (i.nct["x"], i.weight))
    y = eager(x, i, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), i.nct["dy"].to(dtype))
    return {"y": y.detach(), "dx": dx, "dw": dw}


def case(run: Run, shape: tuple[int, int, int, int], mode: str) -> Case:
    """Returns the case of one shape and mode."""
    N, C, K, T = shape
    inputs = functools.cache(lambda: Inputs(shape, run.dtype, run.device))

    def ours() -> Runner:
        if mode == "inference":
            return packed(inputs(), run.backend)
        return runner(functools.partial(fused, run.backend), inputs(), "ntc", mode, False)

    rivals = {"eager": (eager, "nct"), "eager_2d_channels_last": (eager_2d, "ntc")}

    def rival(name: str) -> Contender:
        chain, memory = rivals[name]
        return Contender(name, lambda: runner(chain, inputs(), memory, mode, True))

    passes = counts.DIRECTIONS.get(mode, 1)  # inference is one forward pass
    return Case(
        "kernels",
        {"op": "depthwise", "shape": f"({N}, {C}, {T})", "taps": f"K = {K}", "dtype": run.dtype_name, "mode": mode},
        [Contender("jasper_fast", ours), *(rival(name) for name in choice.for_sub_blocks(run) if name in rivals)],
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(inputs(), torch.float64),
        low=lambda: answer(inputs(), run.dtype),
        tolerance=common.CONV_TOLERANCE,
        flops=passes * 2 * N * C * K * T,
        nbytes=passes * (2 * N * C * T * run.dtype.itemsize + 4 * C * K),
        needs=("depthwise",),
    )


def cases(run: Run, mode: str | None = None) -> Iterator[list[Case]]:
    """Yields the cases of one shape after another: in a `quick` or `brief` run only the first, in at most two modes."""
    shapes = GPU_SHAPES if run.device.type == "cuda" else CPU_SHAPES
    modes = MODES if mode is None else (mode,)
    if run.quick or run.brief:
        shapes, modes = shapes[:1], modes[:2]
    for shape in shapes:
        yield [case(run, shape, m) for m in modes]
