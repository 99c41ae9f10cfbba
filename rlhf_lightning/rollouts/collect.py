"""From a batch of prompts to a rollout: generate, score under policy, reference and critic, reward."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.functional.logprobs import response_mask_from_tokens
from rlhf_lightning.generation.engine import GenerationEngine, SamplingParameters
from rlhf_lightning.models.actor_critic import ActorCritic, ActorCriticOutput
from rlhf_lightning.models.export import eos_ids
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.rewards.reward import Reward, Samples, checked_scores
from rlhf_lightning.rollouts.buffer import Rollout, parts


@dataclass(frozen=True)
class Responses:
    """Sampled responses and what is known of them before any scoring.

    Attributes:
        input_ids: Prompts and responses. Shape (batch, P + T), int64.
        attention_mask: Same shape, bool.
        sequence_mask: True on response tokens. Same shape, bool.
        response_mask: Its last T columns. Shape (batch, T), bool.
        truncated: Shape (batch,), bool.
        samples: The same as text, for rewards and for people.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sequence_mask: Tensor
    response_mask: Tensor
    truncated: Tensor
    samples: Samples


def generate_responses(
    batch: PromptBatch,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: GenerationEngine,
    sampling: SamplingParameters,
) -> Responses:
    """Draw a response to every prompt and mark what counts of it."""
    ends = eos_ids(network, tokenizer)
    pad = int(tokenizer.pad_token_id)
    tokens = engine.generate(network, batch.input_ids, batch.attention_mask, sampling, eos_ids=ends, pad_id=pad)
    mask, truncated = response_mask_from_tokens(tokens, torch.tensor(ends, device=tokens.device))
    tokens = tokens.masked_fill(~mask, pad)
    prompt_mask = torch.zeros_like(batch.attention_mask)
    ids = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    # Without the closing EOS: some models end with a token that is not special to their tokenizer.
    contents = [row if cut else row[:-1] for row, cut in zip(ids, truncated.tolist(), strict=True)]
    samples = Samples(
        prompts=batch.prompts,
        completions=tokenizer.batch_decode(contents, skip_special_tokens=True),
        completion_ids=ids,
        truncated=truncated.tolist(),
        columns=batch.columns,
    )
    return Responses(
        input_ids=torch.cat([batch.input_ids, tokens], dim=1),
        attention_mask=torch.cat([batch.attention_mask, mask], dim=1),
        sequence_mask=torch.cat([prompt_mask, mask], dim=1),
        response_mask=mask,
        truncated=truncated,
        samples=samples,
    )


@torch.no_grad()
def score_responses(
    responses: Responses,
    model: ActorCritic,
    reference: Frozen,
    reward: Reward,
    *,
    temperature: float,
    micro_batch_size: int,
    most: int | None = None,
) -> Rollout:
    """Log-probabilities, values and rewards of sampled responses.

    Args:
        responses: What was sampled.
        model: Policy and critic, with the weights that sampled.
        reference: The frozen policy that the KL is measured from.
        reward: Scores the text.
        temperature: That of the sampling; divides policy's and reference's logits alike.
        micro_batch_size: Rows a forward.
        most: Forwards at most, where another rank has fewer rows; the last one then takes what is left.

    Returns:
        The rollout, without advantages.
    """
    width = responses.response_mask.shape[1]
    policy: list[ActorCriticOutput] = []
    ref: list[Tensor] = []
    every = torch.arange(len(responses.truncated), device=responses.input_ids.device)
    for rows in parts(every, micro_batch_size, most):
        inputs = (responses.input_ids[rows], responses.attention_mask[rows], responses.sequence_mask[rows])
        policy.append(model(*inputs, temperature=temperature))
        ref.append(reference(*inputs, temperature=temperature).logprobs)
    zeros = torch.zeros(responses.response_mask.shape, device=responses.input_ids.device)
    return Rollout(
        input_ids=responses.input_ids,
        attention_mask=responses.attention_mask,
        sequence_mask=responses.sequence_mask,
        response_mask=responses.response_mask,
        truncated=responses.truncated,
        logprobs=torch.cat([p.logprobs for p in policy])[:, -width:],
        ref_logprobs=torch.cat(ref)[:, -width:],
        entropy=torch.cat([p.entropy for p in policy])[:, -width:],
        values=torch.cat([p.values for p in policy])[:, -width:],
        scores=checked_scores(reward, responses.samples).to(zeros.device),
        advantages=zeros,
        returns=zeros,
    )
