"""The batches that pass from data modules to training steps: the shape of every field, and nothing else."""

from typing import Any, NamedTuple

from torch import Tensor


class SequenceBatch(NamedTuple):
    """Token sequences, right-padded, with the tokens that are to be learnt marked.

    Attributes:
        input_ids: Token ids. Shape (batch, length), int64; the pad id where ``attention_mask`` is False.
        attention_mask: True on real tokens. Shape (batch, length), bool.
        response_mask: True on supervised tokens, EOS included. Shape (batch, length), bool.
        normalizer: What this batch's summed loss is divided by: the mean number of supervised tokens that a micro-batch
            of this optimizer step holds, over every rank, each times the weight of its row. Scalar, float32.
        weights: What each row weighs in the loss; None where all weigh 1. Shape (batch,), float32.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    normalizer: Tensor
    weights: Tensor | None = None


class PreferenceBatch(NamedTuple):
    """Pairs of responses to one prompt, chosen first: rows 0..B-1 are chosen, rows B..2B-1 their rejected twins.

    Attributes:
        input_ids: Prompt and response, right-padded. Shape (2 * pairs, length), int64.
        attention_mask: True on real tokens. Shape (2 * pairs, length), bool.
        response_mask: True on what the assistant says in the responses, EOS included; False on turns of others within them.
            Shape (2 * pairs, length), bool.
        margin: How much better the chosen response was judged, 0 where unknown. Shape (pairs,), float32.
        normalizer: Mean number of pairs that a micro-batch of this optimizer step holds, over every rank. Scalar.
        reference_logps: Log-probability of each response under the reference, where it is known already.
            Shape (2 * pairs,), float32, nats.
        probability: How likely the chosen response is the better one, 1/2 of a tie. Shape (pairs,), float32; None for 1.
        weight: What the loss of each pair is multiplied by. Shape (pairs,), float32; None for 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    margin: Tensor
    normalizer: Tensor
    reference_logps: Tensor | None = None
    probability: Tensor | None = None
    weight: Tensor | None = None


class RankingBatch(NamedTuple):
    """Several responses to each of a few prompts, those to one prompt together.

    Attributes:
        input_ids: Prompt and response, right-padded. Shape (responses, length), int64.
        attention_mask: True on real tokens. Shape (responses, length), bool.
        response_mask: True on response tokens, EOS included. Shape (responses, length), bool.
        ranks: Within the responses to a prompt; the lowest is the best, equal ones are tied. Shape (responses,), float32.
        prompt: Number of the prompt, from 0 on; each has two responses that are not tied. Shape (responses,), int64.
        weight: What the loss of each prompt is multiplied by. Shape (prompts,), float32.
        normalizer: Mean number of prompts that a micro-batch of this optimizer step holds, over every rank. Scalar.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    ranks: Tensor
    prompt: Tensor
    weight: Tensor
    normalizer: Tensor


class UnpairedBatch(NamedTuple):
    """Single responses that were liked or not: rows 0..B-1; rows B..2B-1 are the same prompts with each other's responses.

    The response that stands behind a prompt there is that of the row before, and the last one's for the first. It may lack
    its end, where the two together would be too long.

    Attributes:
        input_ids: Prompt and response, right-padded. Shape (2 * rows, length), int64.
        attention_mask: True on real tokens. Shape (2 * rows, length), bool.
        response_mask: True on what the assistant says in the responses, EOS included; False on turns of others within them.
            Shape (2 * rows, length), bool.
        label: True where the response was liked. Shape (rows,), bool.
        normalizer: Mean number of rows that a micro-batch of this optimizer step holds, over every rank. Scalar.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    label: Tensor
    normalizer: Tensor


class StepwiseBatch(NamedTuple):
    """Solutions with a verdict on their steps, right-padded.

    Attributes:
        input_ids: Prompt, then each step and its separator. Shape (batch, length), int64.
        attention_mask: True on real tokens. Shape (batch, length), bool.
        response_mask: True on steps and separators. Shape (batch, length), bool.
        step_mask: True on the last token of the separator behind each labelled step. Shape (batch, length), bool.
        labels: There, the probability that the step is right; 0 elsewhere. Shape (batch, length), float32.
        normalizer: Mean number of labelled steps that a micro-batch of this optimizer step holds, over every rank. Scalar.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    step_mask: Tensor
    labels: Tensor
    normalizer: Tensor


class PromptBatch(NamedTuple):
    """Prompts to respond to, left-padded so that every response begins in the same column.

    Attributes:
        input_ids: Shape (batch, prompt_length), int64.
        attention_mask: True on real tokens. Shape (batch, prompt_length), bool.
        prompts: The prompts as given: text, or a list of messages each. Length batch.
        columns: Every other column of the dataset, for reward functions. Each a list of length batch.
        pretraining: Rows of text to learn beside them; None where there are none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: list[Any]
    columns: dict[str, list[Any]]
    pretraining: SequenceBatch | None = None
