"""Sums over the entries that a mask counts; what stands elsewhere, NaN included, has no effect."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the counted entries.

    Args:
        x: Values. Any shape, floating point.
        mask: True where an entry counts. Same shape as ``x``, bool.
        dim: Axis to sum over; every axis if None.

    Returns:
        The sum: a scalar, or ``x``'s shape without ``dim``. Its gradient is zero where masked, even where ``x`` is NaN.
    """
    return torch.where(mask, x, 0).sum(dim)


def last_true(mask: Tensor) -> Tensor:
    """Column of the last True in each row.

    Args:
        mask: Shape (batch, length), bool; padding may stand on either side.

    Returns:
        Shape (batch,), int64.

    Raises:
        ValueError: If a row has no True.
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError(f"rows {(~mask.any(dim=1)).nonzero().flatten().tolist()} of the mask hold no True")
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, 0).max(dim=1).values
