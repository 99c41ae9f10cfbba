"""From a batch of prompts to a rollout: generate, score under policy, reference and critic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.functional.logprobs import response_mask_from_tokens
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.generation.stop_strings import StopStrings, stop_strings_of
from rlhf_lightning.models.actor_critic import ActorCriticOutput
from rlhf_lightning.models.export import eos_ids
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rollouts.buffer import Rollout, parts


@dataclass(frozen=True)
class Responses:
    """Sampled responses and what is known of them before any scoring.

    Attributes:
        input_ids: Prompts and responses. Shape (batch, P + T), int64.
        attention_mask: Same shape, bool.
        sequence_mask: True on response tokens. Same shape, bool.
        response_mask: Its last T columns. Shape (batch, T), bool.
        truncated: Whether a response has neither EOS nor stop string. Shape (batch,), bool.
        drawn: What the engine gave, log-probabilities and all; whatever follows the end of a response is still in it.
        samples: The same as text, for rewards and for people.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sequence_mask: Tensor
    response_mask: Tensor
    truncated: Tensor
    drawn: Generation
    samples: Samples


def generate_responses(
    batch: PromptBatch,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: GenerationEngine,
    sampling: SamplingParameters,
) -> Responses:
    """Draw a response to every prompt and mark what counts of it.

    A response ends with its first EOS, or with the token that completes its first stop string. Either way it is not truncated.
    The text of the response is that of its tokens without the EOS; a stop string is part of it.
    """
    ends = eos_ids(network, tokenizer)
    pad = int(tokenizer.pad_token_id)
    stops = stop_strings_of(sampling, tokenizer)
    more: dict[str, Any] = {} if stops is None else {"tokenizer": tokenizer}
    drawn = engine.generate(network, batch.input_ids, batch.attention_mask, sampling, eos_ids=ends, pad_id=pad, **more)
    tokens = drawn.tokens
    mask, truncated = response_mask_from_tokens(tokens, torch.tensor(ends, device=tokens.device))
    if stops is not None:
        mask, truncated = cut_after_stop_strings(tokens, mask, truncated, stops)
    tokens = tokens.masked_fill(~mask, pad)
    prompt_mask = torch.zeros_like(batch.attention_mask)
    ids = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    # Without the closing EOS: some models end with a token that is not special to their tokenizer.
    contents = [row[:-1] if row[-1] in ends else row for row in ids]
    samples = Samples(
        prompts=batch.prompts,
        completions=tokenizer.batch_decode(contents, skip_special_tokens=True),
        completion_ids=ids,
        truncated=truncated.tolist(),
        columns=batch.columns,
        dropped_tokens=special_tokens_in(contents, tokenizer),
        decode=partial(tokenizer.batch_decode, skip_special_tokens=False),
    )
    return Responses(
        input_ids=torch.cat([batch.input_ids, tokens], dim=1),
        attention_mask=torch.cat([batch.attention_mask, mask], dim=1),
        sequence_mask=torch.cat([prompt_mask, mask], dim=1),
        response_mask=mask,
        truncated=truncated,
        drawn=drawn,
        samples=samples,
    )


def cut_after_stop_strings(
    tokens: Tensor, mask: Tensor, truncated: Tensor, stops: StopStrings
) -> tuple[Tensor, Tensor]:
    """End responses after the token that completes a stop string, also those of an engine that generated on.

    Args:
        tokens: Sampled token ids, anything after the end of a response. Shape (batch, length), int64.
        mask: True up to and including the first EOS. Same shape, bool.
        truncated: Whether there was no EOS. Shape (batch,), bool.
        stops: Finds the stop strings.

    Returns:
        The mask and the truncation with the stop strings taken into account.
    """
    mask, truncated = mask.clone(), truncated.clone()
    for row, (ids, keep) in enumerate(zip(tokens, mask, strict=True)):
        end = stops.end(ids[keep].tolist())
        if end is not None:
            mask[row, end:] = False
            truncated[row] = False
    return mask, truncated


def special_tokens_in(contents: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Special tokens among these ids, which text without special tokens lacks, in the order of their ids."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    sampled = {number for row in contents for number in row}
    return tuple(tokenizer.convert_ids_to_tokens(sorted(sampled & (special | set(tokenizer.all_special_ids)))))


@torch.no_grad()
def score_responses(
    responses: Responses,
    model: Callable[..., ActorCriticOutput],
    reference: Frozen | None,
    scores: Tensor,
    *,
    temperature: float,
    micro_batch_size: int,
    most: int | None = None,
    keep_logprobs: bool = False,
    group_size: int = 1,
    batches: Sequence[Tensor] | None = None,
    share_prompts: bool = False,
) -> Rollout:
    """Log-probabilities and values of sampled responses, beside their scores.

    Args:
        responses: What was sampled.
        model: Policy and critic, with the weights that sampled: takes and gives what
            :class:`~rlhf_lightning.models.actor_critic.ActorCritic` does.
        reference: The frozen policy that the KL is measured from; None, and its log-probabilities are the policy's own.
        scores: Raw rewards. Shape (batch,).
        temperature: That of the sampling; divides policy's and reference's logits alike.
        micro_batch_size: Rows a forward.
        most: Forwards at most, where another rank has fewer rows; the last one then takes what is left.
        keep_logprobs: Take the engine's log-probabilities for the policy's, rather than compute them a second time.
        group_size: So many rows, one after the other, answer one prompt.
        batches: Indices of the rows of each forward, in place of ``micro_batch_size`` rows one after the other. Half precision
            rounds differently in another batch: with the micro-batches of the update, the update's ratios begin at exactly 1.
        share_prompts: As in :class:`~rlhf_lightning.models.policy.PolicyNetwork`, for the reference.

    Returns:
        The rollout, without advantages.
    """
    mask, drawn = responses.response_mask, responses.drawn
    keep = keep_logprobs and drawn.logprobs is not None and drawn.entropy is not None
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    rollout = Rollout(
        input_ids=responses.input_ids,
        attention_mask=responses.attention_mask,
        sequence_mask=responses.sequence_mask,
        response_mask=mask,
        truncated=responses.truncated,
        logprobs=zeros,
        ref_logprobs=zeros,
        entropy=zeros,
        values=zeros,
        scores=scores.to(zeros.device),
        groups=torch.arange(len(mask), device=mask.device) // group_size,
        baselines=torch.zeros_like(zeros[:, 0]),
        advantages=zeros,
        returns=zeros,
    )
    numbers: dict[str, Tensor] = {}
    for rows in (
        parts(torch.arange(len(mask), device=mask.device), micro_batch_size, most) if batches is None else batches
    ):
        part = rollout.rows(rows) if batches is None else rollout.rows(rows).trimmed()
        inputs = part.input_ids, part.attention_mask, part.sequence_mask
        found = model(*inputs, temperature=temperature, values_only=keep)._asdict()
        if reference is not None:
            options = {"share_prompts": True} if share_prompts else {}
            found["ref_logprobs"] = reference(*inputs, temperature=temperature, **options).logprobs
        width = part.response_mask.shape[1]
        for name, values in found.items():
            total = numbers.setdefault(name, torch.zeros(mask.shape, dtype=values.dtype, device=mask.device))
            total[rows, :width] = values[:, -width:]
    if keep:
        assert drawn.logprobs is not None
        assert drawn.entropy is not None
        numbers |= {"logprobs": drawn.logprobs.masked_fill(~mask, 0), "entropy": drawn.entropy.masked_fill(~mask, 0)}
    return replace(rollout, **({"ref_logprobs": numbers["logprobs"]} | numbers))
