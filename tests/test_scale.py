"""The size of a step (accumulation to a global batch, the memory of the largest batches), restarts by torchrun, two
processes against one, and learning without and with each augmentation."""

import copy
from pathlib import Path

import corpora
import numpy as np
import pytest
import test_sync
import torch
import worlds
import yaml
from speech import CONFIG, beep, records, run_train as run, train_arguments, write_corpus

from jasper_fast.data.batch import Batch
from jasper_fast.data.batches import BatchSampler
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.model import Jasper
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.training import scale
from jasper_fast.training.optim import NovoGrad
from jasper_fast.training.runs import RunError
from jasper_fast.training.split import Split
from jasper_fast.training.step import BufferGuard, Frontend, train_step


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return write_corpus(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "sizes", "world", "count", "said"),
    [
        (512, {"batch_size": 64}, 8, 1, "a step is 1 micro-batch of 64 utterances on each of 8 processes: 512"),
        (512, {"batch_size": 32}, 1, 16, "16 micro-batches of 32 utterances on each of 1 process: 512"),
        (500, {"batch_size": 64}, 4, 2, ": 512 (500 were requested)"),
        (64, {"max_seconds": 100.0}, 2, 3, "of 10 utterances on each of 2 processes: 60 (64 were requested)"),
    ],
)
def test_accumulation_for_a_global_batch(wanted: int, sizes: dict, world: int, count: int, said: str) -> None:
    found, message = scale.accumulation_for(wanted, BatchSampler([10.0] * 1000, world_size=world, **sizes), 1000)
    assert found == count and message.endswith(said)


def test_a_global_batch_below_a_micro_batch_is_an_error() -> None:
    with pytest.raises(RunError, match="lower --batch-size"):
        scale.accumulation_for(8, BatchSampler([1.0] * 100, 16), 100)


def test_the_global_batch_makes_the_steps_of_a_run(paths, tmp_path) -> None:
    run(train_arguments(paths, tmp_path / "out", epochs=1, batch_size=2, global_batch=8, val_manifests=None))
    steps = records(tmp_path / "out", "train")
    assert len(steps) == 2, "16 utterances, 8 a step"
    assert all(r["waited_s"] > 0 for r in steps)


@pytest.fixture
def split(paths) -> Split:
    return Split.load("training", [str(paths["train"])], JasperConfig.from_yaml(paths["config"]), batch_size=8)


@pytest.fixture
def model(paths):
    """Gives the test a model, and fails the test if the model's state has changed at the end."""
    made = Jasper(JasperConfig.from_yaml(paths["config"]), backend="reference").train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    yield made
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())


def test_the_scan_runs_the_largest_batches_and_changes_nothing(split, model) -> None:
    seconds = split.dataset.durations(0)
    shapes = scale.largest_batches(split.sampler, seconds)
    assert max(s for _, s in shapes) == max(seconds) and all(n <= 8 for n, _ in shapes)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    generator = torch.get_rng_state()
    said = scale.scan_memory(model, split.frontend.train(), shapes, torch.device("cpu"))
    assert "fits" in said and seen == [n for n, _ in shapes]
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("most", "said"), [(3, "2 do: use --batch-size 2 or --batch-seconds 2"), (0, "not even one")])
def test_what_does_not_fit_is_told_with_advice(split, model, most: int, said: str) -> None:
    def small(module, inputs, output) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("of the test")

    model.register_forward_hook(small)
    with pytest.raises(RunError, match=said):
        scale.scan_memory(model, split.frontend, [(8, 1.0)], torch.device("cpu"))


def test_a_restart_by_torchrun_resumes(paths, tmp_path, monkeypatch) -> None:
    arguments = train_arguments(paths, tmp_path / "out", steps=2, val_manifests=None, save_every=1)
    run(arguments)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(arguments)


# ------------------------------------------------------------------ two processes give the results of one process


def without_randomness() -> dict:
    """Returns CONFIG without dropout and augmentation."""
    config = copy.deepcopy(CONFIG | {"input_train": CONFIG["input_val"]})
    for block in config["jasper"]["encoder"]["blocks"]:
        block["dropout"] = 0.0
    return config


