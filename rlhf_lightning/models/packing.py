"""Padding taken out: the rows of a batch laid end to end, so that no matrix product meets a token that is none."""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Neighbouring rows of equal length: ``rows`` of them, from token ``start`` on, each ``length`` tokens long."""

    start: int
    rows: int
    length: int


class Continuation(NamedTuple):
    """``length`` tokens from ``start`` on, which go on from the ``prompt_length`` tokens that begin at ``prompt``."""

    start: int
    length: int
    prompt: int
    prompt_length: int


class Packing(NamedTuple):
    """Where the tokens of a padded batch are laid.

    Attributes:
        places: Their places in the flattened batch. Shape (tokens,), int64.
        positions: Place of each in its own row, from 0. Shape (tokens,), int64.
        runs: Rows, short ones first, those of one length together.
        continuations: What follows on a prompt that several rows share, and that is one of the ``runs``.
        at: Where the token of each place went; meaningless where there is none. Shape (batch, length), int64.
    """

    places: Tensor
    positions: Tensor
    runs: tuple[Run, ...]
    continuations: tuple[Continuation, ...]
    at: Tensor


def pack(attention_mask: Tensor) -> Packing:
    """Plan how the rows are laid end to end.

    Args:
        attention_mask: True on real tokens. Shape (batch, length), bool; padded on any side.
    """
    lengths, order = attention_mask.sum(dim=1).sort(stable=True)
    flat = attention_mask[order].flatten().nonzero().squeeze(1)
    row, column = flat // attention_mask.shape[1], flat % attention_mask.shape[1]
    places = order[row] * attention_mask.shape[1] + column
    tokens = torch.arange(len(places), device=places.device)
    positions = tokens - (lengths.cumsum(0) - lengths)[row]
    at = places.new_zeros(attention_mask.numel()).scatter_(0, places, tokens).view(attention_mask.shape)
    return Packing(places, positions, _runs(lengths.tolist()), (), at)


def pack_with_shared_prompts(
    input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, shortest: int = 1
) -> Packing:
    """Plan the same with one copy of a prompt that several rows begin with.

    Args:
        input_ids: Shape (batch, length), int64.
        attention_mask: True on real tokens. Same shape, bool.
        response_mask: What stands before its first True is a row's prompt. Same shape, bool.
        shortest: Prompts of fewer tokens are laid once a row all the same.
    """
    groups = _groups(input_ids, attention_mask, response_mask, shortest)
    if all(len(rows) == 1 for _, rows in groups):
        return pack(attention_mask)
    width, lengths = attention_mask.shape[1], attention_mask.sum(dim=1).tolist()
    starts = attention_mask.long().argmax(dim=1).tolist()
    # Whole rows, and the prompts that are shared, from the first row that has them: all are rows to a causal kernel.
    whole = [(rows[0], len(prompt) if len(rows) > 1 else lengths[rows[0]]) for prompt, rows in groups]
    whole = sorted((row for row in whole if row[1]), key=lambda row: row[1])
    pieces, spans, begins, end = [], [], {}, 0
    for row, length in whole:
        spans.append((row, starts[row], length, 0))
        begins[row] = end
        end += length
    for prompt, rows in groups:
        for row in rows if len(rows) > 1 else []:
            rest = lengths[row] - len(prompt)
            spans.append((row, starts[row] + len(prompt), rest, len(prompt)))
            if rest:
                pieces.append(Continuation(end, rest, begins.get(rows[0], 0), len(prompt)))
            end += rest
    device = attention_mask.device
    places = torch.cat([torch.arange(n) + row * width + first for row, first, n, _ in spans]).to(device)
    positions = torch.cat([torch.arange(n) + before for _, _, n, before in spans]).to(device)
    at = places.new_zeros(attention_mask.numel()).scatter_(0, places, torch.arange(len(places), device=device))
    at = at.view(attention_mask.shape)
    for prompt, rows in groups:
        shared = at[rows[0], starts[rows[0]] : starts[rows[0]] + len(prompt)].clone()
        for row in rows[1:]:
            at[row, starts[row] : starts[row] + len(prompt)] = shared
    return Packing(places, positions, _runs([length for _, length in whole]), tuple(pieces), at)


def left_aligned(attention_mask: Tensor) -> Tensor:
    """Where to read each column of a padded batch so that every row begins in the first column.

    Args:
        attention_mask: True on real tokens. Shape (batch, length), bool; padded on any side.

    Returns:
        Column of each token, padding last. Same shape, int64.
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns + attention_mask.long().argmax(dim=1)[:, None]) % attention_mask.shape[1]


def _groups(
    input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, shortest: int
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Each prompt with the rows that share it: a row alone where its prompt is too short to be shared."""
    before = attention_mask & (response_mask.cumsum(dim=1) == 0)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, prompt) in enumerate(zip(input_ids.tolist(), before.tolist(), strict=True)):
        key = tuple(token for token, real in zip(ids, prompt, strict=True) if real)
        groups.setdefault(key, []).append(row)
    shared = [(prompt, rows) for prompt, rows in groups.items() if len(prompt) >= shortest]
    return shared + [(prompt, [row]) for prompt, rows in groups.items() if len(prompt) < shortest for row in rows]


def _runs(lengths: list[int]) -> tuple[Run, ...]:
    runs, start = [], 0
    for length, same in groupby(length for length in lengths if length):
        rows = len(list(same))
        runs.append(Run(start, rows, length))
        start += rows * length
    return tuple(runs)
