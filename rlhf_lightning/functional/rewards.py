"""From one score a response to one reward a token: the missing-EOS rule, the clip, the KL penalty and what length costs."""

import torch
from torch import Tensor

from rlhf_lightning.functional.kl import kl_k1
from rlhf_lightning.functional.masked import last_true


def process_scores(scores: Tensor, truncated: Tensor, *, missing_eos_penalty: float, clip: float | None) -> Tensor:
    """Clip the scores, then take the penalty off those of responses that never ended.

    Args:
        scores: Raw scores. Shape (batch,), float32.
        truncated: True where a response was cut off before EOS. Shape (batch,), bool.
        missing_eos_penalty: Subtracted from the score of a truncated response, >= 0.
        clip: Scores are clipped to [-clip, clip] first; None leaves them.

    Returns:
        Shape (batch,).
    """
    clipped = scores if clip is None else scores.clamp(-clip, clip)
    return torch.where(truncated, clipped - missing_eos_penalty, clipped)


def soft_overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    r"""A penalty that grows over the last tokens that a response may have, so that there is something to learn before the cut.

    .. math:: p(n) = \mathrm{clip}\left(\frac{L - c - n}{c}, -1, 0\right)

    Args:
        lengths: n, tokens of each response. Shape (batch,), any number type.
        max_length: L, from which on the penalty is whole.
        buffer: c, tokens over which it grows, from 1 to L.

    Returns:
        Shape (batch,), float32, from -1 to 0.

    Source: Yu et al. 2025 (DAPO), eq. 13, https://arxiv.org/abs/2503.14476
    """
    return ((max_length - buffer - lengths.float()) / buffer).clamp(-1, 0)


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    r"""The KL penalty on every token and the score on the last one.

    .. math:: r_t = -\beta \left(\log\pi(y_t) - \log\pi_{ref}(y_t)\right) + [t = T]\, s

    k1 in the reward, because its expected policy gradient is exactly that of the KL (see :mod:`.kl`).

    Args:
        scores: Of whole responses. Shape (batch,).
        logprobs: Of the policy that sampled. Shape (batch, length), nats.
        ref_logprobs: Of the reference, at the same temperature. Same shape.
        mask: True on response tokens up to and including EOS. Same shape, bool.
        kl_coef: beta, >= 0.

    Returns:
        Shape (batch, length), zero where masked; each row sums to score - beta * KL.

    Source: Ouyang et al. 2022, eq. 2, https://arxiv.org/abs/2203.02155
    """
    penalty = -kl_coef * kl_k1(logprobs - ref_logprobs)
    rewards = penalty.masked_fill(~mask, 0)
    return rewards.scatter_add(1, last_true(mask)[:, None], scores[:, None].to(rewards.dtype))


def adaptive_kl_coef(coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    r"""One step of the proportional controller that steers the KL to a target.

    .. math:: \beta \leftarrow \beta \left(1 + \mathrm{clip}(KL / KL^* - 1, -0.2, 0.2)\, n / h\right)

    Args:
        coef: beta before the step, > 0.
        kl: Mean KL of a whole response in this iteration, nats.
        target: KL*, nats, > 0.
        horizon: h, in episodes: how many it takes to react in full.
        episodes: n, responses in this iteration.

    Returns:
        beta after the step.

    Source: Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)
