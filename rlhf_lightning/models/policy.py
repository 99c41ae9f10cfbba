"""A causal language model as a policy: log-probabilities and entropies of the tokens that matter."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import entropy, log_softmax
from rlhf_lightning.models.loading import embedding_weight
from rlhf_lightning.models.trunk import hidden_states


class PolicyOutput(NamedTuple):
    """Per-token results, aligned with ``input_ids[:, 1:]``; every field is zero where the token was not asked for.

    Attributes:
        logprobs: Shape (batch, length - 1), float32, nats.
        entropy: Entropy of the distribution that predicts the token; same shape, nats; without gradient unless asked for.
        greedy: Whether the token is the most likely one; same shape, bool.
        mean_logit: Mean raw logit over the vocabulary, which TRL logs as ``logits/chosen``; same shape.
    """

    logprobs: Tensor
    entropy: Tensor
    greedy: Tensor
    mean_logit: Tensor


class PolicyNetwork(nn.Module):
    """Wraps a causal language model so that one forward does all that a training step needs.

    The head is applied to the asked-for positions only: prompts and padding never meet the vocabulary.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
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
    ) -> PolicyOutput:
        """Score the tokens that ``response_mask`` marks.

        Args:
            input_ids: Shape (batch, length), int64, padded on one side.
            attention_mask: True on real tokens. Same shape, bool.
            response_mask: True on the tokens to score; never on the first column. Same shape, bool.
            temperature: Divides the logits, > 0.
            entropy_gradient: Let gradients flow through the entropy (for an entropy bonus).
        """
        hidden = hidden_states(self.network, input_ids, attention_mask)
        return score_tokens(
            self.network, hidden, input_ids, response_mask, temperature=temperature, entropy_gradient=entropy_gradient
        )


def score_tokens(
    network: PreTrainedModel,
    hidden: Tensor,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool,
) -> PolicyOutput:
    """Apply the head where ``response_mask`` asks for it; arguments and result as in :class:`PolicyNetwork`."""
    wanted = response_mask[:, 1:]
    tokens = input_ids[:, 1:][wanted]
    logits = head_logits(network, hidden[:, :-1][wanted])  # the logit at t - 1 predicts the token at t
    log_probs = log_softmax(logits, temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        token_entropy = entropy(log_probs if entropy_gradient else log_probs.detach())
    with torch.no_grad():
        greedy, mean_logit = logits.argmax(-1) == tokens, logits.float().mean(-1)
    scored = (log_probs.gather(-1, tokens[:, None]).squeeze(-1), token_entropy, greedy, mean_logit)
    return PolicyOutput(*(_spread(values, wanted) for values in scored))


def head_logits(network: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits from hidden states, with the extra step that some architectures take after the linear head.

    Args:
        network: A causal language model.
        hidden: Shape (..., hidden).

    Returns:
        Shape (..., vocabulary), in the model's dtype.
    """
    logits = network.get_output_embeddings()(hidden)
    config = network.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


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
    whole = network(input_ids=ids, use_cache=False).logits
    apart = head_logits(network, hidden_states(network, ids, torch.ones_like(ids, dtype=torch.bool)))
    if not torch.allclose(whole.float(), apart.float(), rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(network).__name__} changes its logits after the head in a way that is not known here; "
            "add the step to models/policy.py: head_logits"
        )


def _spread(values: Tensor, wanted: Tensor) -> Tensor:
    """Put the scored tokens back into their places, zeros elsewhere; shape of ``wanted``."""
    return torch.zeros(wanted.shape, dtype=values.dtype, device=values.device).masked_scatter(wanted, values)
