"""Attention that knows its rows, put into stock transformers models through their attention interface.

The model sees one long row of tokens. Which of them belong together, and which keys and values lie behind them already, is
known to the object that is handed down as ``rows``: a :class:`Rows`.
"""

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_lightning.models.packing import Continuation, Packing, Run, pack

log = logging.getLogger(__name__)

NAME = "rlhf_rows"


class Rows(ABC):
    """Which tokens of the one long row see which."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Attention of one layer.

        Args:
            layer: Its number.
            query: Shape (tokens, heads, head size).
            key: Shape (tokens, key heads, head size).
            value: As ``key``.
            scaling: Of the scores; None for 1 / sqrt(head size).
            window: A token sees so many tokens, itself included; None for all before it.

        Returns:
            Shape (tokens, heads, head size).
        """


class PackedRows(Rows):
    """Whole rows, one behind the other, causal within each; and behind them what goes on from a row that others share."""

    def __init__(self, packing: Packing) -> None:
        self.runs, self.continuations = packing.runs, packing.continuations
        # Tensors are split, not sliced: the gradient of each slice is a tensor as long as the whole.
        self.sizes = [run.rows * run.length for run in self.runs] + [piece.length for piece in self.continuations]
        starts = [(run.start + i * run.length, run.length) for run in self.runs for i in range(run.rows)]
        self.rows = [length for _, length in starts]
        self.row_at = {start: number for number, (start, _) in enumerate(starts)}
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}  # of all layers

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return self._varlen(query, key, value, scaling, window)
        own = [x.split(self.sizes) for x in (query, key, value)]
        parts = [_causal(q, k, v, run, scaling, window) for q, k, v, run in zip(*own, self.runs, strict=False)]
        if self.continuations:
            rest = len(key) - sum(self.rows)
            heads = [x.split([*self.rows, rest]) for x in (key, value)]
            behind = (x[len(self.runs) :] for x in own)
            for q, k, v, piece in zip(*behind, self.continuations, strict=True):
                if piece.prompt_length:
                    row = self.row_at[piece.prompt]
                    k, v = torch.cat([heads[0][row], k]), torch.cat([heads[1][row], v])
                parts.append(self._continued(q, k, v, piece, scaling, window))
        return torch.cat(parts)

    def _continued(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        piece: Continuation,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """What goes on from a prompt, over the prompt and itself."""
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        mask, shared = self._mask(piece, window, q.device), q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=shared)
        return out[0].transpose(0, 1)

    def _mask(self, piece: Continuation, window: int | None, device: torch.device) -> Tensor:
        """True where a token of the continuation sees one of the prompt or of its own. Shape (length, both lengths)."""
        length, before = piece.length, piece.prompt_length
        if (length, before, window) not in self._masks:
            seen = torch.ones((length, before + length), dtype=torch.bool, device=device).tril(before)
            self._masks[length, before, window] = seen if window is None else seen.triu(before + 1 - window)
        return self._masks[length, before, window]

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """One flash-attention kernel over all rows, which half precision on a GPU has; it is causal from the end on."""
        rows = [(run.start + i * run.length, run.length) for run in self.runs for i in range(run.rows)]
        queries = [length for _, length in rows] + [piece.length for piece in self.continuations]
        keys = [length for _, length in rows] + [piece.prompt_length + piece.length for piece in self.continuations]
        if self.continuations:
            seen = [torch.arange(start, start + length) for start, length in rows]
            for piece in self.continuations:
                seen.append(torch.arange(piece.prompt, piece.prompt + piece.prompt_length))
                seen.append(torch.arange(piece.start, piece.start + piece.length))
            index = torch.cat(seen).to(key.device, non_blocking=True)
            key, value = key[index], value[index]
        from_query, from_key = (
            torch.tensor([0, *x]).cumsum(0).to(query.device, torch.int32, non_blocking=True) for x in (queries, keys)
        )
        behind = -1 if window is None else window - 1
        shared = query.shape[1] != key.shape[1]
        longest = max(queries), max(keys)
        out = varlen_attn(
            query, key, value, from_query, from_key, *longest, scale=scaling, window_size=(behind, 0), enable_gqa=shared
        )
        assert isinstance(out, Tensor)
        return out


