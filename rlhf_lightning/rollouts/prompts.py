"""Prompts as the dataset gave them, as a batch to generate from."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.collate import PromptCollator
from rlhf_lightning.data.encoding import encode_prompts
from rlhf_lightning.data.prompt_format import match_format
from rlhf_lightning.data.template_inputs import inputs_of_columns


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
        columns: What else is known of them, for rewards; ``tools`` and ``chat_template_kwargs`` go to the chat template.
        device: Where the ids are to be.
    """
    match_format(tokenizer, prompts)
    ids = encode_prompts(tokenizer, prompts, inputs_of_columns(columns, len(prompts)))
    rows = {"prompt_ids": ids, "prompt": list(prompts)}
    batch = PromptCollator(int(tokenizer.pad_token_id))((rows | columns, 1.0))
    return batch._replace(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))
