"""Numbers that NVIDIA published for its Jasper (published.json). They are from other hardware and software."""

import json
from pathlib import Path

_FOUND = json.loads(Path(__file__).with_suffix(".json").read_text())
SOURCE: str = _FOUND["source"]
# By GPU and (N, seconds): mean, P90, P95, P99 in milliseconds per batch.
LATENCY_FP16, LATENCY_FP32 = (
    {gpu: {(int(N), float(s)): tuple(ms) for at, ms in table.items() for N, s in (at.split(", "),)}
     for gpu, table in _FOUND["latency"][dtype].items()}
    for dtype in ("float16", "float32")
)  # fmt: skip
# Each entry is (GPU, batch per GPU, number of GPUs, rate without AMP or None if not published, rate with AMP). A rate
# is the utterances per second of all GPUs. Without AMP the A100 used TF32, and the others FP32.
TRAINING = tuple(map(tuple, _FOUND["training"]))


def latency(dtype: str) -> dict[str, dict[tuple[int, float], tuple[float, ...]]]:
    """Returns, by GPU, the published means and percentiles to compare with a row in `dtype`."""
    return LATENCY_FP16 if dtype in ("float16", "bfloat16") else LATENCY_FP32


def training(batch: int, dtype: str) -> list[tuple[str, int, float]]:
    """Returns the published (GPU, number of GPUs, utterances per second) for this batch per GPU, in the precision
    nearest to `dtype`."""
    return [(gpu, gpus, rate) for (gpu, n, gpus), rate in _rates(dtype).items() if n == batch]


def scaling(gpus: int, dtype: str) -> list[tuple[str, int, float, float]]:
    """Returns the published (GPU, batch per GPU, utterances per second of all GPUs, efficiency) for this number of
    GPUs. The efficiency is utterances per second / (number of GPUs * utterances per second of one GPU)."""
    rates = _rates(dtype)
    return [
        (gpu, n, rate, rate / (gpus * rates[gpu, n, 1])) for (gpu, n, count), rate in rates.items() if count == gpus
    ]


def _rates(dtype: str) -> dict[tuple[str, int, int], float]:
    """Returns the published utterances per second by (GPU, batch per GPU, number of GPUs)."""
    amp = dtype in ("float16", "bfloat16")
    rates = ((at, with_amp if amp else full) for *at, full, with_amp in TRAINING)
    return {tuple(at): rate for at, rate in rates if rate is not None}
