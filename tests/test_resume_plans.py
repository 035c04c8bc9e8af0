"""A run resumed with other batches or settings continues its epoch; with other data it begins the epoch anew. If a run
cannot be resumed, it ends with one line about the reason."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from speech import CONFIG, corpus_of_beeps, records, training_in_this_process  # noqa: F401

from jasper_fast.data.batches import BatchSampler
from jasper_fast.nn import checkpoint
from jasper_fast.training.runs import RunError
from jasper_fast.training.split import Split
from jasper_fast.training.state import TrainingState

ITEMS = 37


class Utterances:
    """Takes the place of a Split's dataset, without audio."""

    def __init__(self, items: int = ITEMS, seed: int = 5) -> None:
        self.seconds = np.random.default_rng(seed).uniform(1, 9, items).tolist()
        self.utterances = [SimpleNamespace(name=f"{i}.wav", duration=s) for i, s in enumerate(self.seconds)]
        self.settings, self.seed = None, seed

    def __len__(self) -> int:
        return len(self.utterances)

    def durations(self, epoch: int) -> list[float]:
        return np.roll(self.seconds, epoch).tolist()


class Plan:
    """The batches of all ranks, with `accumulation` batches per rank in each step."""

    def __init__(self, data: Utterances, batch_size, max_seconds, bucketing, world, accumulation) -> None:
        sizes = (data.durations, batch_size, max_seconds, bucketing)
        self.splits = [
            Split("t", data, BatchSampler(*sizes, shuffle=True, seed=data.seed, rank=r, world_size=world), None)
            for r in range(world)
        ]
        self.accumulation, self.world = accumulation, world
        self.arguments = {
            "batch_size": batch_size, "batch_seconds": max_seconds, "no_bucketing": not bucketing,
            "grad_accumulation": accumulation, "seed": data.seed,
        }  # fmt: skip

    def steps(self, epoch: int) -> int:
        return self.splits[0].steps(epoch, self.accumulation)

    def taken(self, epoch: int, first: int, end: int) -> list[int]:
        """Returns the items that all ranks use in the steps from `first` up to, but not including, `end`."""
        window = slice(first * self.accumulation, end * self.accumulation)
        return [i for split in self.splits for batch in split.sampler.batches(epoch)[window] for i in batch]

    def saved(self) -> dict:
        return {"arguments": self.arguments, "rng": [None] * self.world, "data": self.splits[0].print_of_data()}

    def go_on(self, state, saved: dict) -> list[str]:
        """Continues from a checkpoint on every rank. Returns the messages, and leaves the new position in `state`."""
        before, said = (state.epoch, state.position, state.taken), []
        for split in self.splits:
            state.epoch, state.position, state.taken = before
            said.append(split.go_on(state, saved, self.accumulation))
        return said


def standing(epoch: int, position: int) -> TrainingState:
    return TrainingState(None, None, None, None, epoch=epoch, position=position)


def drawn(rng: np.random.Generator, data: Utterances) -> Plan:
    size, seconds = [(int(rng.integers(1, 9)), None), (None, float(rng.uniform(9, 40))), (4, 25.0)][rng.integers(3)]
    return Plan(data, size, seconds, bool(rng.integers(2)), int(rng.integers(1, 4)), int(rng.integers(1, 4)))


@pytest.mark.parametrize("seed", range(30))
def test_each_utterance_of_an_epoch_is_heard_under_changing_batches(seed):
    """Shows that a run that is stopped twice, and resumed with other batches each time, uses every utterance once."""
    rng, data, epoch = np.random.default_rng(seed), Utterances(), seed % 3
    state, heard, plan = standing(epoch, 0), [], drawn(rng, data)
    for _ in range(2):
        state.position = int(rng.integers(0, plan.steps(epoch) + 1))
        heard.append(set(plan.taken(epoch, 0, state.position)))
        before, plan = plan, drawn(rng, data)
        said = plan.go_on(state, before.saved())
        if state.epoch > epoch:  # every utterance was already used
            break
        assert len(set(said)) == 1 and (state.position == 0 or not said[0])
    else:
        heard.append(set(plan.taken(epoch, state.position, plan.steps(epoch))))
    assert set().union(*heard) == set(range(ITEMS))
    assert sum(map(len, heard)) == ITEMS


def test_an_unchanged_plan_stays_where_it_was():
    plan, again = (Plan(Utterances(), 4, None, True, 2, 2) for _ in range(2))
    state = standing(1, 3)
    assert again.go_on(state, plan.saved()) == ["", ""]
    assert (state.epoch, state.position, state.taken) == (1, 3, [])
    assert again.taken(1, 3, 9) == plan.taken(1, 3, 9)


