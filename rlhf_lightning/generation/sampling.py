"""Drawing a token from the logits of a position."""

import torch
from torch import Tensor

from rlhf_lightning.generation.engine import SamplingParameters


class LogitsRules:
    """Repetition penalty and minimum length, applied to the logits of the rows that are still being generated.

    Source: ``RepetitionPenaltyLogitsProcessor`` (Keskar et al. 2019, arXiv 1909.05858) and
    ``MinNewTokensLengthLogitsProcessor`` of transformers. Unlike there, padding does not count as a token of the prompt: a
    response must not depend on the length of its neighbours.
    """

    def __init__(
        self,
        sampling: SamplingParameters,
        input_ids: Tensor,
        attention_mask: Tensor,
        vocabulary: int,
        eos_ids: list[int],
    ) -> None:
        """Args:
        sampling: Its ``repetition_penalty`` and ``min_new_tokens``; the rules change nothing where both are off.
        input_ids: Prompts. Shape (rows, prompt_length), int64.
        attention_mask: True on real tokens. Same shape.
        vocabulary: Length of a row of logits.
        eos_ids: Tokens that end a response; those outside the vocabulary are ignored.
        """
        self.penalty, self.least = sampling.repetition_penalty, sampling.min_new_tokens
        self.ends = torch.tensor([i for i in eos_ids if i < vocabulary], dtype=torch.long, device=input_ids.device)
        self.seen = seen_tokens(input_ids, attention_mask, vocabulary) if self.penalty != 1 else None

    def apply(self, logits: Tensor, step: int) -> Tensor:
        """Logits to draw from, shape (rows, vocabulary); those that came in where no rule applies.

        Args:
            logits: Of the next token of each active row. Shape (rows, vocabulary).
            step: Index of that token in the response, from 0.
        """
        if self.seen is not None:
            logits = penalized(logits, self.seen, self.penalty)
        if step < self.least:
            logits = logits.index_fill(-1, self.ends, -torch.inf)
        return logits

    def saw(self, tokens: Tensor) -> None:
        """Note the new token of each active row. Shape (rows,), int64."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)

    def keep(self, rows: Tensor) -> None:
        """Keep only these of the active rows, in this order. Shape (still active,), int64."""
        if self.seen is not None:
            self.seen = self.seen[rows]


def seen_tokens(input_ids: Tensor, attention_mask: Tensor, vocabulary: int) -> Tensor:
    """Tokens that occur in each row, padding aside.

    Args:
        input_ids: Shape (rows, length), int64.
        attention_mask: True on real tokens. Same shape.
        vocabulary: Number of token ids.

    Returns:
        Shape (rows, vocabulary), bool.
    """
    seen = torch.zeros(len(input_ids), vocabulary + 1, dtype=torch.bool, device=input_ids.device)
    return seen.scatter_(1, input_ids.masked_fill(~attention_mask.bool(), vocabulary), True)[:, :vocabulary]


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with positive values of seen tokens divided by the penalty and negative ones multiplied by it.

    Args:
        logits: Shape (rows, vocabulary).
        seen: Tokens to penalize. Same shape, bool.
        penalty: Above 1 makes repetition less likely, below 1 more.

    Returns:
        Same shape, float32.
    """
    wide = logits.float()
    return torch.where(seen, torch.where(wide < 0, wide * penalty, wide / penalty), wide)


def filtered(probabilities: Tensor, sampling: SamplingParameters) -> Tensor:
    """Weights to draw with: the probabilities of the tokens that top-k, top-p and min-p leave; not normalised.

    Args:
        probabilities: Temperature applied. Shape (rows, vocabulary).
        sampling: ``top_k`` is applied first, then ``top_p`` to what it leaves, then ``min_p``, as in transformers.

    Returns:
        Same shape, >= 0.
    """
    weights = probabilities
    if sampling.top_k:
        kept = weights.topk(min(sampling.top_k, weights.shape[-1]), dim=-1).indices  # exactly k, also of equal ones
        weights = torch.zeros_like(weights).scatter(-1, kept, weights.gather(-1, kept))
    if sampling.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        beyond = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        weights = weights.masked_fill(beyond.scatter(-1, order, beyond), 0)
    if sampling.min_p:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0)
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
