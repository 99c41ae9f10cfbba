"""A transformer with a scalar head: a reward model when read at the last token, a critic when read at every token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.functional.masked import last_true
from rlhf_lightning.models.attention import use_rows
from rlhf_lightning.models.loading import scalar_head
from rlhf_lightning.models.trunk import hidden_states


class ScalarModel(nn.Module):
    """One scalar a position: ``gain * score(hidden) + bias``.

    ``gain`` and ``bias`` normalise a reward model's scores (mean 0 on reference responses). The linear head of a
    ``*ForSequenceClassification`` has no bias to fold them into, so they travel in the exported ``config.json`` as
    ``reward_gain`` and ``reward_bias``; plain transformers shows the raw score.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        scalar_head(network)  # an architecture without one is refused here, not in the first step
        use_rows(network)
        self.network = network
        self.register_buffer(
            "gain", torch.tensor(float(getattr(network.config, "reward_gain", 1.0)), dtype=torch.float32)
        )
        self.register_buffer(
            "bias", torch.tensor(float(getattr(network.config, "reward_bias", 0.0)), dtype=torch.float32)
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor | None = None,
        *,
        pooled: bool = True,
        normalised: bool = True,
    ) -> Tensor:
        """Scores of whole sequences, or values of every position.

        Args:
            input_ids: Shape (batch, length), int64, padded on one side.
            attention_mask: True on real tokens. Same shape, bool. The score is read at its last True: by length, never by
                looking for a pad or EOS id.
            response_mask: Given, a prompt that several rows share is read once: it is what stands before the first True.
                Same shape, bool.
            pooled: One score a row rather than one value a position.
            normalised: With gain and bias; without, at the scale that Bradley-Terry was trained at.

        Returns:
            Shape (batch,) if ``pooled``, else (batch, length), where what stands on padding means nothing; float32.
        """
        states = hidden_states(self.network, input_ids, attention_mask, response_mask)
        places = states.at.gather(1, last_true(attention_mask)[:, None]).squeeze(1) if pooled else states.at
        hidden = states.hidden.index_select(0, places) if pooled else states.hidden
        head = scalar_head(self.network)
        # In float32: bfloat16 scores of similar responses tie.
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            raw = F.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)
        raw = raw if pooled else raw[places]
        return self.gain * raw + self.bias if normalised else raw

    def normalise(self, mean: float, std: float) -> None:
        """Give raw scores of this mean and standard deviation mean 0 and 1; training goes on with the raw ones."""
        self.gain.fill_(1 / std)
        self.bias.fill_(-mean / std)

    def describe_normalisation(self) -> None:
        """Write gain and bias into the network's config, which an export saves."""
        self.network.config.reward_gain = float(self.gain)
        self.network.config.reward_bias = float(self.bias)
