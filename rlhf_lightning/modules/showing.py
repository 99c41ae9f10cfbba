"""Samples for a person to read: what a module says to a few prompts, and what it thinks of that."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PreferenceBatch, PromptBatch, SequenceBatch, UnpairedBatch
from rlhf_lightning.data.collate import pad_right
from rlhf_lightning.generation.context import within_context
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import engine_for
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.sharding import gathered
from rlhf_lightning.modules.guard import plain_data
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rollouts.collect import Responses, generate_responses

VERSIONS = itertools.count()  # of the weights that samples are drawn with


class Sample(NamedTuple):
    """A response that is shown or predicted; the module defines the score.

    Attributes:
        prompt: Text of the prompt, or of its last message.
        response: Text of the response.
        score: Of the response.
        side: Which response of its row it is: "chosen" or "rejected", "liked" or "disliked", "rank 2"; None where it was
            sampled, or the row has one only.
        row: Index of its row in the batch; None if samples are in the order of the rows, one each.
        step_scores: The probability that each labelled step is right, in order; None except for process rewards.
        extra: Further columns, which a reward has logged.
    """

    prompt: str
    response: str
    score: float
    side: str | None = None
    row: int | None = None
    step_scores: list[float] | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012  (never changed)


def sampled_responses(
    policy: PolicyNetwork,
    tokenizer: PreTrainedTokenizerBase,
    batch: SequenceBatch | PreferenceBatch | UnpairedBatch,
    count: int,
    sampling: SamplingParameters,
) -> Responses:
    """Answer the first prompts of an offline batch, drawn from a fixed seed so that two looks can be compared."""
    prompts = prompt_batch(tokenizer, batch, count)
    device = batch.input_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with gathered(policy):
            sampling = within_context(sampling, policy.network, prompts.input_ids.shape[1])
            engine = engine_for(sampling)
            engine.take_weights(policy.network, tokenizer, next(VERSIONS))  # they change between two calls
            responses = generate_responses(prompts, policy.network, tokenizer, engine, sampling)
            engine.rest()
    return responses


def prompt_batch(
    tokenizer: PreTrainedTokenizerBase, batch: SequenceBatch | PreferenceBatch | UnpairedBatch, count: int
) -> PromptBatch:
    """What stands before the first response token of each row; the beginning of the text where everything is learnt."""
    prompts = []
    for ids, mask in zip(batch.input_ids[:count], batch.response_mask[:count], strict=True):
        prompts.append(ids[: max(int(mask.long().argmax()), 1)].tolist())
    flipped, attention = pad_right([p[::-1] for p in prompts], int(tokenizer.pad_token_id))
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    device = batch.input_ids.device
    return PromptBatch(flipped.flip(1).to(device), attention.flip(1).to(device), texts, {})


def as_samples(responses: Responses, scores: Tensor, count: int) -> list[Sample]:
    """The first of the responses with their scores."""
    samples = responses.samples
    prompts = [prompt if isinstance(prompt, str) else _last_turn(prompt) for prompt in samples.prompts[:count]]
    rows = zip(prompts, samples.completions, scores.tolist(), strict=False)
    return [Sample(*row, extra=extra_of(samples, index)) for index, row in enumerate(rows)]


def extra_of(samples: Samples, index: int) -> dict[str, Any]:
    """What the reward has logged of one response, as plain data."""
    return {name: plain_data(values[index]) for name, values in samples.extra.items()}


def _last_turn(messages: list[dict[str, Any]]) -> str:
    return str(messages[-1]["content"])