def learnt(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Returns the parameters after 6 steps on the share of `rank` in each batch, without dropout and dither."""
    torch.manual_seed(3)
    model = core = Jasper(JasperConfig.from_dict(without_randomness()), backend="reference").train()
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(core)
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(core)  # after wrapping, because DDP refuses it on a CPU
    frontend = Frontend(LogMelFeatures(n_mels=32, dither=0.0))
    optimizer = NovoGrad(core.parameters(), lr=0.005, betas=(0.95, 0.0))
    guard, scaler, rng = BufferGuard(core), torch.amp.GradScaler("cpu", enabled=False), np.random.default_rng(0)
    for _ in range(6):  # no more steps, because a rounding error may then switch a ReLU
        audio = torch.from_numpy(np.stack([beep("abcd", rng) for _ in range(4)]))
        targets = torch.tensor([[0, 1, 2, 3]] * 4)
        lengths, target_lengths = torch.tensor([audio.shape[1]] * 4), torch.tensor([4] * 4)
        names = list("wxyz")
        batch = Batch(*(x[rank::world] for x in (audio, lengths, targets, target_lengths, names, names)), [])
        train_step(model, frontend, [batch], optimizer, scaler, guard, device=torch.device("cpu"))
    return {name: p.detach() for name, p in core.named_parameters()}


@pytest.mark.slow
def test_two_processes_with_synchronised_batch_norm_reach_the_parameters_of_one(tmp_path) -> None:
    both = test_sync.spawn(tmp_path, {"learnt": (learnt, 2)})["learnt"]
    for name, wanted in learnt(0, 1).items():
        assert torch.equal(both[0][name], both[1][name])
        # With separate statistics in each process, the largest relative distance would be 0.39.
        assert (both[0][name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name


KILLED = """
import os, signal, sys, train
from jasper_fast.training.runs import StopRequest

def watch(state):
    if state.step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

train.main(train.arguments(sys.argv[1:]), StopRequest(), watch)
"""


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_losses_are_those_of_an_undisturbed_run(paths, tmp_path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    losses = {}
    for name, program in (("undisturbed", corpora.ROOT / "train.py"), ("killed", script)):
        arguments = train_arguments(paths, tmp_path / name, steps=6, save_every=2, batch_size=2, val_manifests=None)
        worlds.torchrun(program, arguments, "--max-restarts", "1")
        losses[name] = [(r["step"], r["loss"]) for r in records(tmp_path / name, "train")]
    assert losses["killed"] == losses["undisturbed"] and len(losses["killed"]) == 6


# ------------------------------------------------------------------ learning without and with each augmentation

AUGMENTATIONS = {
    "speed_perturbation": {"min_rate": 0.85, "max_rate": 1.15},
    "gain_perturbation": {"p": 1.0},
    "shift_perturbation": {"p": 1.0},
    "noise_perturbation": {"min_snr_db": 5},
    "tempo_perturbation": {},
    "spec_augment": {"freq_masks": 2, "max_freq": 6, "time_masks": 2, "max_time": 6},
    "cutout_augment": {"masks": 3, "max_freq": 8, "max_time": 8, "min_freq": 2, "min_time": 2},
    "speaker_warp": {},
}


@pytest.mark.slow
def test_twenty_utterances_are_learnt_by_heart_without_augmentation(tmp_path) -> None:
    paths = write_corpus(tmp_path, train=20)
    paths["config"].write_text(yaml.safe_dump(without_randomness()))
    options = {"steps": 60, "batch_size": 20, "val_manifests": paths["train"], "val_every": 20, "lr": 0.02}
    run(train_arguments(paths, tmp_path / "out", **options))
    rates = [r["wer"] for r in records(tmp_path / "out", "val_live")]
    assert len(rates) == 3 and rates[-1] == 0.0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_losses_are_finite_with_each_augmentation(paths, tmp_path, name: str) -> None:
    config = CONFIG | {"input_train": copy.deepcopy(CONFIG["input_val"])}  # without other augmentations
    place = config["input_train"]["audio_dataset"] if name.endswith("perturbation") else config["input_train"]
    place[name] = AUGMENTATIONS[name]
    paths["config"].write_text(yaml.safe_dump(config))
    run(train_arguments(paths, tmp_path / "out", steps=3, val_manifests=None))
    steps = records(tmp_path / "out", "train")
    assert len(steps) == 3 and all(r["loss"] > 0 and r["bad_losses"] == 0 for r in steps)
