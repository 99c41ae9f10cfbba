"""A causal language model as a policy: log-probabilities and entropies of the tokens that matter."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import use_rows
from rlhf_lightning.models.head import head_scores, raw_logits
from rlhf_lightning.models.loading import embedding_weight
from rlhf_lightning.models.precision import Float32Buffers
from rlhf_lightning.models.trunk import States, hidden_states


class PolicyOutput(NamedTuple):
    """Per-token results, aligned with ``input_ids[:, 1:]``; every field is zero where the token was not asked for.

    Attributes:
        logprobs: Shape (batch, length - 1), float32, nats.
        entropy: Entropy of the distribution that predicts the token; same shape, nats; without gradient unless asked for.
        greedy: Whether no token is more likely; same shape, bool.
        mean_logit: Mean raw logit over the vocabulary, which TRL logs as ``logits/chosen``; same shape.
        collisions: Log sum of squared probabilities of that distribution; same shape, nats; None unless asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    greedy: Tensor
    mean_logit: Tensor
    collisions: Tensor | None = None


class PolicyNetwork(Float32Buffers):
    """Wraps a causal language model so that one forward does all that a training step needs.

    The head is applied to the asked-for positions only: prompts and padding never meet the vocabulary.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        use_rows(network)
        check_head(network)
        self.network = network

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        equal_weights: bool = False,
        share_prompts: bool = False,
        collisions: bool = False,
    ) -> PolicyOutput:
        """Score the tokens that ``response_mask`` marks.

        Args:
            input_ids: Shape (batch, length), int64, padded on one side.
            attention_mask: True on real tokens. Same shape, bool.
            response_mask: True on the tokens to score; never on the first column. Same shape, bool.
            temperature: Divides the logits, > 0.
            entropy_gradient: Let gradients flow through the entropy (for an entropy bonus).
            equal_weights: The loss will weigh every log-probability alike: see :func:`rlhf_lightning.models.head.head_scores`.
            share_prompts: Rows may begin with the same prompt, which is then read once.
            collisions: Whether to compute them too.
        """
        return score_tokens(
            self.network,
            hidden_states(self.network, input_ids, attention_mask, response_mask if share_prompts else None),
            input_ids,
            response_mask,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
            equal_weights=equal_weights,
            collisions=collisions,
        )


def score_tokens(
    network: PreTrainedModel,
    states: States,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool = False,
    equal_weights: bool = False,
    collisions: bool = False,
) -> PolicyOutput:
    """Apply the head where ``response_mask`` asks for it; arguments and result as in :class:`PolicyNetwork`."""
    wanted = response_mask[:, 1:]
    before = states.hidden.index_select(0, states.at[:, :-1][wanted])  # the logit at t - 1 predicts the token at t
    scores = head_scores(
        network,
        before,
        input_ids[:, 1:][wanted],
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        equal_weights=equal_weights,
        collisions=collisions,
    )
    spread: list[Any] = [None if values is None else _spread(values, wanted) for values in scores]
    return PolicyOutput(*spread)


@torch.no_grad()
def check_head(network: PreTrainedModel) -> None:
    """Make sure that trunk and head, called apart, give the model's own logits.

    Raises:
        UserError: If they do not: the architecture does something between them that is not known here.
    """
    device = embedding_weight(network).device
    if device.type == "meta":
        return
    ids = torch.arange(4, device=device)[None]
    whole = network(input_ids=ids, use_cache=False).logits[0]
    apart = raw_logits(network, hidden_states(network, ids, torch.ones_like(ids, dtype=torch.bool)).hidden)
    if not torch.allclose(whole.float(), apart.float(), rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(network).__name__} changes its logits after the head in a way that is not known here; "
            "add the step to models/head.py: head_logits"
        )


def _spread(values: Tensor, wanted: Tensor) -> Tensor:
    """Put the scored tokens back into their places, zeros elsewhere; shape of ``wanted``."""
    return torch.zeros(wanted.shape, dtype=values.dtype, device=values.device).masked_scatter(wanted, values)
