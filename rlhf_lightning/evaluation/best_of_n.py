"""What choosing among n samples is worth, for every n up to the number that was drawn, with intervals over prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_lightning.evaluation.statistics import Estimate, estimate
from rlhf_lightning.functional.best_of_n import best_of_n_kl, best_of_n_means, best_of_n_win_rate

Scores = NDArray[np.floating]


def best_of_n_curve(scores: Scores, values: Scores, clusters: Sequence[str]) -> dict[int, Estimate]:
    """Mean value of the best of n samples for n = 1, 2, 4, ..., unbiased for each n.

    Args:
        scores: What is chosen by. Shape (prompts, samples).
        values: What the chosen sample is worth; the scores themselves, or a reward that nobody chose by. Same shape.
        clusters: What each row belongs to, usually the text of its prompt.
    """
    numbers = [2**i for i in range(scores.shape[1].bit_length())]
    means = {n: best_of_n_means(torch.from_numpy(scores), torch.from_numpy(values), n).numpy() for n in numbers}
    return {n: estimate(rows, clusters) for n, rows in means.items()}


def best_of_n_table(scores: Scores, gold: Scores | None, clusters: Sequence[str]) -> list[dict[str, Any]]:
    """The curve with what is known beforehand: the KL that the choice costs at most, and the win rate that it has at most."""
    rewards = best_of_n_curve(scores, scores, clusters)
    golds = best_of_n_curve(scores, gold, clusters) if gold is not None else {}
    return [
        {
            "n": n,
            "reward": reward._asdict(),
            **({"gold": golds[n]._asdict()} if golds else {}),
            "kl_bound": best_of_n_kl(n),
            "win_rate_bound": best_of_n_win_rate(n),
        }
        for n, reward in rewards.items()
    ]
