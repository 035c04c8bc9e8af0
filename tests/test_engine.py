"""The inference engine on each face: every kind of block, layouts and dtypes of features, folding, errors, threads."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from close import assert_close
from conftest import assert_raises, make_face
from engines import BLOCKS, FEATS, Replays, batch, config, pair, poison, valid

from jasper_fast import InferenceEngine
from jasper_fast.inference import engine as engine_module


@pytest.fixture(params=["reference", "cpu", "triton"])
def face(request):
    return make_face(request.param)


def case(face, frames=(31, 17), cfg=None, **options):
    """Returns (eager, engine, features, lengths): two models with the same parameters, and a batch."""
    eager, ours = pair(cfg or config(), face.name, face.device)
    return eager, InferenceEngine(ours, **options), *batch(frames, device=face.device)


@pytest.mark.slow
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_kind_of_block_equals_eager_in_fp64(kind, masks, face):
    eager, engine, features, lengths = case(face, [31, 17, 1, 0] if masks else [31, 31], config(kind, masks))
    low, want_lengths = eager(features, lengths)
    ref, _ = eager.double()(features.double(), lengths)
    poison(engine)
    got, got_lengths = engine(features, lengths)
    assert got.shape == ref.shape and got.dtype == torch.float32
    assert got_lengths.dtype == torch.int64 and torch.equal(got_lengths, want_lengths)
    assert_close("log_probs", valid(got, lengths=want_lengths), valid(low, want_lengths), valid(ref, want_lengths))
    assert got.isfinite().all()  # rows in the padding mean nothing, but are finite


SHORT = [("jasper", 7, [t, 1]) for t in (1, 2, 3)]
VOCABULARIES = [("one conv", classes, [19, 4]) for classes in (2, 29, 128, 129, 300)]


@pytest.mark.parametrize(("kind", "classes", "frames"), SHORT + VOCABULARIES)
def test_audio_shorter_than_the_taps_and_vocabularies_of_every_size(kind, classes, frames, face):
    eager, engine, features, lengths = case(face, frames, config(kind, classes=classes))
    want, want_lengths = eager(features, lengths)
    got, got_lengths = engine(features, lengths)
    assert torch.equal(got_lengths, want_lengths)
    torch.testing.assert_close(valid(got, got_lengths), valid(want, want_lengths), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "t"), [(0, 20), (2, 0)])
def test_nothing_in_gives_nothing_out(n, t, face):
    _, engine, *_ = case(face)
    lengths = torch.full((n,), t, device=face.device)
    log_probs, out = engine(torch.zeros(n, FEATS, t, device=face.device), lengths)
    assert log_probs.shape == (n, t // 2, 7) and torch.equal(out, lengths // 2)


def test_without_lengths_all_frames_count(face):
    _, engine, features, lengths = case(face, [23, 23])
    got, want = engine(features), engine(features, lengths)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jasper", "dense first"])
def test_layout_and_dtype_of_the_arguments_do_not_matter(kind, face):
    _, engine, features, lengths = case(face, [29, 12], config(kind))
    features = features.half().float()  # values that every dtype below can represent
    want, out = engine(features, lengths)
    forms = {
        "NTC": features.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": torch.empty(2, 2 * FEATS, 58, device=face.device)[:, ::2, ::2].copy_(features),
        "a slice": torch.cat([features, features], 2)[:, :, :29],
        "fp16": features.half(),
        "fp16 NTC": features.half().transpose(1, 2).contiguous().transpose(1, 2),
        "fp64": features.double(),
    }
    for name, form in forms.items():
        assert torch.equal(engine(form, lengths)[0], want), name
    for dtype in (torch.int32, torch.uint8):
        got, frames = engine(features, torch.stack([lengths, lengths], 1).to(dtype)[:, 0])
        assert torch.equal(got, want) and torch.equal(frames, out), dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_pytorchs(dtype, face):
    eager, engine, features, lengths = case(face, dtype=dtype)
    ref, out = eager.double()(features.double(), lengths)
    low, _ = eager.to(dtype)(features.nan_to_num().to(dtype), lengths)
    got, _ = engine(features, lengths)
    # Triton's interpreter truncates to bf16; a GPU rounds
    factor = 4.0 if face.name == "triton" and face.device.type == "cpu" and dtype == torch.bfloat16 else 2.0
    assert_close("log_probs", valid(got, out), valid(low.float(), out), valid(ref, out), factor)


def test_folding_is_precise_whatever_the_dtype(face):
    """Variance and gamma exceed the range of fp16, but gamma / sqrt(variance) does not."""
    eager, ours = pair(config(), face.name, face.device)
    for model in (eager, ours):
        for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)):
            bn.running_var.mul_(1e10)
            bn.weight.data.mul_(1e5)
    features, lengths = batch([31, 17], device=face.device)
    want, out = eager(features, lengths)
    got, _ = InferenceEngine(ours, dtype=torch.float16)(features, lengths)
    torch.testing.assert_close(valid(got, out), valid(want, out), atol=0.02, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("held", [torch.float16, torch.float64])
def test_a_model_of_another_dtype_runs_in_the_wanted_one(held, face):
    """An engine in fp32 gives the same results for a model in fp16, fp64 or fp32."""
    _, ours = pair(config(), face.name, face.device)
    ours.half()
    features, lengths = batch([31, 17], device=face.device)
    want, out = InferenceEngine(ours.float())(features, lengths)
    got, _ = InferenceEngine(ours.to(held), dtype=torch.float32)(features, lengths)
    torch.testing.assert_close(valid(got, out), valid(want, out), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_nan_in_a_valid_frame_reaches_its_own_utterance_only(face):
    _, engine, features, lengths = case(face, [31, 31])
    clean, _ = engine(features, lengths)
    features[1, 3, 15] = float("nan")
    got, _ = engine(features, lengths)
    assert torch.equal(got[0], clean[0]) and got[1].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jasper", "plain residual"])
def test_results_are_memory_of_their_own(kind, face):
    """A later call changes no earlier result, and a write to the returned lengths changes no argument."""
    _, engine, *first = case(face, cfg=config(kind))
    log_probs, out = engine(*first)
    kept, kept_out, given = log_probs.clone(), out.clone(), first[1].clone()
    out_again = engine(*batch([25, 30], device=face.device))[1]
    poison(engine)
    assert torch.equal(log_probs, kept) and torch.equal(out, kept_out)
    out.fill_(-1)
    out_again.fill_(-1)
    assert torch.equal(first[1], given)
    again = engine(*first)
    assert torch.equal(again[0], kept) and torch.equal(again[1], kept_out)


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
def test_weights_are_copies_until_refresh(face, graphs, monkeypatch):
    """`refresh` folds the weights again and drops every graph."""
    if graphs and face.device.type == "cpu":
        if face.name == "cpu":
            pytest.skip("the cpu face has no graphs")
        monkeypatch.setattr(engine_module, "CudaGraphs", Replays)
    eager, ours = pair(config(), face.name, face.device)
    engine = InferenceEngine(ours, graphs=graphs)
    features, lengths = batch([31, 17], device=face.device)
    before, out = engine(features, lengths)
    with torch.no_grad():
        for model in (eager, ours):
            torch._foreach_mul_(list(model.parameters()), 1.25)
    assert torch.equal(engine(features, lengths)[0], before)
    engine.refresh()
    after, _ = engine(features, lengths)
    want, _ = eager(features, lengths)
    torch.testing.assert_close(valid(after, out), valid(want, out), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(valid(after, out), valid(before, out))


@pytest.mark.slow
def test_inference_mode_may_come_and_go(face):
    _, engine, features, lengths = case(face)
    with torch.inference_mode():
        want, _ = engine(features, lengths)
    assert torch.equal(engine(features, lengths)[0], want)
    with torch.inference_mode():
        assert torch.equal(engine(features, lengths)[0], want)


@pytest.mark.slow
def test_threads_share_an_engine(face):
    _, engine, *_ = case(face, bucket=8)
    batches = [batch(lengths, device=face.device) for lengths in ([31, 17], [9], [40, 2, 5])]
    wanted = [engine(*b)[0] for b in batches]

    def right(i: int) -> bool:
        return all(torch.equal(engine(*batches[i])[0], wanted[i]) for _ in range(3))

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(right, range(3)))


def test_bad_input_is_named(face):
    _, engine, features, lengths = case(face)
    wrong = [
        (features[:, 1:], lengths, rf"features must be \(N, {FEATS}, T\)"),
        (features.nan_to_num().long(), lengths, "features must be floating point"),
        (features, lengths[:1], "lengths must be"),
        (features, lengths.float(), "lengths must be"),
        (features.to("meta"), lengths, r"features are on meta, the engine's weights on .*; move one"),
        (features, lengths.to("meta"), r"lengths are on meta, .*; move the lengths"),
    ]
    if face.device.type == "cpu":
        wrong += [(features, torch.tensor([31, n]), r"lengths must lie in \[0, T = 31\]") for n in (32, -1)]
    assert_raises((partial(engine, *given), message) for *given, message in wrong)


def test_bad_options_are_named():
    _, ours = pair(config(), "reference")
    make = partial(InferenceEngine, ours)
    assert_raises(
        [
            (partial(make, dtype=torch.int8), "dtype must be a floating-point dtype"),
            (
                lambda: InferenceEngine(pair(config(), "reference", "meta")[1]),
                "on the meta device, so they have no values",
            ),
            (partial(make, graphs="yes"), "graphs must be 'auto', True or False"),
            (partial(make, graphs=True), "graphs=True needs a CUDA GPU"),
            (partial(make, bucket=0), "at least 1"),
            (partial(make, graph_limit=0), "at least 1"),
        ]
    )


@pytest.mark.parametrize("kind", ["jasper", "dense first"])
def test_tensor_descriptors_change_no_bit(kind, monkeypatch):
    """Tensor descriptors (sm_90 and later) give the same bits. Tiles then need no mask, because kernels write zeros
    into the padding."""
    triton_impl = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")
    device = make_face("triton").device
    _, ours = pair(config(kind, feats=16), "triton", device)
    engine = InferenceEngine(ours, dtype=torch.float16, graphs=False)
    features, lengths = batch([150, 61, 0], feats=16, device=device)
    if kind == "dense first":  # its panes read the features, whose padding must then be finite
        features = features.nan_to_num(0.0)
    results = []
    for on in (False, True):
        monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", on)
        poison(engine)
        results.append(engine(features, lengths))
    (a, m), (b, n) = results
    assert torch.equal(valid(a, m), valid(b, n))  # false if there is a NaN
