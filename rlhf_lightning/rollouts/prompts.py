"""Prompts as the dataset gave them, as a batch to generate from."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.collate import PromptCollator
from rlhf_lightning.data.encoding import encode_prompt


def as_prompt_batch(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    columns: dict[str, list[Any]],
    device: torch.device | str,
) -> PromptBatch:
    """Tokenized and left-padded.

    Args:
        tokenizer: The policy's.
        prompts: Text, or lists of messages.
        columns: What else is known of them, for rewards.
        device: Where the ids are to be.
    """
    rows = {"prompt_ids": [encode_prompt(tokenizer, prompt) for prompt in prompts], "prompt": list(prompts)}
    batch = PromptCollator(int(tokenizer.pad_token_id))((rows | columns, 1.0))
    return batch._replace(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))
