"""The forward pass through a transformer's trunk, and how padding is told to it."""

from torch import Tensor
from transformers import PreTrainedModel


def hidden_states(network: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states of every position.

    Right padding needs neither a mask nor positions under causal attention (what follows a token cannot reach it), so
    that the fast causal kernel serves. Left padding needs both: absolute positions would be wrong without.

    Args:
        network: A causal model with a head of any kind.
        input_ids: Shape (batch, length), int64; padded on one side.
        attention_mask: True on real tokens. Shape (batch, length), bool.

    Returns:
        Shape (batch, length, hidden); meaningless where ``attention_mask`` is False.
    """
    if bool(attention_mask[:, 0].all()):
        return network.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    output = network.base_model(
        input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=positions, use_cache=False
    )
    return output.last_hidden_state
