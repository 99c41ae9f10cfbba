"""Figures of a report that a good run reaches."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.headline import MINUS

ABOUT_POLICIES = ("policies", "comparisons")  # parts of report.json with an entry for each policy


@dataclass(frozen=True)
class Threshold:
    """Bounds of one figure of report.json.

    Attributes:
        figure: Its keys in report.json with colons between them, such as comparisons:ppo:held_out/sampled:win_rate:mean.
        low: The figure is at least this; None for no bound.
        high: The figure is at most this; None for no bound.
        name: Name in the report; None for the keys.
    """

    figure: str
    low: float | None = None
    high: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise UserError(f"threshold {self.figure!r} has no bound: give low, high, or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UserError(f"threshold {self.figure!r}: low {self.low:g} is above high {self.high:g}")

    @property
    def bounds(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {name: value for name, value in (("low", self.low), ("high", self.high)) if value is not None}

    def value(self, report: dict[str, Any]) -> float | None:
        """The figure; None where the report has no such number."""
        found: Any = report
        for key in self.figure.split(":"):
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if isinstance(found, int | float) else None


def check_names(thresholds: Iterable[Threshold], stages: Iterable[str]) -> None:
    """Refuse thresholds of stages that the pipeline does not have, before it starts.

    Raises:
        UserError: Names the threshold and the stages.
    """
    names = list(stages)
    for threshold in thresholds:
        part, _, rest = threshold.figure.partition(":")
        if part in ABOUT_POLICIES and rest.split(":")[0] not in names:
            raise UserError(
                f"report.thresholds: {threshold.figure} names no stage; after {part}: comes one of {', '.join(names)}"
            )


def check_thresholds(
    thresholds: Iterable[Threshold], report: dict[str, Any], *, skip_missing: bool
) -> list[dict[str, Any]]:
    """Compare figures with their bounds.

    Args:
        thresholds: What to check.
        report: What was measured.
        skip_missing: Drop thresholds whose figure the report lacks. Otherwise they are missed, without a value.
    """
    checked: list[dict[str, Any]] = []
    for threshold in thresholds:
        value = threshold.value(report)
        if value is None and skip_missing:
            continue
        met = value is not None and all(
            value >= bound if name == "low" else value <= bound for name, bound in threshold.bounds.items()
        )
        checked.append({"name": threshold.name or threshold.figure, "value": value, "met": met, **threshold.bounds})
    return checked


def in_words(check: dict[str, Any]) -> str:
    """The bounds of a checked threshold: "at least 0.1, at most 0.5"."""
    return ", ".join(
        f"{words} {check[key]:g}".replace("-", MINUS)
        for key, words in (("low", "at least"), ("high", "at most"))
        if key in check
    )
