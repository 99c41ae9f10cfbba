"""The mean of all that was seen so far, over every rank; the same however the rows were dealt out."""

from collections.abc import Callable

import torch
from torch import Tensor


class RunningMean:
    """Of numbers from all optimizer steps before this one: a step's micro-batches and ranks all see the same value.

    Attributes:
        total: Sum of what was seen.
        count: How many numbers that was.
    """

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self._pending: list[Tensor] = []

    @property
    def value(self) -> float:
        """The mean; zero before the first step."""
        return self.total / self.count if self.count else 0.0

    def saw(self, values: Tensor) -> None:
        """Keep a micro-batch until the step; shape (rows,)."""
        values = values.detach()
        self._pending.append(torch.stack([values.sum(), values.new_tensor(float(len(values)))]))

    def step(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Let what was kept count; every rank must call. ``all_sum`` sums a tensor over ranks."""
        total, count = all_sum(torch.stack(self._pending).sum(dim=0)).tolist()
        self.total, self.count = self.total + total, self.count + round(count)
        self._pending.clear()

    def state(self) -> dict[str, float]:
        """For a checkpoint, which falls between two steps."""
        return {"total": self.total, "count": self.count}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.total, self.count = state["total"], int(state["count"])
