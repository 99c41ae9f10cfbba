"""The rollout buffer: everything one PPO iteration learns from, one row a response."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """Detached tensors; per-token ones are zero off the response. P is the prompt width, T the response width.

    Attributes:
        input_ids: Left-padded prompt, then right-padded response. Shape (batch, P + T), int64.
        attention_mask: True on real tokens. Same shape, bool.
        sequence_mask: True on response tokens up to and including EOS. Same shape, bool.
        response_mask: The last T columns of ``sequence_mask``. Shape (batch, T), bool.
        truncated: True where the response was cut off before EOS. Shape (batch,), bool.
        logprobs: Of the policy that sampled. Shape (batch, T), nats.
        ref_logprobs: Of the reference. Shape (batch, T), nats.
        entropy: Of the policy's distributions. Shape (batch, T), nats.
        values: Of the critic, before each token. Shape (batch, T).
        scores: Raw rewards of whole responses. Shape (batch,).
        groups: Which prompt of the batch each row answers. Shape (batch,), int64.
        baselines: Score of the greedy response to the same prompt; zeros where nobody asked for it. Shape (batch,).
        advantages: What the policy gradient is weighted with; zeros until they are computed. Shape (batch, T).
        returns: The critic's targets; zeros until they are computed. Shape (batch, T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    sequence_mask: Tensor
    response_mask: Tensor
    truncated: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    groups: Tensor
    baselines: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def with_advantages(self, advantages: Tensor, returns: Tensor) -> "Rollout":
        """The same rollout with what the update needs."""
        return replace(self, advantages=advantages, returns=returns)

    def rows(self, index: Tensor) -> "Rollout":
        """Some of the rows, in this order."""
        return Rollout(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def trimmed(self) -> "Rollout":
        """Without the columns before the first token of any prompt and after the last counted token of any response.

        One response column stays where no token counts, so that slices from the end keep their meaning.
        """
        prompt_width = self.input_ids.shape[1] - self.response_mask.shape[1]
        left = min(int(self.attention_mask.any(dim=0).long().argmax()), prompt_width)
        counted = self.response_mask.any(dim=0).nonzero()
        width = int(counted[-1]) + 1 if len(counted) else 1
        cut: dict[str, Tensor] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("input_ids", "attention_mask", "sequence_mask"):
                value = value[:, left : prompt_width + width]
            elif value.dim() == 2:
                value = value[:, :width]
            cut[f.name] = value
        return Rollout(**cut)

    def minibatches(
        self, size: int, generator: torch.Generator, most: int | None = None, together: int = 1
    ) -> Iterator["Rollout"]:
        """The rows in a fresh random order, ``size`` at a time; the last may be smaller, or larger if there are ``most``.

        So many rows as ``together`` says stay side by side: those of one prompt, which is then read once.
        """
        order = shuffled(len(self), generator, together).to(self.input_ids.device)
        for index in parts(order, size, most):
            yield self.rows(index)

    def micro_batches(self, size: int, most: int | None = None) -> Iterator["Rollout"]:
        """Consecutive rows, ``size`` at a time as in :meth:`minibatches`, each trimmed to its own width."""
        for index in parts(torch.arange(len(self), device=self.input_ids.device), size, most):
            yield self.rows(index).trimmed()


def shuffled(rows: int, generator: torch.Generator, together: int = 1) -> Tensor:
    """A fresh random order of ``rows`` rows, of which each ``together`` neighbours stay side by side. Shape (rows,), int64."""
    firsts = together * torch.randperm(rows // together, generator=generator)
    return (firsts[:, None] + torch.arange(together)).flatten()


def parts(rows: Tensor, size: int, most: int | None = None) -> list[Tensor]:
    """Pieces of ``size``; were there more than ``most``, the last one takes what is left: another rank has a row less."""
    pieces = list(rows.split(size))
    return pieces if most is None else [*pieces[: most - 1], torch.cat(pieces[most - 1 :])]
