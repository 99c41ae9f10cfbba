"""Sums and moments over the entries that a mask counts; what stands elsewhere, NaN included, has no effect."""

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
    return torch.where(mask, x, 0).sum() if dim is None else torch.where(mask, x, 0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the counted entries; NaN where none counts, so that an empty mean is never taken for a zero.

    Args and shapes as in :func:`masked_sum`.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count


def masked_var(x: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    """Variance of the counted entries.

    Args:
        x: Values. Any shape.
        mask: True where an entry counts. Same shape, bool.
        unbiased: Divide by n - 1 rather than by n.

    Returns:
        A scalar; 0 for a single entry, whose spread is not known (whitening one value gives 0, not NaN).
    """
    x = x.masked_fill(~mask, 0)  # else NaN there would reach the gradient of the square
    squared = masked_sum((x - masked_mean(x, mask)).square(), mask)
    count = mask.sum()
    return squared / (count - 1).clamp(min=1) if unbiased else squared / count


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
    return torch.where(mask, columns, -1).max(dim=1).values
