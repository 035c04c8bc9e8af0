"""The goals for measured rows. A report shows each goal, the measured value, and whether the goal is met."""

from collections.abc import Iterable
from dataclasses import dataclass

from jasper_fast.bench.cases.layers import layers
from jasper_fast.bench.rivals.choice import CUDA_FACE


@dataclass(frozen=True)
class Goal:
    """A goal for the case `key`: eager's time / ours must be at least `goal` (or at most, with `at_most`).

    In rows of `python -m bench memory` the ratio is `ours_over_kept`: the bytes that we keep for backward / eager's.
    """

    name: str
    bench: str
    key: dict
    goal: float
    at_most: bool = False

    def matches(self, row: dict) -> bool:
        """Whether the goal is about the case of this row."""
        return row["bench"] == self.bench and all(row["key"].get(k) == v for k, v in self.key.items())

    def judge(self, rows: list[dict]) -> Iterable[dict]:
        """Yields the verdict on each of eager's rows to which the goal applies."""
        for row in rows:
            if row["contender"] == "eager" and self.matches(row):
                kept = row.get("memory", {}).get("ours_over_kept")
                yield self.verdict(row["id"], row.get("ratio") if kept is None else {"median": kept})

    def verdict(self, row_id: str, value: dict | None, kind: str = "ratio") -> dict:
        """Returns the goal, the measured value, and whether the goal is met.

        `value` has "median" and, if there is an interval, "low" and "high". It is None if there is no number.
        """
        result = {"name": self.name, "goal": self.goal, "at_most": self.at_most, "row": row_id, "kind": kind}
        if value is None:
            return result | {"measured": None, "met": False}
        interval = {k: value[k] for k in ("low", "high") if k in value}
        met = value["median"] <= self.goal if self.at_most else value["median"] >= self.goal
        return result | {"measured": value["median"], **interval, "met": met}


class ShareOfLimit(Goal):
    """A goal for our own row: its rate must be at least `goal` times the ceiling that the same run measured.

    The ceiling is the rate of a matrix product or of a copy.
    """

    def judge(self, rows: list[dict]) -> Iterable[dict]:
        """Yields the verdict on each of our rows to which the goal applies. Its `row` is the id of eager's row."""
        for row in rows:
            if row["ours"] and self.matches(row):
                share = row.get("limit", {}).get("share")
                yield self.verdict(eager_of(row), None if share is None else {"median": share}, "share")


class NeverSlower(Goal):
    """A goal for all cases that match: the best rival must take at least `goal` times our time."""

    def judge(self, rows: list[dict]) -> Iterable[dict]:
        """Yields one verdict, for the row with the smallest ratio among all matching cases and their rivals.

        Our own CUDA face does not count as a rival here. If no row has a ratio, there is no verdict.

        If a case has no number of ours, the verdict is about that case: the goal is not met.
        """
        mine = [row for row in rows if self.matches(row)]
        for row in mine:
            if row["ours"] and row["status"] != "ok":
                yield self.verdict(eager_of(row), None)
                return
        raced = [row for row in mine if "ratio" in row and row["contender"] != CUDA_FACE]
        if raced:
            worst = min(raced, key=lambda row: row["ratio"]["median"])
            yield self.verdict(worst["id"], worst["ratio"])


def eager_of(row: dict) -> str:
    """Returns the id of eager's row in the same case."""
    return row["id"].rsplit(" / ", 1)[0] + " / eager"


CPU_GOALS = (
    Goal(
        "bn_relu_dropout forward + backward, (8, 256, 800)",
        "kernels",
        {"op": "bn_relu_dropout", "shape": "(8, 256, 800)", "mode": "both", "dtype": "float32"},
        4.0,
    ),
    Goal(
        "bn_relu_dropout forward + backward, (4, 768, 800)",
        "kernels",
        {"op": "bn_relu_dropout", "shape": "(4, 768, 800)", "mode": "both", "dtype": "float32"},
        4.0,
    ),
    Goal(
        "Jasper 10x5 inference, one 2 s utterance",
        "latency",
        {"model": "jasper10x5", "N": 1, "seconds": 2.0, "path": "acoustic model", "dtype": "float32"},
        1.05,
    ),
    Goal(
        "small Jasper, training forward + backward",
        "train",
        {"model": "small", "batch": "(8, 64, 400)", "mode": "forward+backward", "dtype": "float32"},
        1.10,
    ),
    Goal(
        "Jasper 10x5, bytes kept for backward",
        "memory",
        {"model": "jasper10x5", "dtype": "float32"},
        0.40,
        at_most=True,
    ),
    Goal(
        "depthwise conv of 512 channels, 63 taps, 100 frames",
        "kernels",
        {"op": "depthwise", "shape": "(1, 512, 100)", "taps": "K = 63", "mode": "inference", "dtype": "float32"},
        8.0,
    ),
    Goal(
        "QuartzNet 15x5 inference, one 2 s utterance",
        "latency",
        {"model": "quartznet15x5", "N": 1, "seconds": 2.0, "path": "acoustic model", "dtype": "float32"},
        2.5,
    ),
    Goal(
        "small QuartzNet, training forward + backward",
        "train",
        {"model": "quartznet_small", "batch": "(8, 64, 400)", "mode": "forward+backward", "dtype": "float32"},
        1.8,
    ),
    Goal(
        "QuartzNet 15x5, bytes kept for backward",
        "memory",
        {"model": "quartznet15x5", "dtype": "float32"},
        0.50,
        at_most=True,
    ),
)
GPU_N, GPU_T = 32, 832


def gpu_goals() -> tuple[Goal, ...]:
    """Returns the goals for fp16: shares of the ceilings that the run measured, sub-blocks at least as fast as the best
    rival, and bytes kept for backward."""
    convs = (
        ShareOfLimit(
            f"conv1d {a.C_in}->{a.C_out}, K = {a.K}: share of the matrix-product rate",
            "kernels",
            {"op": "conv1d", **a.key(GPU_N, GPU_T), "mode": "forward", "dtype": "float16"},
            0.75,
        )
        for a in layers()[:5]
    )
    norms = (
        ShareOfLimit(
            f"bn_relu_dropout ({GPU_N}, {C}, {GPU_T}): share of the copy bandwidth",
            "kernels",
            {"op": "bn_relu_dropout", "shape": f"({GPU_N}, {C}, {GPU_T})", "mode": "both", "dtype": "float16"},
            0.85,
        )
        for C in (256, 768)
    )
    races = (
        NeverSlower(
            f"sub-blocks, {mode}: the best rival of the worst shape",
            "kernels",
            {"op": "sub_block", "mode": mode, "dtype": "float16"},
            1.0,
        )
        for mode in ("forward", "backward", "inference")
    )
    memory = {"model": "jasper10x5", "dtype": "float16"}
    return (*convs, *norms, *races, Goal("Jasper 10x5, bytes kept for backward", "memory", memory, 0.25, at_most=True))


def judge(rows: list[dict], device_type: str) -> list[dict]:
    """Returns the verdicts on all goals for which there are rows."""
    goals = CPU_GOALS if device_type == "cpu" else gpu_goals()
    return [verdict for goal in goals for verdict in goal.judge(rows)]
