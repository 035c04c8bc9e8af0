"""What the measured rows are held against; a report shows each goal beside what was measured, met or not."""

from dataclasses import dataclass


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


def judge(rows: list[dict], device_type: str) -> list[dict]:
    """The goals that these rows say something about."""
    found = []
    for goal in CPU_GOALS if device_type == "cpu" else ():
        for row in rows:
            if (
                row["bench"] != goal.bench
                or row["contender"] != "eager"
                or any(row["key"].get(k) != v for k, v in goal.key.items())
            ):
                continue
            ratio = (
                {"median": row["memory"]["ours_over_kept"]}
                if "ours_over_kept" in row.get("memory", {})
                else row.get("ratio")
            )
            result = {"name": goal.name, "goal": goal.goal, "at_most": goal.at_most, "row": row["id"]}
            if ratio is None:
                found.append(result | {"measured": None, "met": False})
            else:
                spread = {k: ratio[k] for k in ("low", "high") if k in ratio}
                found.append(result | {"measured": ratio["median"], **spread, "met": goal.met_by(ratio["median"])})
    return found
