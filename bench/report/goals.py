"""What the measured rows are held against; a report shows each goal beside what was measured, met or not."""

from collections.abc import Iterable
from dataclasses import dataclass

from jasper_fast.bench.cases.layers import layers


@dataclass(frozen=True)
class Goal:
    """`value` of the rival's row that matches `key` must be at least (or at most) `goal`."""

    name: str
    bench: str
    key: dict
    goal: float
    at_most: bool = False

    def met_by(self, value: float) -> bool:
        """Whether `value` reaches the goal."""
        return value <= self.goal if self.at_most else value >= self.goal

    def matches(self, row: dict) -> bool:
        """Whether a row is of the case that the goal is about."""
        return row["bench"] == self.bench and all(row["key"].get(k) == v for k, v in self.key.items())

    def judge(self, rows: list[dict]) -> Iterable[dict]:
        """The goal beside each row that it is about."""
        for row in rows:
            if row["contender"] == "eager" and self.matches(row):
                memory = row.get("memory", {})
                kept = {"median": memory["ours_over_kept"]} if "ours_over_kept" in memory else None
                yield self.verdict(row["id"], kept or row.get("ratio"))

    def verdict(self, row_id: str, value: dict | None, kind: str = "ratio") -> dict:
        """The goal, what was measured ({"median", and where known "low" and "high"}), and whether that meets it."""
        result = {"name": self.name, "goal": self.goal, "at_most": self.at_most, "row": row_id, "kind": kind}
        if value is None:
            return result | {"measured": None, "met": False}
        spread = {k: value[k] for k in ("low", "high") if k in value}
        return result | {"measured": value["median"], **spread, "met": self.met_by(value["median"])}


class ShareOfLimit(Goal):
    """Our own row must reach `goal` of the ceiling that the same run measured: matrix product or copy."""

    def judge(self, rows: list[dict]) -> Iterable[dict]:
        """The goal beside each of our rows that it is about; its row is eager's, as in the other goals."""
        for row in rows:
            if row["ours"] and self.matches(row):
                share = row.get("limit", {}).get("share")
                eager = row["id"].rsplit(" / ", 1)[0] + " / eager"
                yield self.verdict(eager, None if share is None else {"median": share}, "share")


class NeverSlower(Goal):
    """In every case that matches, the best rival must take at least `goal` times our time."""

    def judge(self, rows: list[dict]) -> Iterable[dict]:
        """The goal beside its worst case: the rival's row that comes nearest to us, or beats us by most.

        A case in which we have no number at all is the worst.
        """
        mine = [row for row in rows if self.matches(row)]
        for row in mine:
            if row["ours"] and row["status"] != "ok":
                yield self.verdict(row["id"].rsplit(" / ", 1)[0] + " / eager", None)
                return
        raced = [row for row in mine if "ratio" in row]
        if raced:
            worst = min(raced, key=lambda row: row["ratio"]["median"])
            yield self.verdict(worst["id"], worst["ratio"])


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
)
GPU_N, GPU_T = 32, 832


def gpu_goals() -> tuple[Goal, ...]:
    """In fp16: shares of the run's own ceilings, and never slower than the best rival."""
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
    kept = Goal(
        "Jasper 10x5, bytes kept for backward",
        "memory",
        {"model": "jasper10x5", "dtype": "float16"},
        0.25,
        at_most=True,
    )
    return (*convs, *norms, *races, kept)


def judge(rows: list[dict], device_type: str) -> list[dict]:
    """The goals that these rows say something about."""
    goals = CPU_GOALS if device_type == "cpu" else gpu_goals()
    return [verdict for goal in goals for verdict in goal.judge(rows)]
