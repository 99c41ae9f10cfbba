"""What a model's context leaves for a response."""

import logging
from dataclasses import replace

from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters

log = logging.getLogger(__name__)

CAPPED = "_rlhf_capped"  # attribute of a network whose cut answers were logged


def context_of(network: PreTrainedModel) -> int | None:
    """Longest sequence that a network can read, in tokens; None where its config names no limit."""
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def within_context(sampling: SamplingParameters, network: PreTrainedModel, prompt_length: int) -> SamplingParameters:
    """Sampling parameters with at most as many new tokens as the context leaves after the prompt.

    Raises:
        UserError: If it leaves none.
    """
    limit = context_of(network)
    if limit is None or prompt_length + sampling.max_new_tokens <= limit:
        return sampling
    left = limit - prompt_length
    if left < 1:
        raise UserError(
            f"a prompt of {prompt_length} tokens leaves no room for an answer: the model reads {limit} tokens"
        )
    return replace(sampling, max_new_tokens=left, min_new_tokens=min(left, sampling.min_new_tokens))


def capped(sampling: SamplingParameters, network: PreTrainedModel, prompt_length: int, name: str) -> SamplingParameters:
    """Apply :func:`within_context` to a batch of prompts; a warning is logged, once for a model, where it cuts answers short.

    Args:
        sampling: How responses are sampled.
        network: The model.
        prompt_length: Of the longest prompt of the batch, in tokens.
        name: What the log and errors call the model.

    Raises:
        UserError: If a prompt leaves no room for an answer.
    """
    try:
        fitting = within_context(sampling, network, prompt_length)
    except UserError as error:
        raise UserError(f"{name}: {error}; leave long prompts out") from error
    if fitting is not sampling and not hasattr(network, CAPPED):
        setattr(network, CAPPED, True)
        log.warning(
            "%s reads %d tokens: after a prompt of %d, answers end at %d tokens instead of max_new_tokens %d",
            name,
            context_of(network),
            prompt_length,
            fitting.max_new_tokens,
            sampling.max_new_tokens,
        )
    return fitting
