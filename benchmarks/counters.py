"""Counts the rows that meet a weight, whoever multiplies them: by watching every matrix product below autograd."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FUSED = (aten.linear.default, aten.matmul.default)  # seen whole in inference mode alone; they are taken apart first


class RowCounter(TorchDispatchMode):
    """Counts rows of products with the transpose of some weights: forward passes, and what a backward pass makes again.

    Copies that autocast makes of a weight count as the weight, and so does a part of it for its share of the columns.

    Attributes:
        rows: Rows counted, by phase and name.
        phase: What part of the step it is.
    """

    def __init__(self, weights: dict[str, Tensor | None]) -> None:
        """Args: weights by name, shape (outputs, inputs)."""
        super().__init__()
        self.rows: dict[tuple[str, str], float] = defaultdict(float)
        self.phase = ""
        self._known = [(*_extent(weight), name) for name, weight in weights.items() if weight is not None]
        self._outputs = {name: weight.shape[0] for name, weight in weights.items() if weight is not None}
        self._copies: list[Tensor] = []  # kept, so that nothing else comes to lie where they lie

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FUSED:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in (aten.mm, aten.addmm):
            self._count(*args[-2:])
        elif packet in (aten._to_copy, aten.clone) and (name := self._name(args[0])):
            self._known.append((*_extent(out), name))
            self._copies.append(out)
        return out

    def _count(self, rows: Tensor, weight: Tensor) -> None:
        """A forward product has the weight's transpose on the right; columns may be given piece by piece."""
        name = self._name(weight)
        if name and weight.stride(0) == 1 and weight.stride(1) != 1:
            self.rows[self.phase, name] += rows.shape[0] * weight.shape[1] / self._outputs[name]

    def _name(self, x: Tensor) -> str:
        """Of which weight this is a part; empty if of none."""
        place = x.data_ptr()
        return next((name for begin, end, name in self._known if begin <= place < end), "")


def _extent(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
