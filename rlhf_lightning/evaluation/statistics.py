"""Means with intervals over prompts: responses to one prompt are not independent, and prompts come more than once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(values: NDArray[np.floating], clusters: Sequence[str] | None = None, seed: int = 0) -> Estimate:
    """Mean of all values, with a percentile bootstrap over clusters of rows.

    Args:
        values: One row a prompt, and a column a response if there are several. Shape (rows,) or (rows, samples).
        clusters: What each row belongs to, usually the text of its prompt; whole clusters are drawn. None: rows are.
        seed: Of the resampling.

    Returns:
        The mean over everything, and its 2.5 % and 97.5 % points.

    Raises:
        ValueError: If there is no row.
    """
    if not len(values):
        raise ValueError("no values to take the mean of")
    rows = values.reshape(len(values), -1).mean(axis=1)
    names = np.arange(len(rows)) if clusters is None else np.unique(np.array(clusters), return_inverse=True)[1]
    sums, counts = np.bincount(names, weights=rows), np.bincount(names)
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [2.5, 97.5])
    return Estimate(float(rows.mean()), float(low), float(high))


def win_rate(
    ours: NDArray[np.floating], theirs: NDArray[np.floating], clusters: Sequence[str] | None = None
) -> Estimate:
    """How often ours scores higher on the same prompt, ties counting one half.

    Args:
        ours: Scores. Shape (prompts, samples).
        theirs: Scores of the opponent's responses to the same prompts, same shape.
        clusters: As in :func:`estimate`.
    """
    return estimate((ours > theirs) + 0.5 * (ours == theirs), clusters)