def test_other_data_begin_the_epoch_anew():
    plan, smaller = Plan(Utterances(), 4, None, True, 1, 1), Plan(Utterances(20), 4, None, True, 1, 1)
    state = standing(2, 8)
    (said,) = smaller.go_on(state, plan.saved())
    assert said == "the training data, their perturbation or --seed have changed: epoch 3 begins anew"
    assert (state.epoch, state.position) == (2, 0) and set(smaller.taken(2, 0, 99)) == set(range(20))


# ---- whole runs ----


@pytest.fixture
def run(train_here):
    """Returns a function that runs train.py without validation and returns its standard error."""
    return functools.partial(train_here, val_manifests=None)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"batch_size": 8}, {"grad_accumulation": 3}, {"batch_seconds": 9}], ids=str)
def test_a_run_goes_on_with_fewer_steps_an_epoch(change, paths, run, tmp_path):
    """Shows that a run stopped at step 7 of 8 of an epoch continues with fewer steps per epoch."""
    run(paths, tmp_path, batch_size=2, steps=7)
    sizes = {"batch_size": 2 if "grad_accumulation" in change else None} | change
    said = run(paths, tmp_path, **sizes, steps=10, resume=True)
    assert "note: the batches have changed: 2 of 16 utterances are left in this epoch" in said
    assert "done: step 10" in said
    steps = records(tmp_path, "train")
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert next(r["epoch"] for r in steps if r["step"] == 8) == 1.0  # one step finishes the epoch


@pytest.mark.slow
def test_epochs_are_counted_whatever_their_steps(paths, run, tmp_path):
    run(paths, tmp_path, batch_size=2, steps=7)  # stops before the eighth and last step of the first epoch
    # one step ends that epoch, and two epochs of two steps follow
    run(paths, tmp_path, batch_size=8, steps=10, resume=True)
    assert "done: step 12" in run(paths, tmp_path, batch_size=8, epochs=3, resume=True)


@pytest.mark.slow
def test_the_rate_decays_by_epochs_whatever_their_steps(paths, run, tmp_path):
    how = {"val_manifests": None, "warmup_steps": None, "warmup_epochs": 0, "lr": 0.01, "lr_gamma": 0.5}
    run(paths, tmp_path, batch_size=2, steps=8, **how)
    run(paths, tmp_path, batch_size=8, epochs=3, resume=True, **how)
    assert [r["lr"] for r in records(tmp_path, "train")] == pytest.approx([0.005] * 8 + [0.0025] * 2 + [0.00125] * 2)


@pytest.mark.slow
def test_an_earlier_run_that_left_only_its_best_is_not_mixed_with_a_new_one(paths, run, tmp_path):
    run(paths, tmp_path, steps=1)
    (tmp_path / "step_00000001.pt").rename(tmp_path / "best.pt")
    with pytest.raises(RunError, match="holds checkpoints of an earlier run"):
        run(paths, tmp_path, steps=2)


@pytest.mark.slow
def test_settings_that_are_announced_are_applied(paths, run, tmp_path):
    run(paths, tmp_path, steps=3)
    said = run(paths, tmp_path, steps=4, resume=True, amp="fp16", weight_decay=0.5)
    assert "note: --weight-decay was 0.001, now it is 0.5" in said and "note: the checkpoint has no loss scale" in said
    (group,) = checkpoint.load(tmp_path / "step_00000004.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


@pytest.mark.slow
def test_what_cannot_go_on_is_one_line(paths, run, tmp_path):
    run(paths, tmp_path, steps=1)
    with pytest.raises(RunError, match=r"step_00000001.pt was trained with --optimizer novograd: use that one"):
        run(paths, tmp_path, steps=2, resume=True, optimizer="adamw")
    others = {"labels": CONFIG | {"labels": ["b", "a", "c", "d"]}, "model": yaml.safe_load(yaml.safe_dump(CONFIG))}
    others["model"]["jasper"]["encoder"]["blocks"][1]["filters"] = 24
    for what, config in others.items():
        path = tmp_path / f"{what}.yaml"
        path.write_text(yaml.safe_dump(config))
        with pytest.raises(RunError, match=rf"other {what} than .*{what}\.yaml|fit the {what} of .*{what}\.yaml"):
            run(paths | {"config": path}, tmp_path, steps=2, resume=True)