def _causal(query: Tensor, key: Tensor, value: Tensor, run: Run, scaling: float | None, window: int | None) -> Tensor:
    """Rows of one length are a batch without padding: the causal kernel needs no mask."""
    q, k, v = (x.unflatten(0, (run.rows, run.length)).transpose(1, 2) for x in (query, key, value))
    mask = None
    if window is not None and run.length > window:
        mask = torch.ones(run.length, run.length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    shared = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
    )
    return out.transpose(1, 2).flatten(0, 1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rows: Rows | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a model calls: ``rows`` where there are any, else transformers' own SDPA.

    Args:
        module: The attention layer.
        query: Shape (batch, heads, tokens, head size); the batch is 1 where there are ``rows``.
        key: Shape (batch, key heads, tokens, head size).
        value: As ``key``.
        attention_mask: Not looked at where there are ``rows``.
        scaling: Of the scores; None for 1 / sqrt(head size).
        rows: Which tokens see which.
        sliding_window: A token sees so many tokens, itself included; None for all before it.
        kwargs: The model's own.

    Returns:
        Shape (batch, tokens, heads, head size), and None for the weights that nobody asked for.
    """
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unknown)} is not known here")
    layer: Any = module.layer_idx
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return rows.attend(layer, q, k, v, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def knows_rows(network: PreTrainedModel) -> bool:
    """Whether :func:`over_rows` may be called with this network."""
    return network.config.get_text_config()._attn_implementation == NAME


def over_rows(network: PreTrainedModel, tokens: Tensor, positions: Tensor, rows: Rows) -> Tensor:
    """The trunk over one long row of tokens.

    Args:
        network: A causal model with a head of any kind.
        tokens: Shape (tokens,), int64.
        positions: Of each in its own row, from 0. Same shape.
        rows: Which of them see which.

    Returns:
        Last hidden states. Shape (tokens, hidden).
    """
    # A mask of four dimensions is handed on as it is: the model must not make a quadratic one of its own.
    none = tokens.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    output = network.base_model(
        input_ids=tokens[None], position_ids=positions[None], attention_mask=none, use_cache=False, rows=rows
    )
    return output.last_hidden_state[0]


@torch.no_grad()
def use_rows(network: PreTrainedModel) -> None:
    """Let a network take rows end to end, if that gives what each row gives alone; say aloud where it does not.

    Only in place of SDPA, which is what transformers chooses by itself: where another attention was asked for it stays.
    """
    config = network.config.get_text_config()
    weight: Any = network.get_input_embeddings().weight
    if config._attn_implementation != "sdpa" or weight.device.type == "meta":
        return
    ids = (torch.arange(18, device=weight.device) * 7 % config.vocab_size).view(3, 6)
    mask = torch.arange(6, device=weight.device) < torch.tensor([4, 6, 6], device=weight.device)[:, None]
    alone = network.base_model(input_ids=ids, use_cache=False).last_hidden_state[mask]
    network.set_attn_implementation(NAME)
    try:
        packing = pack(mask)
        tokens = ids.flatten()[packing.places]
        together = over_rows(network, tokens, packing.positions, PackedRows(packing))[packing.at[mask]]
        same = torch.allclose(alone.float(), together.float(), rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    except (ValueError, TypeError, RuntimeError):  # no attention from outside, or not with such arguments
        same = False
    if not same:
        network.set_attn_implementation("sdpa")
        log.warning(
            "%s does not keep rows apart that are laid end to end: its batches stay padded, and cost what padding costs "
            "(data.bucket_batches sorts rows by length)",
            type(network).__name__,
        )
