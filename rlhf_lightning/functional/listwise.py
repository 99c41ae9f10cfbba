"""What a ranking of several responses says about their scores: all its pairs, or all of it at once.

Rows of one batch belong to several prompts. ``prompt`` says to which, from 0 on; ``ranks`` are compared within a prompt alone,
the lowest is the best, and equal ranks are a tie, which says nothing: neither formula has a term for it.
"""

import torch
from torch import Tensor


def ordered_pairs(ranks: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of responses to one prompt that the ranking tells apart.

    Args:
        ranks: Of each response. Shape (responses,).
        prompt: Whose response it is. Shape (responses,), int64.

    Returns:
        Places of the better and of the worse one of each pair. Shape (pairs,), int64 each.
    """
    better, worse = _beats(ranks, prompt).nonzero(as_tuple=True)
    return better, worse


def pair_shares(prompt: Tensor) -> Tensor:
    r"""What each pair counts, so that a sum over pairs is the sum over prompts of the mean over the pairs of each.

    .. math:: 1 / \#\{\text{pairs of the same prompt}\}

    Args:
        prompt: Whose pair it is. Shape (pairs,), int64.

    Returns:
        Shape (pairs,), float32.

    Source: Ouyang et al. 2022, eq. 1, https://arxiv.org/abs/2203.02155: 1 / C(K, 2) where no two are tied.
    """
    return 1 / prompt.bincount()[prompt].float()


def plackett_luce_loss(scores: Tensor, ranks: Tensor, prompt: Tensor, *, prompts: int) -> Tensor:
    r"""Negative log-likelihood of rankings whose best is chosen first, then the best of the others, and so on.

    .. math:: \ell = -\sum_k \left[ r_k - \log \Big( e^{r_k} + \sum_{j \text{ worse than } k} e^{r_j} \Big) \right]

    Of two it is Bradley-Terry.

    Args:
        scores: Shape (responses,), float32.
        ranks: Shape (responses,).
        prompt: Whose response it is. Shape (responses,), int64.
        prompts: How many prompts there are.

    Returns:
        Shape (prompts,), nats.

    Source: Plackett 1975, https://doi.org/10.2307/2346567; Rafailov et al. 2023, eq. 18, https://arxiv.org/abs/2305.18290
    """
    seen = _beats(ranks, prompt) | torch.eye(len(ranks), dtype=torch.bool, device=ranks.device)
    log_sum = scores.expand(len(scores), -1).masked_fill(~seen, -torch.inf).logsumexp(dim=1)
    return scores.new_zeros(prompts).index_add(0, prompt, log_sum - scores)


def kendall_tau(scores: Tensor, ranks: Tensor, prompt: Tensor, *, prompts: int) -> Tensor:
    r"""How far scores put the responses to a prompt into the order of their ranks.

    .. math:: \tau = \frac{\text{concordant} - \text{discordant}}{\text{pairs that the ranks tell apart}}

    Scores that are equal are neither.

    Args:
        scores: Shape (responses,).
        ranks: Shape (responses,).
        prompt: Whose response it is. Shape (responses,), int64.
        prompts: How many prompts there are; each has a pair.

    Returns:
        Shape (prompts,), in [-1, 1].

    Source: Kendall 1938, https://doi.org/10.1093/biomet/30.1-2.81; without ties it is tau-a and tau-b alike.
    """
    better, worse = ordered_pairs(ranks, prompt)
    agreement = (scores[better] - scores[worse]).sign().float()
    return agreement.new_zeros(prompts).index_add(0, prompt[better], agreement * pair_shares(prompt[better]))


def _beats(ranks: Tensor, prompt: Tensor) -> Tensor:
    """Whether the response of the row is better than that of the column. Shape (responses, responses), bool."""
    return (prompt[:, None] == prompt) & (ranks[:, None] < ranks)
