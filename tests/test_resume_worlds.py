"""A run is stopped and resumed many times, with other settings and numbers of processes. Each time, a signal to one
process comes at a random step. Every rank must stop at that step, and every epoch must use each utterance once."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import worlds
from speech import train_arguments, write_corpus

from jasper_fast.nn import checkpoint

CHANGES = 10  # number of changes of the settings in each run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo"),
]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """Returns the corpus's paths, and the file names in each of two manifests: of all and of some utterances."""
    paths = write_corpus(tmp_path_factory.mktemp("beeps"))
    lines = paths["train"].read_text().splitlines(keepends=True)
    some = paths["train"].with_name("some.jsonl")
    some.write_text("".join(lines[:11]))
    names = {
        path: {Path(json.loads(line)["audio_filepath"]).name for line in path.read_text().splitlines()}
        for path in (paths["train"], some)
    }
    return paths, names


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
def test_a_run_goes_on_under_changing_settings(seed, manifests, tmp_path):
    (paths, names), rng = manifests, np.random.default_rng(seed)
    run, step, epoch = tmp_path / "run", 0, 0
    heard: dict[int, list[set[str]]] = defaultdict(list)  # for each epoch, the names that each part of the run used
    before, of_epoch = None, {}
    for part in range(CHANGES + 1):
        plan = drawn(rng, list(names))
        stop, world = step + int(rng.integers(1, 4)), plan["world"]
        on_rank = int(rng.integers(world))
        how = {k: v for k, v in plan.items() if k not in ("world", "betas")} | {"val_manifests": None}
        arguments = train_arguments(paths, run, **how, epochs=99, log_every=99, save_every=9999)
        arguments += ["--betas", str(plan["betas"]), "0", *(["--resume"] if part else [])]
        members = worlds.world(world, arguments, tmp_path / f"{part}", worlds.signal_at, on_rank, stop)
        told = f"part {part}: {plan}, {[m.said for m in members]}"
        assert [m.status for m in members] == [0] * world, told
        assert [len(m.steps) for m in members] == [stop - step] * world, told
        assert "stopped by" in members[0].said, told

        if before and before["train_manifests"] != plan["train_manifests"]:
            assert f"epoch {epoch + 1} begins anew" in members[0].said, told
            heard[epoch].clear()
        elif before and any(before[k] != plan.get(k) for k in before if k not in ("amp", "betas")):
            left = len(names[plan["train_manifests"]]) - len(set().union(*heard[epoch]))
            assert f"{left} of {len(names[plan['train_manifests']])} utterances are left" in members[0].said, told
        share = defaultdict(set)
        for name, of in ((Path(n).name, e) for m in members for heard_in in m.steps for e, n in heard_in):
            share[of].add(name)
        for of, mine in share.items():
            of_epoch[of] = names[plan["train_manifests"]]
            same = before and all(before[k] == plan.get(k) for k in before if k not in ("amp", "betas"))
            assert same or not any(mine & earlier for earlier in heard[of]), f"heard twice in epoch {of}; {told}"
            heard[of].append(mine)
        state = checkpoint.load(run / f"step_{stop:08d}.pt")
        assert state["step"] == stop and state["optimizer"]["param_groups"][0]["betas"][0] == plan["betas"]
        before, step, epoch = plan, stop, state["epoch"]
        for of in [of for of in heard if of < epoch]:  # completed epochs
            assert set().union(*heard.pop(of)) == of_epoch[of], told
    done = worlds.world(1, [*arguments, "--resume", "--steps", str(step + 2)], tmp_path / "last")
    assert done[0].status == 0 and f"done: step {step + 2}" in done[0].said and len(done[0].steps) == 2
