"""Rows to typed batches: padding to the longest row of the batch, and nothing else."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_lightning.batches import PreferenceBatch, PromptBatch, SequenceBatch, StepwiseBatch, UnpairedBatch
from rlhf_lightning.data.sampler import BatchPlan

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls them


class PlannedRows:
    """A dataset that is indexed by a :class:`BatchPlan` and hands its normaliser on to the collator."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, plan: BatchPlan) -> tuple[dict[str, list[Any]], float]:
        return self.dataset[plan.rows], plan.normalizer


@dataclass(frozen=True)
class SequenceCollator:
    """Demonstrations: ``input_ids``, ``response_mask`` and, where there is one, ``weight`` of each row."""

    pad_id: int

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> SequenceBatch:
        columns, normalizer = planned
        ids, attention = pad_right(columns["input_ids"], self.pad_id)
        mask, _ = pad_right(columns["response_mask"], 0)
        divisor, weights = torch.tensor(normalizer, dtype=torch.float32), row_weights(columns)
        return SequenceBatch(ids, attention, mask.bool(), divisor, weights)


@dataclass(frozen=True)
class PreferenceCollator:
    """Pairs: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``margin`` of each row; where there are any,
    ``chosen_skips`` and ``rejected_skips``, see :class:`.encoding.Response`.
    """

    pad_id: int

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> PreferenceBatch:
        columns, normalizer = planned
        prompts = columns["prompt_ids"] * 2
        responses = columns["chosen_ids"] + columns["rejected_ids"]
        ids, attention = pad_right([p + r for p, r in zip(prompts, responses, strict=True)], self.pad_id)
        starts = torch.tensor([len(p) for p in prompts])[:, None]
        return PreferenceBatch(
            input_ids=ids,
            attention_mask=attention,
            response_mask=without_skips(
                attention & (torch.arange(ids.shape[1]) >= starts),
                starts,
                columns.get("chosen_skips", []) + columns.get("rejected_skips", []),
            ),
            margin=torch.tensor(columns["margin"], dtype=torch.float32),
            normalizer=torch.tensor(normalizer, dtype=torch.float32),
            reference_logps=self._reference(columns),
            probability=optional(columns, "chosen_probability"),
            weight=optional(columns, "weight"),
        )

    @staticmethod
    def _reference(columns: dict[str, list[Any]]) -> Tensor | None:
        """Of the chosen, then of the rejected responses; None where the rows have none."""
        if any(name not in columns for name in REFERENCE_COLUMNS):
            return None
        chosen, rejected = (torch.tensor(columns[name], dtype=torch.float32) for name in REFERENCE_COLUMNS)
        return torch.cat([chosen, rejected])


@dataclass(frozen=True)
class UnpairedCollator:
    """Single responses: ``prompt_ids``, ``completion_ids`` and ``label`` of each row, and every prompt with another's response;
    where there are any, ``completion_skips``, see :class:`.encoding.Response`.

    Attributes:
        pad_id: What fills short rows.
        max_length: Where a prompt with another's response ends at the latest; they were never measured together.
    """

    pad_id: int
    max_length: int

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> UnpairedBatch:
        columns, normalizer = planned
        prompts, own = columns["prompt_ids"], columns["completion_ids"]
        others = [y[: self.max_length - len(x)] for x, y in zip(prompts, own[-1:] + own[:-1], strict=True)]
        ids, attention = pad_right([p + r for p, r in zip(prompts * 2, own + others, strict=True)], self.pad_id)
        starts = torch.tensor([len(p) for p in prompts * 2])[:, None]
        skips = columns.get("completion_skips", [])
        return UnpairedBatch(
            input_ids=ids,
            attention_mask=attention,
            response_mask=without_skips(
                attention & (torch.arange(ids.shape[1]) >= starts), starts, skips + skips[-1:] + skips[:-1]
            ),
            label=torch.tensor(columns["label"], dtype=torch.bool),
            normalizer=torch.tensor(normalizer, dtype=torch.float32),
        )


@dataclass(frozen=True)
class StepwiseCollator:
    """Solutions: ``input_ids``, ``prompt_length``, ``label_at`` and ``labels`` of each row."""

    pad_id: int

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> StepwiseBatch:
        columns, normalizer = planned
        ids, attention = pad_right(columns["input_ids"], self.pad_id)
        step_mask, labels = torch.zeros_like(attention), torch.zeros(ids.shape, dtype=torch.float32)
        for row, (places, values) in enumerate(zip(columns["label_at"], columns["labels"], strict=True)):
            step_mask[row, places] = True
            labels[row, places] = torch.tensor(values, dtype=torch.float32)
        return StepwiseBatch(
            input_ids=ids,
            attention_mask=attention,
            response_mask=attention & (torch.arange(ids.shape[1]) >= torch.tensor(columns["prompt_length"])[:, None]),
            step_mask=step_mask,
            labels=labels,
            normalizer=torch.tensor(normalizer, dtype=torch.float32),
        )


@dataclass(frozen=True)
class PromptCollator:
    """Prompts: ``prompt_ids``, ``prompt`` and whatever other columns there are."""

    pad_id: int

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> PromptBatch:
        columns, _ = planned
        flipped, attention = pad_right([row[::-1] for row in columns["prompt_ids"]], self.pad_id)
        others = {k: v for k, v in columns.items() if k not in ("prompt_ids", "prompt")}
        return PromptBatch(flipped.flip(1), attention.flip(1), columns["prompt"], others)


def without_skips(mask: Tensor, starts: Tensor, skips: list[list[int]]) -> Tensor:
    """A response mask without the turns that are not the assistant's.

    Args:
        mask: True on responses. Shape (batch, length), bool; changed in place.
        starts: Where each response begins. Shape (batch, 1), int64.
        skips: Of each row, start and stop in its response of what is not scored, one pair after the other; or nothing.
    """
    for row, own in enumerate(skips):
        begin = int(starts[row]) if own else 0
        for start, stop in zip(own[::2], own[1::2], strict=True):
            mask[row, begin + start : begin + stop] = False
    return mask


def optional(columns: dict[str, list[Any]], name: str) -> Tensor | None:
    """A column of numbers, where the rows have it."""
    return torch.tensor(columns[name], dtype=torch.float32) if name in columns else None


def row_weights(columns: dict[str, list[Any]]) -> Tensor | None:
    """What each row weighs in the loss; None where all weigh 1, or none is said to weigh anything. Shape (rows,), float32."""
    weights = torch.tensor(columns.get("weight", []), dtype=torch.float32)
    return weights if bool((weights != 1).any()) else None


def pad_right(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Stack rows of unequal length.

    Args:
        rows: Token ids, or the 0/1 of a mask.
        pad: What fills the short rows.

    Returns:
        The rows (batch, longest), int64, and True where they are real, bool: from lengths, never from the pad id.
    """
    padded = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
