"""Fused blocks on two gloo processes: under DDP, and with SyncBN."""

import pytest
import torch
import torch.distributed as dist
from test_fuse import LENGTHS, build, evaluate, gradients_and_buffers
from test_sync import spawn
from torch import nn

from jasper_fast import fuse
from jasper_fast.dispatch import choose
from jasper_fast.kernels.layout import mask


def _share(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 61, generator=torch.Generator().manual_seed(5))[rank], LENGTHS


CASES = (("never", False), ("before", False), ("after", False), ("before", True), ("after", True), ("gram", True))


def _step(model: nn.Module, x: torch.Tensor, lengths: torch.Tensor) -> None:
    out, lengths = model(x, lengths)
    mask(out.transpose(1, 2), lengths).square().mean().backward()


def _in_parallel(rank: int) -> dict[tuple, dict[str, torch.Tensor]]:
    """Returns gradients, buffers and an evaluation's output after one step on this rank, by case: fused before DDP or
    SyncBN, after it, or never."""
    found = {}
    for when, synced in CASES:
        model = build("nvidia").train()
        if when == "before":
            fuse(model, strict=True)
        if synced:  # without DDP, which does not accept SyncBN on a CPU
            run = model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            run = nn.parallel.DistributedDataParallel(model)
        # The case "gram" takes the Gram form, as on a GPU. The setting stays, so "gram" must be the last case.
        choose.pane_form = (lambda *of: "gram") if when == "gram" else choose.pane_form
        if when in ("after", "gram"):
            assert fuse(run, strict=True).fused[0] == ("" if synced else "module.") + "encoder.layers.0"
        _step(run, *_share(rank))
        for p in model.parameters() if synced else ():
            dist.all_reduce(p.grad)
            p.grad /= 2
        found[when, synced] = gradients_and_buffers(model)
        # DDP evaluates with the buffers of rank 0.
        found[when, synced] |= {"evaluation": evaluate(run.eval(), _share(0)[0])}
    return found


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_in_parallel(tmp_path):
    """With DDP, gradients, buffers and outputs are the same with and without fusion. With SyncBN they equal those of
    one process that gets the batches of both ranks."""
    whole = build("nvidia").train()
    xs, lengths = zip(*map(_share, range(2)), strict=True)
    _step(whole, torch.cat(xs), torch.cat(lengths))
    one = gradients_and_buffers(whole)
    one["evaluation"] = evaluate(whole.eval(), _share(0)[0])
    for found in spawn(tmp_path, {"fused": (_in_parallel,)})["fused"]:
        for (when, synced), got in found.items():
            want = one if synced else found["never", False]
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=lambda m, w=when: f"{w}: {m}")
