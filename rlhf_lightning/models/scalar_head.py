"""A transformer with a scalar head: a reward model when read at the last token, a critic when read at every token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.masked import last_true
from rlhf_lightning.models.attention import use_rows
from rlhf_lightning.models.loading import is_encoder, last_linear, scalar_head
from rlhf_lightning.models.precision import Float32Buffers, at_least_float32
from rlhf_lightning.models.trunk import hidden_states

SCALES = {"gain": 1.0, "bias": 0.0, "temperature": 0.0}  # what they are before they are measured


def float32_linear(head: nn.Linear, hidden: Tensor) -> Tensor:
    """A linear layer in float32 at least, whatever autocast and the weights say: bfloat16 scores of similar responses tie.

    Args:
        head: The layer.
        hidden: Shape (..., in features).

    Returns:
        Shape (..., out features), float32; float64 where the weights are.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else at_least_float32(head.bias)
        return F.linear(at_least_float32(hidden), at_least_float32(head.weight), bias)


def _in_float32(head: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """A forward hook for the last layer of an encoder's own classification head."""
    return float32_linear(head, inputs[0])


class ScalarModel(Float32Buffers):
    """One scalar a position: ``gain * score(hidden) + bias``; with several heads on one trunk, one of each.

    ``gain`` and ``bias`` normalise a reward model's scores (mean 0 on reference responses). Over the ``temperature``, 0
    until it is measured, differences of raw scores are log-odds of preference. The linear head of a
    ``*ForSequenceClassification`` has no bias to fold them into, so they travel in the exported ``config.json`` as
    ``reward_gain``, ``reward_bias`` and ``reward_temperature``; plain transformers shows the raw score.

    An encoder is read as its own classification head reads it, once a sequence.
    """

    gain: Tensor
    bias: Tensor
    temperature: Tensor

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        # An architecture without a head is refused here, not in the first step.
        self.members = last_linear(network).out_features
        self.encoder = is_encoder(network)
        if self.encoder:
            last_linear(network).register_forward_hook(_in_float32)
        else:
            use_rows(network)
        self.network = network
        for name, default in SCALES.items():
            known = getattr(network.config, f"reward_{name}", None)
            value = ([default] * self.members if self.members > 1 else default) if known is None else known
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

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
            Shape (batch,) if ``pooled``, else (batch, length), where what stands on padding means nothing; float32. Several
            heads give each as many: (batch, members).
        """
        if self.encoder:
            raw = self._encoded(input_ids, attention_mask, pooled)
        else:
            raw = self._read(input_ids, attention_mask, response_mask, pooled)
        return self.gain * raw + self.bias if normalised else raw

    def _read(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor | None, pooled: bool) -> Tensor:
        """Raw scores of a decoder, at the last token or at every one."""
        states = hidden_states(self.network, input_ids, attention_mask, response_mask)
        places = states.at.gather(1, last_true(attention_mask)[:, None]).squeeze(1) if pooled else states.at
        hidden = states.hidden.index_select(0, places) if pooled else states.hidden
        head = scalar_head(self.network)
        raw = float32_linear(head, hidden)
        raw = raw.squeeze(-1) if self.members == 1 else raw
        return raw if pooled else raw[places]

    def _encoded(self, input_ids: Tensor, attention_mask: Tensor, pooled: bool) -> Tensor:
        """Raw scores of an encoder, whose positions begin with the first column, pooled as it was made to."""
        if not pooled:
            raise UserError(
                f"{type(self.network).__name__} reads a text from both ends: it can score one, and is no critic"
            )
        order = (~attention_mask).long().argsort(dim=1, stable=True)  # real tokens first: positions are absolute
        ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        raw = self.network(
            input_ids=ids.masked_fill(~mask, self.network.config.pad_token_id), attention_mask=mask.long()
        )
        logits = at_least_float32(raw.logits)
        return logits.squeeze(-1) if self.members == 1 else logits

    def normalise(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Give raw scores of this mean and standard deviation mean 0 and 1; training goes on with the raw ones."""
        mean, std = (torch.as_tensor(x, dtype=torch.float32).reshape(self.gain.shape) for x in (mean, std))
        self.gain.copy_(1 / std)
        self.bias.copy_(-mean / std)

    def calibrate(self, temperature: Tensor) -> None:
        """Remember at which temperature differences of raw scores are log-odds; scores stay as they are."""
        self.temperature.copy_(temperature.reshape(self.temperature.shape))

    def describe_normalisation(self) -> None:
        """Write gain, bias and, where it was measured, temperature into the network's config, which an export saves."""
        for name in SCALES if bool(self.temperature.all()) else ("gain", "bias"):
            setattr(self.network.config, f"reward_{name}", getattr(self, name).tolist())
