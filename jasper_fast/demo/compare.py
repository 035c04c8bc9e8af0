"""Compares fused and eager models on this machine: training step, inference, and bytes kept for backward."""

import json
from pathlib import Path
from typing import Any

import torch

from jasper_fast.extras import need


def compare(
    config: Path, folder: Path, batch: tuple[int, int], device: torch.device, seconds: float
) -> dict[str, dict]:
    """Runs `jasper-fast bench` for the fused and the eager model of `config`. The results are written to `folder`.

    Training and inference are measured for about `seconds` each. `batch`: utterances and feature frames of a training
    step. In the returned dict, `train` and `inference` have utterances per second and `ratio`, the median eager time
    over the median fused time. `memory` has the bytes that a training forward keeps for backward, and `ratio`, fused
    bytes over eager bytes.
    """
    model = f"{config}:{batch[0]},{batch[1]}"
    step = _measure("train", model, folder, device, seconds, "--mode", "step")
    listen = _measure("latency", str(config), folder, device, seconds)
    kept = _measure("memory", model, folder, device, seconds)
    spoken = listen["fused"]["key"]
    shape = f"{batch[0]} utterances, {batch[1] / 100:.1f} s"
    sizes = {f"{side}_bytes": row["memory"]["kept_bytes"] for side, row in kept.items()}
    return {
        "train": _rates(step, batch[0]) | {"shape": f"{shape}, a step of train.py"},
        "inference": _rates(listen, spoken["N"]) | {"shape": f"{spoken['N']} utterance, {spoken['seconds']} s"},
        "memory": sizes | {"ratio": sizes["fused_bytes"] / sizes["eager_bytes"], "shape": shape},
    }


def _measure(
    command: str, model: str, folder: Path, device: torch.device, seconds: float, *more: str
) -> dict[str, Any]:
    """Runs `jasper-fast bench COMMAND` and returns the rows of its result, by the keys "fused" and "eager"."""
    out = folder / command
    argv = [command, "--model", model, "--device", str(device), "--dtype", "fp32", "--quick", "--seconds", str(seconds),
            "--out", str(out), "--rivals", "eager", *more]  # fmt: skip
    if status := need("jasper_fast.bench.cli", "bench").main(argv):
        raise SystemExit(status)  # it has said why; the newest result in `out` may be of an earlier run
    newest = max(out.glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {"fused" if row["ours"] else "eager": row for row in json.loads(newest.read_text())["rows"]}


def _rates(rows: dict[str, Any], utterances: int) -> dict[str, float]:
    eager, fused = (rows[side]["time_s"]["median"] for side in ("eager", "fused"))
    return {
        "eager_utterances_per_second": utterances / eager,
        "fused_utterances_per_second": utterances / fused,
        "ratio": eager / fused,
    }
