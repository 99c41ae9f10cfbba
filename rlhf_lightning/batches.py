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
            of this optimizer step holds, over every rank. Scalar, float32.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    normalizer: Tensor


class PreferenceBatch(NamedTuple):
    """Pairs of responses to one prompt, chosen first: rows 0..B-1 are chosen, rows B..2B-1 their rejected twins.

    Attributes:
        input_ids: Prompt and response, right-padded. Shape (2 * pairs, length), int64.
        attention_mask: True on real tokens. Shape (2 * pairs, length), bool.
        response_mask: True on response tokens, EOS included. Shape (2 * pairs, length), bool.
        margin: How much better the chosen response was judged, 0 where unknown. Shape (pairs,), float32.
        normalizer: Mean number of pairs that a micro-batch of this optimizer step holds, over every rank. Scalar.
        reference_logps: Log-probability of each response under the reference, where it is known already.
            Shape (2 * pairs,), float32, nats.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    margin: Tensor
    normalizer: Tensor
    reference_logps: Tensor | None = None


class PromptBatch(NamedTuple):
    """Prompts to respond to, left-padded so that every response begins in the same column.

    Attributes:
        input_ids: Shape (batch, prompt_length), int64.
        attention_mask: True on real tokens. Shape (batch, prompt_length), bool.
        prompts: The prompts as given: text, or a list of messages each. Length batch.
        columns: Every other column of the dataset, for reward functions. Each a list of length batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: list[Any]
    columns: dict[str, list[Any]]
