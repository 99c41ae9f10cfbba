"""Batches of prompts with several responses each, and dynamic sampling: go on until enough prompts are worth learning from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.functional.groups import without_signal
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rollouts.collect import Responses


def some_prompts(batch: PromptBatch, rows: list[int]) -> PromptBatch:
    """These rows of a batch, in this order, as often as they are named."""
    index = torch.tensor(rows, device=batch.input_ids.device)
    columns = {name: [values[row] for row in rows] for name, values in batch.columns.items()}
    return PromptBatch(
        batch.input_ids[index], batch.attention_mask[index], [batch.prompts[row] for row in rows], columns
    )


def repeated(batch: PromptBatch, size: int) -> PromptBatch:
    """Every prompt so many times, one after the other."""
    return some_prompts(batch, [row for row in range(len(batch.prompts)) for _ in range(size)])


def prompts_of(responses: Responses, size: int) -> PromptBatch:
    """Each prompt once, where ``size`` responses to it stand one after the other."""
    width = responses.input_ids.shape[1] - responses.response_mask.shape[1]
    samples = responses.samples
    columns = {name: values[::size] for name, values in samples.columns.items()}
    ids, attention = (x[::size, :width] for x in (responses.input_ids, responses.attention_mask))
    return PromptBatch(ids, attention, samples.prompts[::size], columns)


def some_responses(responses: Responses, rows: list[int], width: int) -> Responses:
    """These rows, in this order, with response columns for ``width`` tokens: no fewer than there were."""
    index = torch.tensor(rows, device=responses.input_ids.device)
    more = width - responses.response_mask.shape[1]

    def cut(x: Tensor) -> Tensor:
        return F.pad(x[index], (0, more)) if x.dim() == 2 else x[index]

    tokens, logprobs, entropy = responses.drawn
    return Responses(
        input_ids=cut(responses.input_ids),
        attention_mask=cut(responses.attention_mask),
        sequence_mask=cut(responses.sequence_mask),
        response_mask=cut(responses.response_mask),
        truncated=cut(responses.truncated),
        drawn=Generation(
            cut(tokens), None if logprobs is None else cut(logprobs), None if entropy is None else cut(entropy)
        ),
        samples=responses.samples.rows(rows),
    )


def joined(parts: list[Responses]) -> Responses:
    """Responses to prompts of one width, one after the other."""
    width = max(part.response_mask.shape[1] for part in parts)
    wide = [some_responses(part, list(range(len(part.truncated))), width) for part in parts]
    samples = [part.samples for part in wide]

    def together(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in wide])

    def drawn(name: str) -> Tensor | None:
        found = [getattr(part.drawn, name) for part in wide]
        return None if found[0] is None else torch.cat(found)

    def listed(name: str) -> list[Any]:
        return [x for part in samples for x in getattr(part, name)]

    def column_of(part: Samples, name: str) -> list[Any]:
        return part.extra.get(name, [None] * len(part.prompts))

    names = {name: None for part in samples for name in part.extra}
    return Responses(
        input_ids=together("input_ids"),
        attention_mask=together("attention_mask"),
        sequence_mask=together("sequence_mask"),
        response_mask=together("response_mask"),
        truncated=together("truncated"),
        drawn=Generation(torch.cat([part.drawn.tokens for part in wide]), drawn("logprobs"), drawn("entropy")),
        samples=Samples(
            listed("prompts"),
            listed("completions"),
            listed("completion_ids"),
            listed("truncated"),
            {name: [x for part in samples for x in part.columns[name]] for name in samples[0].columns},
            {name: [x for part in samples for x in column_of(part, name)] for name in names},
            tuple(sorted({token for part in samples for token in part.dropped_tokens})),
            samples[0].decode,
        ),
    )


@dataclass(frozen=True)
class Drawn:
    """Groups of responses with their scores.

    Attributes:
        responses: Group by group.
        scores: Shape (responses,).
        prompts: How many were answered to find them.
    """

    responses: Responses
    scores: Tensor
    prompts: int


def draw_groups(
    batch: PromptBatch,
    size: int,
    wanted: int | None,
    draw: Callable[[PromptBatch], tuple[Responses, Tensor]],
    least: Callable[[int], int],
    processed: Callable[[Tensor, Tensor], Tensor],
) -> Drawn:
    """Sample a group for each prompt until ``wanted`` prompts have responses that differ in processed score.

    Every rank draws for as many prompts, and keeps as many, as every other.

    Args:
        batch: Prompts.
        size: Responses to each.
        wanted: Groups to find, in the order of the batch; where it holds too few, groups that agree fill up. None: all prompts.
        draw: Answers and scores a batch.
        least: The smallest of the ranks' numbers.
        processed: From raw scores and truncation, both of shape (responses,), to the scores that advantages are made of.
    """
    if wanted is None:
        return Drawn(*draw(repeated(batch, size)), prompts=len(batch.prompts))
    parts: list[Responses] = []
    scores: list[Tensor] = []
    differing: list[int] = []
    done = 0
    while (missing := -least(len(differing) - wanted)) > 0 and (left := least(len(batch.prompts) - done)) > 0:
        rows = list(range(done, done + min(missing, left)))
        responses, new = draw(repeated(some_prompts(batch, rows), size))
        parts.append(responses)
        scores.append(new)
        judged = processed(new.to(responses.truncated.device), responses.truncated)
        agree = without_signal(judged, torch.arange(len(new), device=judged.device) // size)[::size].tolist()
        differing += [row for row, same in zip(rows, agree, strict=True) if not same]
        done = rows[-1] + 1
    fill = [row for row in range(done) if row not in differing]
    kept = sorted([*differing, *fill][: min(wanted, done)])
    whole, index = joined(parts), [size * row + i for row in kept for i in range(size)]
    return Drawn(
        some_responses(whole, index, whole.response_mask.shape[1]),
        torch.cat(scores)[torch.tensor(index, device=scores[0].device)],
        prompts=done,
    )
