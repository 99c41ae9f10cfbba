"""Hold out prompts, not rows: all rows of one prompt fall on one side, whatever their order and number."""

import hashlib
import json
from typing import Any

import numpy as np
from datasets import Dataset

from rlhf_lightning.errors import UserError


def prompt_key(prompt: Any) -> str:
    """A name for a prompt (text or messages) that is the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def row_key(row: dict[str, Any]) -> str:
    """The key of a canonical row's prompt: of its conversation before the last turn, or its text, where it has none."""
    if "prompt" in row:
        return prompt_key(row["prompt"])
    return prompt_key(row["messages"][:-1] if "messages" in row else row["text"])


def key_columns(rows: Dataset) -> list[str]:
    """The columns that :func:`row_key` reads."""
    return [name for name in ("prompt", "messages", "text") if name in rows.column_names]


def split_by_prompt(dataset: Dataset, fraction: float, seed: int, level: int = 0) -> tuple[Dataset, Dataset]:
    """Divide canonical rows into training and validation.

    A prompt is held out when a hash of it and of the seed is below ``fraction``; so new rows move no old one. Either
    side may come out empty when there are few prompts.

    Args:
        dataset: Canonical rows with ``prompt``, ``messages`` or ``text``.
        fraction: Share of the prompts that is held out, in [0, 1).
        seed: Another seed, another choice.
        level: How many splits the prompts have been through; at another level, another choice.

    Raises:
        UserError: If ``fraction`` is out of range.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the share to hold out is {fraction}; it must be in [0, 1)")
    rows = dataset.select_columns(key_columns(dataset))
    salt = f"level {level}:" if level else ""
    held_out = np.fromiter(
        (is_held_out(salt + row_key(row), fraction, seed) for row in rows), dtype=bool, count=len(rows)
    )
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def is_held_out(key: str, fraction: float, seed: int) -> bool:
    """Whether the hash of key and seed, as a number in [0, 1), is below ``fraction``."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction
