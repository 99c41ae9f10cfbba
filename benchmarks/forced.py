"""Responses of one length on all sides: every draw is made, paid for, and replaced by what the script says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.problem import FIRST_WORD, PAD


def script_of(rows: list[dict[str, list[int]]], width: int | None = None) -> Tensor:
    """The responses to these prompts, EOS last. Shape (rows, ``width`` or longest), int64.

    Args:
        rows: With ``chosen_ids``.
        width: Of a side that goes on after EOS: its rows are filled up with words instead of padding.
    """
    responses = [row["chosen_ids"] for row in rows]
    longest = width or max(map(len, responses))
    filler = FIRST_WORD if width else PAD
    return torch.tensor([[*ids, *[filler] * (longest - len(ids))] for ids in responses])


@contextmanager
def multinomial_as_told(script: Tensor) -> Iterator[None]:
    """Make the draws of a ``generate`` those of the script, column by column; its rows are the script's rows."""
    draw, columns = torch.multinomial, iter(script.T)

    def multinomial(*args: Any, **kwargs: Any) -> Tensor:
        draw(*args, **kwargs)
        return next(columns)[:, None]

    with mock.patch.object(torch, "multinomial", multinomial):
        yield
