"""A small Jasper, compiled by torch.compile or exported by torch.export, compared with the same model in eager mode.

Most tests compile with Inductor. Some use aot_eager, which traces the model in the same way, but
does not fuse, reorder or free anything.
"""

import copy
import shutil

import pytest
import torch
from close import assert_close
from conftest import settle
from engines import valid
from test_model import batch, config, pair
from torch._dynamo.testing import CompileCounterWithBackend

from jasper_fast import Jasper

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor writes C++: install g++")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Removes the graphs of other tests. Makes Inductor use PyTorch's random numbers, so that compiled and uncompiled
    models drop the same elements."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # otherwise recompilations of other tests would count towards the limit
    with inductor.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def drawn(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features of `frames` frames, and lengths. They depend on `frames` alone."""
    torch.manual_seed(frames)
    return torch.randn(3, 8, frames), torch.tensor([frames, frames // 2, 13])


def step(model: Jasper, run, frames: int, low: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Runs one training step of `model` with dropout. `run` is the model or its compiled form; `low` is autocast's
    dtype (None: no autocast). Returns loss, log-probs, gradients and running statistics."""
    model.zero_grad()
    given = drawn(frames)
    torch.manual_seed(8)
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        log_probs, out = run(*given)
    loss = valid(log_probs, out).square().mean()
    loss.backward()
    found = {"loss": loss.detach(), "log_probs": log_probs.detach()}
    found |= {f"grad {k}": p.grad.clone() for k, p in model.named_parameters()}
    return found | {k: v.clone() for k, v in model.named_buffers() if v.is_floating_point()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "backend", "panes"),
    [
        ("inductor", "cpu", "plain"), ("inductor", "cpu", "gram"), ("aot_eager", "reference", "gram"),
        ("aot_eager", "cpu", "plain"), ("aot_eager", "triton", "plain"),
    ],
)  # fmt: skip
def test_a_compiled_step_equals_an_uncompiled_one_at_every_length(compiler, backend, panes):
    """In fp32, losses, log-probs, gradients and statistics are equal, and so are the log-probs of a later evaluation.
    The second length compiles again; the third and the fourth do not."""
    _, plain = pair(config(dropout=0.2), settle(backend), panes=panes)
    ours, counter = copy.deepcopy(plain), CompileCounterWithBackend(compiler)
    run, graphs = torch.compile(ours, backend=counter, fullgraph=True), []
    for frames in (61, 75, 90, 43) if backend != "triton" else (61, 75):  # interpreted Triton is slow
        want, got = step(plain.train(), plain, frames, None), step(ours.train(), run, frames, None)
        graphs.append(counter.frame_count)
        for name, value in want.items():
            atol = 1e-5 * value.abs().max().item()
            torch.testing.assert_close(got[name], value, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert graphs == [1, 2, 2, 2][: len(graphs)]
    given = drawn(61)
    with torch.no_grad():
        torch.testing.assert_close(*(form(*given)[0] for form in (run.eval(), plain.eval())), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_compiled_step_under_autocast_is_as_good_as_an_uncompiled_one(backend):
    """In bf16 the results differ, because Inductor fuses ops and rounds less often. The compiled step's error against
    fp32 is as small as that of the uncompiled step."""
    _, exact = pair(config(dropout=0.2), backend)
    plain, ours = copy.deepcopy(exact), copy.deepcopy(exact)
    ref = step(exact.train(), exact, 61, None)
    low = step(plain.train(), plain, 61, torch.bfloat16)
    got = step(ours.train(), torch.compile(ours, backend="inductor", fullgraph=True), 61, torch.bfloat16)
    for kind in ("loss", "grad", "running"):
        names = [k for k in low if kind in k]
        assert names
        of = lambda found, names=names: torch.cat([found[k].flatten() for k in names])  # noqa: E731
        assert_close(kind, of(got).bfloat16(), of(low).bfloat16(), of(ref))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_compiled_inference_equals_uncompiled(backend):
    _, ours = pair(config(), backend)
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(ours.eval(), backend=counter, fullgraph=True)
    for frames in (61, 75, 90):
        given = drawn(frames)
        (want, want_out), (got, out) = ours(*given), run(*given)
        assert torch.equal(out, want_out)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_an_exported_model_serves_other_batches_and_lengths(backend, tmp_path):
    """The exported program is saved and loaded first, because a loaded program finds its ops by name."""
    _, ours = pair(config(), backend)
    n, t = torch.export.Dim("n", min=2, max=64), torch.export.Dim("t", min=32, max=4096)
    shapes = {"features": {0: n, 2: t}, "lengths": {0: n}}
    torch.export.save(torch.export.export(ours.eval(), batch(), dynamic_shapes=shapes), tmp_path / "jasper.pt2")
    served = torch.export.load(tmp_path / "jasper.pt2").module()
    for features, lengths in (batch(), (torch.randn(2, 8, 90), torch.tensor([90, 7]))):
        (want, want_out), (got, out) = ours(features, lengths), served(features, lengths)
        assert torch.equal(out, want_out)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
