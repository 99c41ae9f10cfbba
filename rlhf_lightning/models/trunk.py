"""The forward pass through a transformer's trunk, with padding taken out where the architecture allows."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.models.attention import PackedRows, knows_rows, over_rows
from rlhf_lightning.models.packing import pack, pack_with_shared_prompts

# Shorter prompts are not worth sharing: what goes on from one is a call of its own on a CPU, and there rows of equal length
# are one call together.
SHORTEST_SHARED = {"cpu": 16, "cuda": 1}


class States(NamedTuple):
    """Last hidden states, and where those of each token of the padded batch are.

    Attributes:
        hidden: Shape (n, hidden).
        at: The row of ``hidden`` that belongs to each place; meaningless on padding. Shape (batch, length), int64.
    """

    hidden: Tensor
    at: Tensor


def hidden_states(
    network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor | None = None
) -> States:
    """Run the trunk over a padded batch.

    Args:
        network: A causal model with a head of any kind.
        input_ids: Shape (batch, length), int64; padded on one side.
        attention_mask: True on real tokens. Shape (batch, length), bool.
        response_mask: Given, a prompt that several rows share is read once if it is long enough: it is what stands before
            the first True. Same shape, bool.
    """
    if knows_rows(network):
        if response_mask is None:
            packing = pack(attention_mask)
        else:
            shortest = SHORTEST_SHARED["cuda" if input_ids.is_cuda else "cpu"]
            packing = pack_with_shared_prompts(input_ids, attention_mask, response_mask, shortest)
        tokens = input_ids.flatten()[packing.places]
        return States(over_rows(network, tokens, packing.positions, PackedRows(packing)), packing.at)
    hidden = _padded(network, input_ids, attention_mask)
    places = torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape)
    return States(hidden.flatten(0, 1), places)


def _padded(network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Right padding needs neither a mask nor positions under causal attention (what follows a token cannot reach it), so
    that the fast causal kernel serves. Left padding needs both: absolute positions would be wrong without.
    """
    if bool(attention_mask[:, 0].all()):
        return network.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return network.base_model(
        input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=positions, use_cache=False
    ).last_hidden_state
