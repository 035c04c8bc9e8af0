"""Numbers that NVIDIA published for the reference system (published.json), on other hardware and software."""

import json
from pathlib import Path

_FOUND = json.loads(Path(__file__).with_suffix(".json").read_text())
SOURCE: str = _FOUND["source"]
# GPU, then (N, seconds): mean, P90, P95, P99 in milliseconds per batch
LATENCY_FP16, LATENCY_FP32 = (
    {gpu: {(int(N), float(s)): tuple(ms) for at, ms in table.items() for N, s in (at.split(", "),)}
     for gpu, table in _FOUND["latency"][dtype].items()}
    for dtype in ("float16", "float32")
)  # fmt: skip
# GPU, batch per GPU, number of GPUs: sequences per second of all GPUs in FP32 (None: not published) and with AMP
TRAINING = tuple(map(tuple, _FOUND["training"]))


def latency(dtype: str) -> dict[str, dict[tuple[int, float], tuple[float, ...]]]:
    """The published table to compare with a row in `dtype`, by GPU."""
    return LATENCY_FP16 if dtype in ("float16", "bfloat16") else LATENCY_FP32


def training(batch: int, dtype: str) -> list[tuple[str, int, float]]:
    """(GPU, GPUs, sequences per second) published for a batch of one GPU, in the precision nearest to `dtype`."""
    amp = dtype in ("float16", "bfloat16")
    found = ((gpu, gpus, with_amp if amp else full) for gpu, n, gpus, full, with_amp in TRAINING if n == batch)
    return [(gpu, gpus, rate) for gpu, gpus, rate in found if rate is not None]


def scaling(gpus: int, dtype: str) -> list[tuple[str, int, float, float]]:
    """(GPU, batch of each, sequences per second of all, share of as many single ones) published for so many GPUs."""
    alone = {(gpu, n): (full, amp) for gpu, n, count, full, amp in TRAINING if count == 1}
    which, found = int(dtype in ("float16", "bfloat16")), []
    for gpu, n, count, *rates in TRAINING:
        if count == gpus and rates[which] is not None:
            found.append((gpu, n, rates[which], rates[which] / (gpus * alone[gpu, n][which])))
    return found
