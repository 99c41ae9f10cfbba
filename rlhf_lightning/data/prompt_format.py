"""Plain text or conversations: the format of the prompts that a model was trained on, recorded with its tokenizer."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ensure_chat_template
from rlhf_lightning.data.messages import Prompt

log = logging.getLogger(__name__)

PromptFormat = Literal["text", "messages"]
KEY = "prompt_format"  # in tokenizer_config.json
NAMES: dict[PromptFormat, str] = {"text": "plain text", "messages": "conversations"}
WARNED = "prompt_format_warned"  # attribute of a tokenizer


def format_of_rows(rows: Dataset) -> PromptFormat:
    """The format of canonical rows, which are all like the first."""
    first = rows[0]
    prompt = first["prompt"] if "prompt" in first else first.get("messages")
    return "messages" if isinstance(prompt, list) else "text"


def trained_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat | None:
    """The format that the export of a model records; None where it records none, as folders from elsewhere."""
    known = tokenizer.init_kwargs.get(KEY)
    return known if known in NAMES else None


def record_format(tokenizer: PreTrainedTokenizerBase, found: PromptFormat, origin: Any) -> None:
    """Record the format of the rows of a run, which is saved with the tokenizer.

    Conversations need a chat template: a tokenizer without one gets the plain one. Rows of plain text do not, and an export
    must not claim that the model knows it.

    Args:
        tokenizer: Of the data.
        found: The format of the training rows.
        origin: What the log calls the rows.
    """
    if found == "messages":
        ensure_chat_template(tokenizer)
    before = trained_format(tokenizer)
    if before not in (None, found):
        log.warning(
            "%s: the rows are %s, and the model that the run starts from was trained on %s",
            origin,
            NAMES[found],
            NAMES[before],
        )
    tokenizer.init_kwargs[KEY] = found


def match_format(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
    """Prepare the tokenizer of a trained model for these prompts; log a warning, once, where it was trained on others."""
    found: PromptFormat = "text" if all(isinstance(prompt, str) for prompt in prompts) else "messages"
    if found == "messages":
        ensure_chat_template(tokenizer)
    trained = trained_format(tokenizer)
    if trained not in (None, found) and not hasattr(tokenizer, WARNED):
        setattr(tokenizer, WARNED, True)
        log.warning(
            "the prompts are %s, and %s was trained on %s; give it prompts of that format",
            NAMES[found],
            tokenizer.name_or_path,
            NAMES[trained],
        )
