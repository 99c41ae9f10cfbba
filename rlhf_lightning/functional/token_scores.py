"""What the logits of a position say of the token that follows, and the gradient of that, without autograd's copies.

A model's head makes a row of logits as long as the vocabulary for each token. Autograd would keep several copies of them
until the backward pass; here the probabilities are the one thing that is kept, and the gradient is made in their place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST = -1e30  # nats; a probability of zero for every purpose


class TokenScores(NamedTuple):
    """Of each token, given the logits before it.

    Attributes:
        logprobs: Shape (n,), float32 (float64 if the logits are), nats.
        entropy: Of the distribution over the next token; same shape, nats.
        greedy: Whether no token is more likely; same shape, bool.
        mean_logit: Mean raw logit over the vocabulary; same shape.
        collisions: Log of the chance that two draws agree, log sum of p^2; same shape, nats; None unless asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    greedy: Tensor
    mean_logit: Tensor
    collisions: Tensor | None = None


def token_scores(
    logits: Tensor, tokens: Tensor, *, temperature: float, collisions: bool = False, missing: Tensor | None = None
) -> tuple[TokenScores, Tensor]:
    r"""Score one token a row, and keep what its gradient needs.

    .. math:: \log \pi(y) = z_y / \tau - \log \sum_v e^{z_v / \tau} \qquad H = -\sum_v p_v \log p_v \qquad C = \log \sum_v p_v^2

    Args:
        logits: Raw logits before the token. Shape (n, vocabulary), any float type; computed with in float32 at least.
        tokens: Shape (n,), int64.
        temperature: That the tokens were sampled with, > 0.
        collisions: Whether to compute C.
        missing: Ids that no token has: their probability is zero, and they are not in the mean logit. Shape (m,), int64.

    Returns:
        The scores, and the log-probabilities of the whole vocabulary, finite, shape (n, vocabulary).

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: softmax with temperature; Shannon 1948 for the entropy.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mean = wide.mean(-1)
    if missing is not None:
        mean = (wide.sum(-1) - wide[:, missing].sum(-1)) / (wide.shape[-1] - len(missing))
        logits = wide = wide.index_fill(-1, missing, -torch.inf)
    log_probs = torch.log_softmax(wide / temperature if temperature != 1.0 else wide, dim=-1)
    logprobs = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
    # A logit of minus infinity is a probability of zero, which has no surprise to add: 0 times a number, not times infinity.
    log_probs.clamp_(min=LEAST)
    p = log_probs.exp()
    entropy = -torch.linalg.vecdot(p, log_probs)
    agree = torch.linalg.vecdot(p, p).log() if collisions else None
    greedy = logits.gather(-1, tokens[:, None]).squeeze(-1) == logits.amax(-1)
    return TokenScores(logprobs, entropy, greedy, mean, agree), log_probs


def logit_gradient(
    log_probs: Tensor,
    tokens: Tensor,
    logprob_grad: Tensor,
    entropy: Tensor,
    entropy_grad: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    r"""Gradient of a loss with respect to the logits, written over ``log_probs``.

    .. math:: \frac{\partial L}{\partial z_v} = \frac{1}{\tau} \left[ g \, (1_{v=y} - p_v) - h \, p_v (\log p_v + H) \right]

    Args:
        log_probs: From :func:`token_scores`; its memory becomes the result's. Shape (n, vocabulary).
        tokens: Shape (n,), int64.
        logprob_grad: :math:`g = \partial L / \partial \log \pi(y)`. Shape (n,).
        entropy: :math:`H`. Shape (n,).
        entropy_grad: :math:`h = \partial L / \partial H`. Shape (n,); None where the entropy carries no gradient.
        temperature: As there.

    Returns:
        Shape (n, vocabulary).

    Source: derivative of log-softmax and of the entropy of a softmax.
    """
    weight = -logprob_grad[:, None]
    if entropy_grad is not None:
        weight = weight - entropy_grad[:, None] * (log_probs + entropy[:, None])
    gradient = log_probs.exp_().mul_(weight)
    gradient.scatter_add_(-1, tokens[:, None], logprob_grad[:, None].to(gradient.dtype))
    return gradient.div_(temperature) if temperature != 1.0 else gradient
