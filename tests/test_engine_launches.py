"""An engine call of a Jasper on the triton face launches one kernel per sub-block and one for the decoder.

Apart from views and allocations, Jasper 10x5 calls no ATen op; `test_what_aten_still_does_is_what_the_docstring_says`
lists the models that do.
"""

import pytest
import torch
from conftest import ROOT, make_face
from engines import Replays, batch, config, pair
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import InferenceEngine, Jasper, JasperConfig
from jasper_fast.inference import engine as engine_module
from jasper_fast.kernels import launch

VIEWS = {"alias", "as_strided", "detach", "expand", "select", "slice", "squeeze", "transpose", "unsqueeze", "view"}
ALLOCATION = {"empty", "empty_strided", "new_empty"}


class Ops(TorchDispatchMode):
    """Records the names of ATen ops that do more than allocate memory or make views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS | ALLOCATION:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device():
    return make_face("triton").device


@pytest.fixture(autouse=True)
def launched(device, monkeypatch):
    """Records launches as (kernel, arguments by name) instead of running them."""
    seen: list[tuple[str, dict]] = []
    unread(monkeypatch, dense=device.type == "cuda")
    with launch.recorded(lambda one: seen.append((one.name, one.arguments))):
        yield seen


def unread(monkeypatch, dense: bool) -> None:
    """Replaces `pack` by a function that copies no weights, because recorded launches do not read them. With `dense`
    the packs are contiguous, as tensor descriptors need them."""
    from jasper_fast.kernels.conv1d import triton_impl

    def pack(weight, dtype=None):
        one = torch.empty((), dtype=dtype or weight.dtype, device=weight.device)
        data = one.expand(triton_impl.packed_shape(weight))
        return triton_impl.Packed(data.contiguous() if dense else data, *weight.shape)

    monkeypatch.setattr(triton_impl, "pack", pack)


def hollow(cfg: JasperConfig, device: torch.device) -> Jasper:
    """Returns a Jasper in which each parameter is a single number in memory, expanded to its shape."""
    with torch.device("meta"):
        model = Jasper(cfg, backend="triton")
    ones = {k: torch.ones((), dtype=v.dtype, device=device).expand(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(ones, assign=True)
    return model.eval()


def jasper10x5(masks: bool) -> JasperConfig:
    found = JasperConfig.from_yaml(ROOT / "configs" / "jasper10x5dr.yaml").to_dict()
    found["jasper"]["encoder"]["use_conv_masks"] = masks
    return JasperConfig.from_dict(found)


def call(engine, launched, features, lengths):
    """Returns (log_probs, lengths, launches, ATen ops) of the third call with a shape."""
    engine(features, lengths)
    engine(features, lengths)
    launched.clear()
    with Ops() as ops:
        log_probs, out = engine(features, lengths)
    return log_probs, out, list(launched), ops.names


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("masks", [True, False])
def test_jasper_10x5_is_54_launches_and_no_aten_op(masks, graphs, device, launched, monkeypatch):
    monkeypatch.setattr(engine_module, "CudaGraphs", Replays)
    engine = InferenceEngine(hollow(jasper10x5(masks), device), dtype=torch.float16, graphs=graphs)
    features, lengths = torch.randn(2, 64, 200, device=device), torch.tensor([200, 131], device=device)
    log_probs, out, launches, ops = call(engine, launched, features, lengths)
    assert ops == []
    assert len(launches) == 54
    assert {name for name, _ in launches} == {"conv1d_fused_kernel"}
    assert (log_probs.shape, log_probs.dtype) == ((2, 100, 29), torch.float32)
    assert (out.shape, out.dtype) == ((2,), torch.int64)

    first, last = launches[0][1], launches[-1][1]
    assert first["x_ptr"].dtype == torch.float32 and first["x_ptr"].data_ptr() == features.data_ptr()
    assert first["in_lengths_ptr"] is lengths and first["HAS_LENGTHS_OUT"] and first["IS_NCT"]
    assert last["z_ptr"].data_ptr() == log_probs.data_ptr() and last["HAS_LOG_SOFTMAX"]
    assert last["lengths_out_ptr"].data_ptr() == out.data_ptr()
    # the middle launches use only the engine's own memory, so a graph may replay them
    for _, between in launches[1:-1]:
        assert not between["HAS_LENGTHS_OUT"] and not between["HAS_LOG_SOFTMAX"]
        assert between["HAS_IN_LENGTHS"] == between["HAS_OUT_LENGTHS"] == masks
        for name in ("x_ptr", "x2_ptr", "z_ptr", "in_lengths_ptr", "out_lengths_ptr"):
            if between[name] is not None:
                own = [*engine._run.buffers.held.values(), *engine._run.lengths.held.values()]
                assert between[name].untyped_storage().data_ptr() in [o.untyped_storage().data_ptr() for o in own]
    assert {a["z_ptr"].dtype for _, a in launches[:-1]} == {torch.float16}
    assert sum(a["HAS_PANES"] for _, a in launches) == 10  # the residual blocks
    assert all(a["HAS_RELU"] for _, a in launches[:-1]) and not last["HAS_RELU"]
    assert {a["z_ptr"].shape[1] for _, a in launches[:-1]} == {128 if masks else 100}  # 128 frames are two buckets


def test_between_the_first_and_the_last_launch_is_one_graph(device, launched, monkeypatch):
    made = []

    class Counted(Replays):
        def capture(self, launch):
            before = len(launched)
            launch()
            made.append(len(launched) - before)
            return lambda: None

    monkeypatch.setattr(engine_module, "CudaGraphs", Counted)
    engine = InferenceEngine(hollow(jasper10x5(True), device), dtype=torch.float16, graphs=True)
    features, lengths = torch.randn(1, 64, 100, device=device), torch.tensor([100], device=device)
    _, _, launches, ops = call(engine, launched, features, lengths)
    assert made == [52] and len(launches) == 2 and ops == []


def test_what_aten_still_does_is_what_the_docstring_says(device, launched):
    features, lengths = torch.randn(2, 8, 20, device=device), torch.tensor([20, 7], device=device)
    for cfg, n, wanted in [
        (config("jasper"), 8, []),
        (config("lengths change twice"), 5, []),
        (config("jasper", classes=129), 8, ["_log_softmax"]),
        (config("dense first"), 4, ["clamp", "copy_"]),
    ]:
        _, _, launches, ops = call(InferenceEngine(hollow(cfg, device), graphs=False), launched, features, lengths)
        assert (len(launches), ops) == (n, wanted)


def test_the_first_launch_reads_the_usual_features_as_they_are(device, launched):
    engine = InferenceEngine(hollow(config(), device), dtype=torch.float16, graphs=False)
    usual, lengths = torch.randn(2, 8, 20, device=device), torch.tensor([20, 7], device=device)
    for features, wanted in [
        (usual, []),
        (usual[:, :, 2:18], []),
        (usual.half(), ["_to_copy"]),  # cast to fp32, because the kernel supports this layout in fp32 only
        (usual.half().transpose(1, 2).contiguous().transpose(1, 2), []),
        (usual.transpose(1, 2).contiguous().transpose(1, 2), ["_to_copy"]),  # fp32 with the channels innermost
        (usual.double(), ["_to_copy"]),
        (usual[:, :, ::2], ["clone"]),
    ]:
        assert call(engine, launched, features, lengths.clamp(max=features.shape[2]))[3] == wanted


def test_the_steps_through_the_library_are_at_most_four_kernels_each():
    """A step on the aten face is a conv without bias, the matrix product of the panes, the bias and a clamp."""
    _, ours = pair(config(), "reference")
    engine = InferenceEngine(ours, graphs=False)
    assert type(engine._run).__name__ == "Stepwise"
    features, lengths = batch([40, 31])
    engine(features, lengths)
    with Ops() as ops:
        engine(features, lengths)
    sub_blocks = len(engine._run.plan.steps)
    panes = sum(step.panes is not None for step in engine._run.plan.steps)
    of_steps = {name: ops.names.count(name) for name in ("convolution", "addmm_", "add_", "clamp")}
    assert of_steps == {"convolution": sub_blocks + 1, "addmm_": panes, "add_": sub_blocks, "clamp": sub_blocks}
    assert len(ops.names) == 40, ops.names
