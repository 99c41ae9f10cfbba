"""Means with intervals over prompts: responses to one prompt are not independent, and prompts come more than once."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_lightning.data.prompt_split import prompt_key

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def prompt_clusters(prompts: Iterable[Any]) -> list[str]:
    """The cluster of each row: equal prompts, text or messages, are one cluster."""
    return [prompt_key(prompt) for prompt in prompts]


def estimate(values: NDArray[np.floating], clusters: Sequence[str], seed: int = 0) -> Estimate:
    """Mean of all values, with a percentile bootstrap over clusters of rows.

    Args:
        values: One row a prompt, and a column a response if there are several. Shape (rows,) or (rows, samples).
        clusters: The cluster of each row, usually that of its prompt, see :func:`prompt_clusters`. Complete clusters are drawn.
            There is no default: without clusters a prompt that comes more than once narrows the interval.
        seed: Of the resampling.

    Returns:
        The mean over everything, and its 2.5 % and 97.5 % points.

    Raises:
        ValueError: If there is no row.
    """
    if not len(values):
        raise ValueError("no values to take the mean of")
    rows = values.reshape(len(values), -1).mean(axis=1)
    names = np.unique(np.array(clusters), return_inverse=True)[1]
    sums, counts = np.bincount(names, weights=rows), np.bincount(names)
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [2.5, 97.5])
    return Estimate(float(rows.mean()), float(low), float(high))


def win_rate(ours: NDArray[np.floating], theirs: NDArray[np.floating], clusters: Sequence[str]) -> Estimate:
    """How often ours scores higher on the same prompt, ties counting one half.

    Args:
        ours: Scores. Shape (prompts, samples).
        theirs: Scores of the opponent's responses to the same prompts, same shape.
        clusters: As in :func:`estimate`.
    """
    return estimate((ours > theirs) + 0.5 * (ours == theirs), clusters)
