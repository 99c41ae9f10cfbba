"""Drawing a token from a distribution over the vocabulary."""

import torch
from torch import Tensor

from rlhf_lightning.generation.engine import SamplingParameters


def filtered(probabilities: Tensor, sampling: SamplingParameters) -> Tensor:
    """Weights to draw with: the probabilities of the tokens that top-k and top-p leave; not normalised.

    Args:
        probabilities: Temperature applied. Shape (rows, vocabulary).
        sampling: ``top_k`` is applied first, then ``top_p`` to what it leaves, as in transformers.

    Returns:
        Same shape, >= 0.
    """
    weights = probabilities
    if sampling.top_k:
        least = weights.topk(min(sampling.top_k, weights.shape[-1]), dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0)
    if sampling.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        beyond = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        weights = weights.masked_fill(beyond.scatter(-1, order, beyond), 0)
    return weights


def drawn(weights: Tensor) -> Tensor:
    """One token a row, by the inverse of the cumulative distribution: one random number a row.

    Args:
        weights: Proportional to the probabilities. Shape (rows, vocabulary), >= 0.

    Returns:
        Shape (rows,), int64; never a token of weight 0.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding could make the product the total itself, beyond the last token that has any weight.
    point = torch.minimum(torch.rand_like(total) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)
