"""The options --reload-best and --compile of train.py."""

import contextlib
import copy
import math
import os
import shutil
import subprocess
import sys
from itertools import count, repeat
from pathlib import Path

import corpora
import pytest
import torch
import torch.distributed as dist
import worlds
import yaml
from speech import CONFIG, one_thread, records, run_train as run, train_arguments, write_corpus  # noqa: F401

from jasper_fast import train
from jasper_fast.data.batches import collate
from jasper_fast.nn import checkpoint, loading
from jasper_fast.training.runs import RunError
from jasper_fast.training.state import TrainingState
from jasper_fast.training.validate import Validation


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Returns the paths of a corpus of beeps and of the configuration of a model of two blocks."""
    paths = write_corpus(tmp_path_factory.mktemp("beeps"))
    small = copy.deepcopy(CONFIG)
    blocks = small["jasper"]["encoder"]["blocks"][:2]
    blocks[1]["repeat"], small["jasper"]["decoder"]["in_feats"] = 1, blocks[1]["filters"]
    small["jasper"]["encoder"]["blocks"] = blocks
    paths["config"].write_text(yaml.safe_dump(small))
    return paths


# --- return to the best weights ----------------------------------------------------------------------------------


def judged(rates):
    """Returns a stand-in for `validate_state` that gives these word error rates one after the other."""
    left = iter(rates)
    return lambda *_, **__: {"live": Validation(1.0, next(left), 0.0)}


def spoiled(when):
    """Returns a stand-in for `collate` that fills with NaN the audio of the batches whose numbers are in `when`."""
    numbers = count()

    def collate_or_spoil(items):
        batch = collate(items)
        if next(numbers) in when:
            batch.audio.fill_(math.nan)
        return batch

    return collate_or_spoil


@pytest.fixture
def returns(monkeypatch):
    """Records (step, step of the best weights) of each return to the best weights. Asserts that each return restores
    weights, moments and moving average, in the same memory, and changes neither the step nor the learning rate."""
    found, back = [], TrainingState.go_back

    def checked(state, saved):
        learnt = [*state.model.state_dict().values()]
        learnt += [v for s in state.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        places, step = [t.data_ptr() for t in learnt], state.step
        moved = any(not torch.equal(t, saved["state_dict"][n]) for n, t in state.model.state_dict().items())
        lr = [group["lr"] for group in state.optimizer.param_groups]
        back(state, saved)
        assert moved or found[-1][1] == saved["step"]  # a second return to the same weights may change nothing
        assert state.step == step and lr == [group["lr"] for group in state.optimizer.param_groups]
        assert places == [t.data_ptr() for t in learnt]
        now = state.model.state_dict(), state.optimizer.state_dict()["state"], state.ema and state.ema.average
        then = saved["state_dict"], saved["optimizer"]["state"], saved["ema_state_dict"]
        torch.testing.assert_close(now[: 2 + bool(state.ema)], then[: 2 + bool(state.ema)], rtol=0, atol=0)
        found.append((step, saved["step"]))

    monkeypatch.setattr(TrainingState, "go_back", checked)
    return found


RATES = [0.9, 0.5, 0.6, 0.5, 0.7, 0.4, 0.6, 0.4]


@pytest.mark.parametrize(
    ("rates", "options", "wanted"),
    [
        (RATES, {"reload_best": 2, "ema": 0.9, "optimizer": "novograd"}, [(4, 2), (8, 6)]),
        (RATES, {"reload_best": 2, "ema": 0.9, "optimizer": "adamw"}, [(4, 2), (8, 6)]),
        # a run goes back to the same best weights three times at most
        ([0.5, *repeat(0.6, 7)], {"reload_best": 1}, [(2, 1), (3, 1), (4, 1)]),
    ],
)
def test_after_validations_without_a_better_one(paths, tmp_path, monkeypatch, returns, rates, options, wanted):
    monkeypatch.setattr(train, "validate_state", judged(rates))
    run(train_arguments(paths, tmp_path, steps=8, val_every=1, **options))
    assert [(r["step"], r["best"]) for r in records(tmp_path, "reload")] == returns == wanted
    assert checkpoint.load(tmp_path / "best.pt")["best_wer"] == min(rates)


def test_a_rate_that_is_not_a_number_is_not_the_best(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validate_state", judged([math.nan, 0.6, math.nan, 0.5]))
    run(train_arguments(paths, tmp_path, steps=4, val_every=1))
    best = checkpoint.load(tmp_path / "best.pt")
    assert (best["step"], best["best_wer"]) == (4, 0.5)


def test_a_resumed_run_counts_on(paths, tmp_path, monkeypatch, returns):
    monkeypatch.setattr(train, "validate_state", judged([0.5, 0.6]))
    run(train_arguments(paths, tmp_path, steps=2, val_every=1, reload_best=2))
    assert not returns
    monkeypatch.setattr(train, "validate_state", judged([0.7]))
    run(train_arguments(paths, tmp_path, steps=3, val_every=1, reload_best=2, resume=True))
    assert returns == [(0, 2), (3, 1)]  # resuming calls `go_back` too


def test_in_place_of_the_end_after_bad_steps(paths, tmp_path, monkeypatch, returns, capsys):
    """Shows that --reload-best goes back to the best weights after bad steps that otherwise end the run."""
    for reload_best, ends in ((None, pytest.raises(RunError, match="2 steps in a row were skipped")),
                              (True, contextlib.nullcontext())):  # fmt: skip
        monkeypatch.setattr(train, "validate_state", judged([0.5, *repeat(0.6, 7)]))
        monkeypatch.setattr("jasper_fast.data.batches.collate", spoiled({3, 4}))
        how = {"steps": 8, "val_every": 2, "max_bad_steps": 2, "reload_best": reload_best}
        with ends:
            run(train_arguments(paths, tmp_path / str(reload_best), **how))
    assert returns == [(5, 2)]
    said = capsys.readouterr().err
    assert "step 5: back to the weights of step 2, the best so far" in said and "done: step 8" in said
    after = checkpoint.load(tmp_path / "True" / "step_00000008.pt")
    assert all(torch.isfinite(t).all() for t in after["state_dict"].values())


@pytest.mark.parametrize(
    ("bad", "val_every", "best"),
    [
        (range(100), 10, []),  # no validation, so no best.pt
        (range(2, 100), 1, [1, 1, 1]),  # all later steps are bad, so the run gives up after three returns
    ],
)
def test_without_best_weights_or_a_good_step_after_them_the_run_ends(
    bad, val_every, best, paths, tmp_path, monkeypatch, returns
):
    monkeypatch.setattr(train, "validate_state", judged(repeat(0.5)))
    monkeypatch.setattr("jasper_fast.data.batches.collate", spoiled(bad))
    with pytest.raises(RunError, match="2 steps in a row were skipped"):
        run(train_arguments(paths, tmp_path, steps=20, max_bad_steps=2, val_every=val_every, reload_best=True))
    assert [step for _, step in returns] == best


def one_rank_goes_wrong(train, rank: int, folder: str) -> None:
    """Puts NaN into two batches of rank 1. After the return to the best weights, each rank saves its step and weights
    in `folder`."""
    from jasper_fast.data import batches

    train.validate_state = judged([0.5, *repeat(0.6, 20)])
    batches.collate = spoiled({3, 4} if rank == 1 else set())

    def noted(back, state, saved):
        back(state, saved)
        torch.save([state.step, state.model.state_dict()], Path(folder) / f"{rank}.pt")

    worlds.wrap(TrainingState, "go_back", noted)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_all_ranks_go_back_together(paths, tmp_path):
    arguments = train_arguments(
        paths, tmp_path / "run", steps=6, batch_size=2, val_every=2, max_bad_steps=2, reload_best=True
    )
    worlds.world(2, arguments, tmp_path / "w", one_rank_goes_wrong, str(tmp_path))
    (step, first), (same, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert step == same == 5 and best["step"] == 2
    assert all(torch.equal(first[n], second[n]) and torch.equal(first[n], t) for n, t in best["state_dict"].items())


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor writes C++: install g++")
def test_a_compiled_run_has_the_losses_and_the_names_of_a_plain_one(paths, tmp_path):
    how = {"steps": 5, "val_every": 5, "optimizer": "adamw", "lr": 1e-3, "ema": 0.9}
    run(train_arguments(paths, tmp_path / "plain", **how))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset keeps the counts of other tests in this process
    run(train_arguments(paths, tmp_path / "compiled", compile=True, **how))
    # one graph of `step.compiled`, which tries the compiler, and one graph of the model for all lengths
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    plain, ours = (
        [r.get(f, 0) for r in records(tmp_path / name, "train", "val_live", "val_ema") for f in ("loss", "grad_norm")]
        for name in ("plain", "compiled")
    )
    assert ours == pytest.approx(plain, rel=1e-4) and len(plain) == 2 * (5 + 2)
    plain, ours = (checkpoint.load(tmp_path / name / "step_00000005.pt") for name in ("plain", "compiled"))
    for key in ("state_dict", "ema_state_dict"):
        assert ours[key].keys() == plain[key].keys()
    loading.load_model(tmp_path / "compiled" / "best.pt", ema=True)
    run(train_arguments(paths, tmp_path / "compiled", **how | {"steps": 6}, resume=True))  # resumes without --compile


@pytest.mark.slow
def test_without_a_compiler_it_is_one_line(paths, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PATH")}
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    arguments = train_arguments(paths, tmp_path / "run", steps=1, compile=True)
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=corpora.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("error: --compile: PyTorch cannot compile (") and "install a C++ compiler (g++)" in line
