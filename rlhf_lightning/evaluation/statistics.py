"""Means with intervals, over prompts: responses to one prompt are not independent."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(values: NDArray[np.floating], seed: int = 0) -> Estimate:
    """Mean of per-prompt values, with a percentile bootstrap over prompts.

    Args:
        values: One row a prompt, and a column a response if there are several. Shape (prompts,) or (prompts, samples).
        seed: Of the resampling.

    Returns:
        The mean over everything, and its 2.5 % and 97.5 % points.

    Raises:
        ValueError: If there is no prompt.
    """
    if not len(values):
        raise ValueError("no values to take the mean of")
    prompts = values.reshape(len(values), -1).mean(axis=1)
    draws = np.random.default_rng(seed).integers(0, len(prompts), (RESAMPLES, len(prompts)))
    low, high = np.percentile(prompts[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(prompts.mean()), float(low), float(high))


def win_rate(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> Estimate:
    """How often ours scores higher on the same prompt, ties counting one half.

    Args:
        ours: Scores. Shape (prompts, samples).
        theirs: Scores of the opponent's responses to the same prompts, same shape.
    """
    return estimate((ours > theirs) + 0.5 * (ours == theirs))
