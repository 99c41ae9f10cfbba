"""The forward pass through a transformer's trunk, with padding taken out where the architecture allows."""

from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import PackedRows, knows_rows, over_rows, padded_states, rules_of
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
    longest = check_lengths(network, attention_mask)
    if not knows_rows(network, longest):
        return States(*padded_states(network, input_ids, attention_mask))
    if response_mask is None:
        packing = pack(attention_mask)
    else:
        shortest = SHORTEST_SHARED["cuda" if input_ids.is_cuda else "cpu"]
        packing = pack_with_shared_prompts(input_ids, attention_mask, response_mask, shortest)
    tokens = input_ids.flatten()[packing.places]
    return States(over_rows(network, tokens, packing.positions, PackedRows(packing)), packing.at)


def check_lengths(network: PreTrainedModel, attention_mask: Tensor) -> int:
    """An upper bound of the tokens in a row, exact where a rule about lengths could begin.

    Raises:
        UserError: If a row is so long that its neighbours in the batch would change what is computed for it.
    """
    rules, longest = rules_of(network), attention_mask.shape[1]
    bounds = [bound for bound in rules if bound is not None]
    if bounds and longest > min(bounds):
        longest = int(attention_mask.sum(dim=1).max())
    if rules.together is not None and longest > rules.together:
        raise UserError(
            f"a row has {longest} tokens; beyond {rules.together}, {type(network).__name__} computes a row differently beside "
            f"other rows (rotary scaling that follows the longest, for one): keep prompt and response within {rules.together}"
        )
    return longest
