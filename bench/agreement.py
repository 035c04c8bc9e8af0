"""Do two runs of one machine say the same? Rows whose 95 % intervals of the ratio to a rival overlap, and those not."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """How many rows two results share that have a ratio, and the ids of those whose intervals do not overlap."""

    rows: int
    apart: tuple[str, ...]

    @property
    def share(self) -> float:
        """The part of the rows that overlap; 0 where none is shared."""
        return (self.rows - len(self.apart)) / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        told = f"intervals of the ratios overlap in {self.rows - len(self.apart)} of {self.rows} rows"
        return f"{told} ({100 * self.share:.0f} %)" if self.rows else "no row with a ratio is in both results"


def agreement(first: dict, second: dict) -> Agreement:
    """Compare the rows that both results measured."""
    ratios = [{r["id"]: r["ratio"] for r in _timed(result["rows"]) if "ratio" in r} for result in (first, second)]
    shared = [key for key in ratios[0] if key in ratios[1]]
    apart = [
        key
        for key in shared
        if ratios[0][key]["low"] > ratios[1][key]["high"] or ratios[1][key]["low"] > ratios[0][key]["high"]
    ]
    return Agreement(len(shared), tuple(apart))


def _timed(rows: Sequence[dict]) -> Sequence[dict]:
    return [row for row in rows if row["status"] == "ok"]
