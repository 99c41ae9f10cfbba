"""Log-probabilities and entropies of tokens from logits, in float32 whatever the model computes in."""

import torch
from torch import Tensor

from rlhf_lightning.functional.masked import masked_sum


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    r"""Log-probability of every token of the vocabulary, in float32 (or in float64 if that is what comes in).

    .. math:: \log \pi(v) = z_v / \tau - \log \sum_w e^{z_w / \tau}

    Args:
        logits: Logits at the position *before* a token. Shape (..., vocabulary), any float type; cast to float32 first,
            for a bfloat16 softmax is off by 1e-2 a token.
        temperature: Sampling temperature, > 0. Use the one that the tokens were sampled with.

    Returns:
        Same shape, nats.

    Raises:
        ValueError: If ``temperature`` is not positive (greedy decoding has no distribution to differentiate).

    Source: softmax with temperature; the cast is that of algorithms in TRL, OpenRLHF and verl alike.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature if temperature != 1.0 else wide, dim=-1)


def entropy(log_probs: Tensor) -> Tensor:
    r"""Shannon entropy of each distribution, in nats: :math:`-\sum_v p_v \log p_v`.

    Args:
        log_probs: Normalised log-probabilities. Shape (..., vocabulary); -inf is a probability of zero.

    Returns:
        Shape (...), in [0, log vocabulary].
    """
    p = log_probs.exp()
    return -torch.where(p > 0, p * log_probs, 0).sum(-1)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each whole response: the sum over its tokens, EOS included.

    Args:
        logprobs: Per-token log-probabilities. Shape (batch, length).
        mask: True on response tokens. Shape (batch, length), bool.

    Returns:
        Shape (batch,).
    """
    return masked_sum(logprobs, mask, dim=1)


def response_mask_from_tokens(responses: Tensor, eos_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mark what counts of freshly sampled responses: everything up to and including the first EOS.

    Args:
        responses: Sampled token ids, anything after EOS. Shape (batch, length), int64.
        eos_ids: Ids that end a response. Shape (n,), int64.

    Returns:
        The mask (batch, length), bool, and whether each response was cut off before any EOS (batch,), bool.
    """
    is_eos = torch.isin(responses, eos_ids)
    ended_before = is_eos.cumsum(dim=1) - is_eos.long() > 0
    return ~ended_before, ~is_eos.any(dim=1)
