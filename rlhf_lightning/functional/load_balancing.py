"""The auxiliary loss of mixture models, which keeps all experts in use."""

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, mask: Tensor | None = None) -> Tensor:
    r"""Load-balancing loss over all layers at once, as transformers computes it.

    .. math:: L = E \sum_{i=1}^{E} f_i P_i

    :math:`f_i` is the share of (layer, token) pairs that are sent to expert i, and :math:`P_i` the mean probability that the
    router gives it. Routing that is even has the least loss, ``top_k``; only :math:`P` carries a gradient.

    Args:
        router_logits: Of each layer. Shape (tokens, experts).
        top_k: Experts that a token is sent to.
        mask: True on the tokens that count; None for all. Shape (tokens,), bool.

    Returns:
        Scalar, float32.

    Source: Fedus et al. 2021 (Switch Transformer), eq. 4-6, https://arxiv.org/abs/2101.03961
    """
    logits = torch.cat([layer if mask is None else layer[mask] for layer in router_logits]).float()
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    sent = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0).mean(0)
    return logits.shape[1] * (sent * probabilities.mean(0)).sum()
