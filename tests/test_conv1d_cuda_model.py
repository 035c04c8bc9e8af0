"""A whole Jasper on the emulated CUDA convs in fp16 gives the numbers of NVIDIA's Jasper, forward and backward."""

import pytest
import torch
from close import assert_close
from engines import valid
from standins import spied
from test_conv1d_cuda import emulate, emulation, untouched
from test_golden import _build, _loss, golden  # noqa: F401 (a fixture)

from jasper_fast import InferenceEngine, ops
from jasper_fast.dispatch import choose
from jasper_fast.kernels.conv1d import cuda_launch

HALF = torch.float16


@pytest.fixture(params=[80, 90])
def convs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Runs every conv that the CUDA face supports on that face. Returns a list to which each launch is added.

    An entry has the name of the launched function, and whether the launch may begin before the previous one ends.
    """
    emulate(monkeypatch, cuda_launch.bind(emulation()), request.param, 4)

    def chosen(backend, device, dtype, strided_dx, calls, shape, rows_log2, off) -> str:
        return "cuda" if dtype == HALF and not strided_dx else "aten"

    monkeypatch.setattr(choose, "_conv_face", chosen)
    monkeypatch.setattr(choose, "fused_faces", lambda backend, device, dtype: ("cuda",))
    return spied(monkeypatch, cuda_launch, "run", lambda name, *args, **how: (name, how.get("early", False)))


def test_the_cuda_face_gets_no_pack_of_another_face(convs) -> None:
    x, weight = torch.randn(1, 64, 20).half(), torch.randn(64, 64, 3).half()
    packed = torch.zeros(3 * 64 * 64, dtype=HALF)
    assert torch.equal(*(ops.conv1d(x, weight, padding=1, packed=pack) for pack in (packed, None))) and convs


@pytest.mark.slow
def test_launches_of_the_engine_overlap_safely(convs, golden) -> None:  # noqa: F811
    """Shows that the engine's launches may overlap. Before a launch waits, it finds NaN in whatever an earlier launch
    writes. No launch waits for weights, which are packed before the call."""
    config, tensors = golden
    engine = InferenceEngine(_build("reference", config, tensors).eval(), dtype=HALF)
    given = tensors["features"], tensors["feature_lengths"]
    want = engine(*given)
    runner = engine._run
    convs.clear()
    with untouched(emulation(), *runner.buffers.held.values(), *runner.lengths.held.values(), *runner._scratch()):
        got = engine(*given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # An early launch may begin before the previous one ends. Three are not early: the first of the call, the first of
    # its graph, and the last of the call.
    early = [False, False, *[True] * (len(convs) - 3), False]
    assert len(convs) > 4 and convs == [("jf_conv1d", value) for value in early]


@pytest.mark.slow
def test_the_engine_gives_the_reference_systems_numbers(convs, golden) -> None:  # noqa: F811
    config, tensors = golden
    engine = InferenceEngine(_build("reference", config, tensors).eval(), dtype=HALF)
    log_probs, lengths = engine(tensors["features"], tensors["feature_lengths"])
    assert torch.equal(lengths, tensors["eval.lengths"])
    convs_of_model = sum(block.repeat for block in config.encoder.blocks) + 1
    assert [name for name, _ in convs].count("jf_conv1d") == convs_of_model, "a sub-block took more than one launch"
    with torch.no_grad():
        wide = _build("eager", config, tensors).eval().double()
        ref = wide(tensors["features"].double(), tensors["feature_lengths"])[0]
        low = _build("eager", config, tensors).eval().half()(tensors["features"].half(), tensors["feature_lengths"])[0]
    assert valid(ref - tensors["eval.log_probs"], lengths).abs().max() <= 1e-4
    assert_close("log_probs", *(valid(x, lengths) for x in (log_probs, low.float(), ref)))


@pytest.mark.slow
def test_a_training_step_gives_the_reference_systems_gradients(convs, golden) -> None:  # noqa: F811
    config, tensors = golden

    def step(which: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        model = _build(which, config, tensors).train().to(wide)
        given = tensors | {"features": tensors["features"].to(wide)}
        with torch.autocast("cpu", dtype=HALF, enabled=dtype == HALF):
            log_probs, lengths, loss = _loss(model, given)
        loss.backward()
        found = {"log_probs": valid(log_probs, lengths).detach(), "loss": loss.detach()}
        return found | {name: parameter.grad for name, parameter in model.named_parameters()}

    ours = step("auto", HALF)
    assert {"jf_conv1d", "jf_conv1d_wgrad", "jf_conv1d_pack"} <= {name for name, _ in convs}
    low, ref = step("eager", HALF), step("eager", torch.float64)
    for name, of in ref.items():
        norm = of.norm()
        error, eager = (ours[name].double() - of).norm() / norm, (low[name].double() - of).norm() / norm
        assert error <= 2 * eager + 1e-3, f"{name}: {error:.2e} of its norm, eager {eager:.2e}"
