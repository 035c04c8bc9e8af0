"""The contenders that each face proposes for a cell. A face takes part by a function in FACES:

    def face(cell, device):
        return [Proposal("face", "direct", tile) for tile in ...]

The function returns an empty list if its face cannot run the cell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from jasper_fast.dispatch import backends
from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.conv1d import cuda_launch
from jasper_fast.kernels.tables import Cell, Row
from jasper_fast.selfcheck.checks import DTYPES

LIBRARY = {"conv1d": "aten", "bn_relu_dropout": "reference"}  # for each op the face that is plain PyTorch
MOST = 5  # tiles that the Triton face proposes for a cell, at most
ON_CPU = 2  # the same in Triton's interpreter, where trying a tile takes a second


@dataclass(frozen=True)
class Proposal:
    """One way to run a cell: a face, an algorithm, and the tile if the face does not choose it by itself."""

    face: str
    algorithm: str = "direct"
    tile: Mapping[str, int] | None = None

    def row(self, cell: Cell, seconds: float, facts: Mapping[str, int]) -> Row:
        """Returns the table row for this proposal and its time. `facts`: the kernel's registers, shared bytes and
        spilled bytes, if they are known."""
        tile = None if self.tile is None else dict(self.tile)
        return Row(*cell, self.face, self.algorithm, tile, seconds, **facts)

    def name(self, cell: Cell) -> str:
        """Returns a name that is unique among the proposals for a cell."""
        return self.row(cell, 1.0, {}).label()


def triton(cell: Cell, device: torch.device) -> list[Proposal]:
    """Proposes the Triton face with its default tile and with the tiles that arithmetic ranks best, if they fit."""
    if backends.why_missing("triton", device) is not None:
        return []
    from jasper_fast.kernels.conv1d import triton_tiles

    op, dtype, (n, frames) = cell.op.removeprefix("conv1d."), DTYPES[cell.dtype], cell.batch
    shape = triton_tiles.Shape(*cell[2:7], n * frames)
    arch = launch.architecture(device) or 90  # the interpreter has none
    limit = tables.SHARED_LIMIT.get(f"sm_{arch}", max(tables.SHARED_LIMIT.values()))
    tiles = (tile._asdict() for tile in triton_tiles.shortlist(op, dtype, shape, frames))
    fit = [tile for tile in tiles if tables.tile_fault(cell.op, cell.dtype, tile, limit) is None]
    return [Proposal("triton", tile=tile) for tile in fit[: ON_CPU if device.type == "cpu" else MOST]]


def cuda(cell: Cell, device: torch.device) -> list[Proposal]:
    """Proposes the CUDA face, which plans its own tiles."""
    if backends.why_missing("cuda", device) is not None:
        return []
    return [Proposal("cuda")] if cuda_launch.takes(device, DTYPES[cell.dtype], cell[2:7]) else []


def aten(cell: Cell, device: torch.device) -> list[Proposal]:
    """Proposes PyTorch's conv (cuDNN's on a GPU), in channels-last memory."""
    return [Proposal("aten", "library")]


def norm(cell: Cell, device: torch.device) -> list[Proposal]:
    """Proposes the CUDA face, the Triton face and plain PyTorch. Each chooses its own tile."""
    ours = [Proposal(face) for face in ("cuda", "triton") if backends.why_missing(face, device) is None]
    return [*ours, Proposal("reference", "library")]


# for each op the functions that propose contenders
FACES: dict[str, list[Callable[[Cell, torch.device], list[Proposal]]]] = {
    "conv1d": [triton, cuda, aten], "bn_relu_dropout": [norm],
}  # fmt: skip


def proposals(cell: Cell, device: torch.device) -> list[Proposal]:
    """Returns the proposals of all faces for `cell`."""
    return [proposal for face in FACES[cell.op.split(".")[0]] for proposal in face(cell, device)]
