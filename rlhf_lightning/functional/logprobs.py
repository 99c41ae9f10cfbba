"""Log-probabilities and entropies of tokens from logits, in float32 whatever the model computes in."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Log-probability of each token under the logits that predict it.

    .. math:: \log \pi(y_t) = z_{y_t} / \tau - \log \sum_v e^{z_v / \tau}

    Args:
        logits: Logits at the position *before* each token. Shape (..., vocabulary), any float type; cast to float32
            first, for a bfloat16 softmax is off by 1e-2 a token.
        tokens: Ids of the tokens. Shape (...), int64.
        temperature: Sampling temperature, > 0. Use the one that the tokens were sampled with.

    Returns:
        Shape (...), float32.

    Source: softmax with temperature; the cast is that of algorithms in TRL, OpenRLHF and verl alike.
    """
    return log_softmax(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax over the last axis, in float32 (or in float64 if that is what comes in).

    Raises:
        ValueError: If ``temperature`` is not positive (greedy decoding has no distribution to differentiate).
    """
    if temperature <= 0:
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
    return torch.where(mask, logprobs, 0).sum(dim=-1)


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
