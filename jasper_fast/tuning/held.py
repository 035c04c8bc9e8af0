"""The inputs of a cell, and functions that run its contenders on them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.dispatch import backends
from jasper_fast.kernels import tables
from jasper_fast.kernels.layout import mask
from jasper_fast.kernels.operands import Mask, Norm
from jasper_fast.kernels.tables import Cell
from jasper_fast.selfcheck import cases, checks
from jasper_fast.selfcheck.checks import DTYPES, Check
from jasper_fast.tuning.faces import LIBRARY, Proposal

SMALL_ROWS = 1536  # rows of the inputs on which a contender is compared with fp64
# {op of bn_relu_dropout in a table: function of the self-check that runs it}, for forward and backward
NORM_FUNCTIONS = dict(zip(tables.NORM_OPS, ("stats_forward", "backward"), strict=True))


def check_of(cell: Cell, proposal: Proposal, *, small: bool = False) -> Check:
    """Returns the self-check's `Check` for a contender. Its shape is that of the timed batch or, with `small`, of a
    small one."""
    n, frames = cell.batch
    if small:
        n = min(n, 2)
        frames = max(1, min(frames, SMALL_ROWS // n) - (frames > 3))  # mostly an odd number, as in real batches
    tile = None if proposal.tile is None else dict(proposal.tile)
    if cell.op in NORM_FUNCTIONS:
        # with lengths, dropout and the halo of the conv before, as the blocks of Jasper call it
        shape, function = checks.Norm(n, cell.c_in, frames), NORM_FUNCTIONS[cell.op]
        return Check("bn_relu_dropout", proposal.face, function, "tuning", shape, cell.dtype, "halo", tile)
    function = cell.op.removeprefix("conv1d.")
    shape = checks.Conv(n, frames * cell.stride, *cell[2:7])
    variant = ("log-softmax" if is_decoder(cell) else "splits") if function == "fused" else ""
    op = "conv1d.fused" if function == "fused" else "conv1d"
    return Check(op, proposal.face, function, "tuning", shape, cell.dtype, variant, tile)


def is_decoder(cell: Cell) -> bool:
    """Whether a conv at inference is the decoder, which ends in a log-softmax. Only the decoder has few outputs whose
    number is not a multiple of 16."""
    return cell.op == "conv1d.fused" and cell.taps == 1 and cell.c_out < 128 and cell.c_out % 16 != 0


class Held:
    """Holds the inputs of a cell. Each face has its own set, because faces pack weights differently. Only PyTorch's
    conv has none, and reads the Triton face's. A set is made at its first use."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self._cases: dict[str, cases.Case] = {}

    def case(self, face: str) -> cases.Case:
        """Returns the self-check's case for `face`, with inputs and functions."""
        if face not in self._cases:
            self._cases[face] = cases.case(check_of(self.cell, Proposal(face)), self.device, 0, timed=True)
        return self._cases[face]

    def call(self, proposal: Proposal) -> Callable[[], dict[str, Tensor]]:
        """Returns a function that runs the contender on the inputs."""
        family = self.cell.op.split(".")[0]
        if family == "conv1d" and proposal.face == LIBRARY[family]:
            return library(check_of(self.cell, proposal), self.case("triton").inputs)
        case = self.case(proposal.face)
        if proposal.tile is None:
            return case.ours

        def with_tile() -> dict[str, Tensor]:
            with tables.forced(self.cell.op, proposal.tile, proposal.face):
                return case.ours()

        return with_tile

    def free(self) -> None:
        """Frees the inputs, and returns free blocks of the allocator to the GPU, which the user's process shares."""
        self._cases.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def library(check: Check, inputs: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Returns a function that does the work of `check` with PyTorch's conv, and then, for kernels with a fused batch
    norm, with a separate batch norm pass."""
    s, function, i = check.shape, check.function, inputs
    conv, dtype = s.geometry, DTYPES[check.dtype]
    triton = backends.why_missing("triton", i["weight"].device) is None
    aten, bn = backends.face("conv1d", "aten"), backends.face("bn_relu_dropout", "triton" if triton else "reference")
    # The weight is cast only once, as in autocast's cache and in the engine. Without channels-last memory cuDNN would
    # copy it in each call.
    weight = i["weight"].to(dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last)

    def call() -> dict[str, Tensor]:
        if function == "wgrad":
            return {"dw": aten.wgrad(i["x"], i["dy"], s.k, conv, dtype=torch.float32)}
        if function.startswith("dgrad"):
            dx = aten.dgrad(i["dy"], weight.squeeze(2), s.t, conv)
            if function == "dgrad":
                return {"dx": dx}
            norm, zeroed = Norm(*(i[name] for name in Norm._fields)), Mask(i["lengths"], i["seed"], 0.2)
            sums = bn.backward_reduce(dx, i["y"], None, norm, zeroed)
            return {"dx": dx} | dict(zip(("dbeta", "dgamma"), sums, strict=True))
        if function == "fused":
            return {"z": _fused(check, i, weight)}
        y = aten.forward(i["x"], weight.squeeze(2), conv)
        return {"y": y} | (dict(zip(("mean", "m2"), bn.stats(y), strict=True)) if function == "forward_stats" else {})

    return call


def _fused(check: Check, i: dict[str, Tensor], weight: Tensor) -> Tensor:
    s = check.shape
    x, bias = i["x"].transpose(1, 2).unsqueeze(2), i["bias"].to(weight.dtype)
    z = F.conv2d(x, weight, bias, (1, s.stride), (0, s.geometry.padding), (1, s.dilation)).squeeze(2)
    z = z.float().log_softmax(1) if check.variant == "log-softmax" else z.relu_()
    return mask(z, i["out_lengths"]).transpose(1, 2)
