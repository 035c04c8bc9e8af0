"""A run is stopped and resumed many times, with other settings and numbers of processes. Each time, a signal to one
process comes at a random step. Every rank must stop at that step, and every epoch must use each utterance once."""

from collections import defaultdict
from pathlib import Path

import corpora
import numpy as np
import pytest
import torch.distributed as dist
import worlds
from speech import corpus_of_beeps, train_arguments  # noqa: F401

from jasper_fast.nn import checkpoint

CHANGES = 10  # number of changes of the settings in each run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo"),
]


@pytest.fixture(scope="module")
def names(paths):
    """Returns the file names in two manifests, by the manifest's path. One manifest has all utterances, the other the
    first 11."""
    some = corpora.write_lines(paths["train"].with_name("some.jsonl"), corpora.read_lines(paths["train"])[:11])
    return {path: {line["audio_filepath"] for line in corpora.read_lines(path)} for path in (paths["train"], some)}


def drawn(rng: np.random.Generator, manifests: list[Path]) -> dict:
    """Draws the settings of one part of the run."""
    sizes = [{"batch_size": int(rng.integers(1, 6))}, {"batch_size": None, "batch_seconds": float(rng.integers(1, 5))}]
    return {
        "train_manifests": manifests[int(rng.random() < 0.25)],
        "grad_accumulation": int(rng.integers(1, 4)),
        "amp": str(rng.choice(["off", "bf16", "fp16"])),
        "world": int(rng.integers(1, 4)),
        "betas": float(rng.choice([0.9, 0.95])),
        **sizes[int(rng.integers(2))],
    }


@pytest.mark.parametrize("seed", range(3))
def test_a_run_goes_on_under_changing_settings(seed, paths, names, tmp_path):
    rng, run, step, epoch = np.random.default_rng(seed), tmp_path / "run", 0, 0
    heard: dict[int, list[set[str]]] = defaultdict(list)  # for each epoch, the names that each part of the run used
    before, of_epoch = None, {}
    for part in range(CHANGES + 1):
        plan = drawn(rng, list(names))
        stop, world = step + int(rng.integers(1, 4)), plan["world"]
        how = {k: v for k, v in plan.items() if k not in ("world", "betas")} | {"val_manifests": None}
        arguments = train_arguments(paths, run, **how, epochs=99, log_every=99, save_every=9999)
        arguments += ["--betas", str(plan["betas"]), "0", *(["--resume"] if part else [])]
        members = worlds.world(world, arguments, tmp_path / f"{part}", worlds.signal_at, int(rng.integers(world)), stop)
        told = f"part {part}: {plan}, {[m.said for m in members]}"
        assert [len(m.steps) for m in members] == [stop - step] * world, told
        assert "stopped by" in members[0].said, told

        here = names[plan["train_manifests"]]
        same = before and all(before[k] == plan.get(k) for k in before if k not in ("amp", "betas"))
        if before and before["train_manifests"] != plan["train_manifests"]:
            assert f"epoch {epoch + 1} begins anew" in members[0].said, told
            heard[epoch].clear()
        elif before and not same:
            left = len(here) - len(set().union(*heard[epoch]))
            assert f"{left} of {len(here)} utterances are left" in members[0].said, told
        share = defaultdict(set)
        for name, of in ((Path(n).name, e) for m in members for heard_in in m.steps for e, n in heard_in):
            share[of].add(name)
        for of, mine in share.items():
            of_epoch[of] = here
            assert same or not any(mine & earlier for earlier in heard[of]), f"heard twice in epoch {of}; {told}"
            heard[of].append(mine)
        state = checkpoint.load(run / f"step_{stop:08d}.pt")
        assert state["step"] == stop and state["optimizer"]["param_groups"][0]["betas"][0] == plan["betas"]
        before, step, epoch = plan, stop, state["epoch"]
        for of in [of for of in heard if of < epoch]:  # completed epochs
            assert set().union(*heard.pop(of)) == of_epoch[of], told
    done = worlds.world(1, [*arguments, "--resume", "--steps", str(step + 2)], tmp_path / "last")
    assert f"done: step {step + 2}" in done[0].said and len(done[0].steps) == 2
