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
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.length_rules import LengthRules, length_rules, trunk_of
from rlhf_lightning.models.packing import Continuation, Packing, Run, left_aligned, pack
from rlhf_lightning.models.routers import keep_router_loss, router_arguments
from rlhf_lightning.models.varlen import has_kernel, varlen_attention

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
            value: Shape (tokens, key heads, value head size).
            scaling: Of the scores; None for 1 / sqrt(head size).
            window: A token sees so many tokens, itself included; None for all before it.

        Returns:
            Shape (tokens, heads, value head size).
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
        if has_kernel(query, value):
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
        """One flash-attention kernel over all rows; it aligns the last query with the last key."""
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
        return varlen_attention(query, key, value, queries, keys, scaling, window)


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
        value: Shape (batch, key heads, tokens, value head size).
        attention_mask: Not looked at where there are ``rows``.
        scaling: Of the scores; None for 1 / sqrt(head size).
        rows: Which tokens see which.
        sliding_window: A token sees so many tokens, itself included; None for all before it.
        kwargs: The model's own.

    Returns:
        Shape (batch, tokens, heads, value head size), and None for the weights that nobody asked for.
    """
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unknown)} is not known here")
    layer: Any = module.layer_idx
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (_in_autocast_dtype(x) for x in (query, key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return rows.attend(layer, q, k, v, scaling, sliding_window)[None], None


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """What autocast's kernels would compute with. Rotary embeddings give float32 queries and keys beside half values."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def knows_rows(network: PreTrainedModel, longest: int | None = None) -> bool:
    """Whether :func:`over_rows` may be called with this network.

    Args:
        network: As :func:`use_rows` leaves it.
        longest: Tokens of the longest row; None for rows of any length.
    """
    bound = rules_of(network).packed
    known = network.config.get_text_config()._attn_implementation == NAME
    return known and (bound is None or (longest is not None and longest <= bound))


def rules_of(network: PreTrainedModel) -> LengthRules:
    """What :func:`use_rows` has found out about the lengths of rows."""
    return getattr(network, "length_rules", LengthRules())


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
    output = trunk_of(network)(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=none,
        use_cache=False,
        rows=rows,
        **router_arguments(network),
    )
    keep_router_loss(network, output)
    return output.last_hidden_state[0]


def packed_states(network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states of packed rows, and the index of each token among them; a padded batch goes in.

    Args:
        network: A causal model with a head of any kind.
        input_ids: Shape (batch, length), int64.
        attention_mask: True on real tokens. Same shape, bool.
    """
    network.set_attn_implementation(NAME)
    packing = pack(attention_mask)
    tokens = input_ids.flatten()[packing.places]
    return over_rows(network, tokens, packing.positions, PackedRows(packing)), packing.at


def padded_states(network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`packed_states`, of a batch that stays padded.

    Every row begins in the first column. Then nothing before it can reach it, positions are those of the columns, and what
    follows a token cannot reach it either under causal attention: the fast causal kernel serves without a mask. What stands
    on padding is no token of the data, and need not be one that the network has.
    """
    columns = left_aligned(attention_mask)
    ids = input_ids.masked_fill(~attention_mask, 0).gather(1, columns)
    output = trunk_of(network)(input_ids=ids, use_cache=False, **router_arguments(network))
    keep_router_loss(network, output, attention_mask.gather(1, columns).flatten())
    places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    return output.last_hidden_state.flatten(0, 1), torch.empty_like(places).scatter_(1, columns, places)


def unpacked_states(network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`padded_states`, in a network that takes packed rows."""
    network.set_attn_implementation(NAME)
    return padded_states(network, input_ids, attention_mask)


@torch.no_grad()
def use_rows(network: PreTrainedModel) -> None:
    """Let a network take packed rows where that gives what each row gives alone; log a warning where it does not.

    Only in place of SDPA, which is what transformers chooses by itself: an attention that was asked for stays.

    Raises:
        UserError: If not even a padded row is what it is alone, as in an encoder, which reads a text from both ends.
    """
    rules: Any = length_rules(network, packed_states, unpacked_states, padded_states)
    if rules.together == 0:
        raise UserError(
            f"{type(network).__name__} computes a token from what follows it, or from other rows; use a causal language model"
        )
    network.length_rules = rules
    config = network.config.get_text_config()
    weight: Any = network.get_input_embeddings().weight
    if config._attn_implementation != "sdpa":
        return
    if weight.device.type == "meta":
        return
    reason = "hidden states differ" if rules.packed == 0 else _difference(network, weight)
    if reason is not None:
        network.set_attn_implementation("sdpa")
        log.warning(
            "%s does not keep packed rows apart (%s): its batches stay padded, and cost what padding costs "
            "(data.bucket_batches sorts rows by length)",
            type(network).__name__,
            reason,
        )
    elif rules.packed is not None and rules.packed < (
        getattr(config, "max_position_embeddings", None) or rules.packed + 1
    ):
        log.warning(
            "%s: rows of more than %d tokens stay padded, for a rule of its attention begins there",
            type(network).__name__,
            rules.packed,
        )


def _difference(network: PreTrainedModel, weight: Tensor) -> str | None:
    """What is wrong with packed rows of a few tokens in this very network; None if nothing is."""
    longest = min(6, rules_of(network).packed or 6)
    lengths = torch.tensor([max(longest - 2, 1), longest, longest], device=weight.device)
    ids = (torch.arange(3 * longest, device=weight.device) * 7 % weight.shape[0]).view(3, longest)
    mask = torch.arange(longest, device=weight.device) < lengths[:, None]
    hidden, at = padded_states(network, ids, mask)
    alone = hidden[at[mask]].float()
    try:
        hidden, at = packed_states(network, ids, mask)
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        # No attention from outside, or one with arguments that are not known here.
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    together = hidden[at[mask]].float()
    if weight.dtype in (torch.float32, torch.float64):
        same = torch.allclose(alone, together, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    else:  # kernels round differently, and rounding may send a token to another expert: most tokens count, not each
        same = bool(((alone - together).norm(dim=-1) <= 0.05 * alone.norm(dim=-1)).float().mean() > 0.75)
    return None if same else "hidden states differ"
