"""Pairs of responses for losses, without a network."""

import torch

from rlhf_lightning.losses.pairs import Pairs, ScoredResponses


def pairs_of(chosen_logratio, rejected_logratio, lengths=(1, 1)):
    """Pairs with these log-ratios, spread evenly over so many tokens each; under the reference all are certain."""
    width = max(lengths)
    n = torch.tensor([[lengths[0]]] * len(chosen_logratio) + [[lengths[1]]] * len(rejected_logratio))
    mask = torch.arange(width) < n
    logprobs = (torch.cat([chosen_logratio, rejected_logratio])[:, None] / n).expand(mask.shape)
    return Pairs(ScoredResponses(logprobs, mask, ref_logprobs=torch.zeros_like(logprobs)))


def of_tokens(chosen, rejected, collisions=None):
    """One pair with these log-probabilities of tokens, and no reference; ``collisions``: of every token."""
    width = max(len(chosen), len(rejected))
    rows = [[*row, *[torch.nan] * (width - len(row))] for row in (chosen, rejected)]
    logprobs, mask = (
        torch.tensor(rows),
        torch.tensor([[i < len(row) for i in range(width)] for row in (chosen, rejected)]),
    )
    all_alike = None if collisions is None else torch.full_like(logprobs, collisions)
    return Pairs(ScoredResponses(logprobs, mask, collisions=all_alike))
