"""Where two texts that answer the same prompt part: never inside a word, never inside a turn."""

import re

from rlhf_lightning.data.loss_flags import without_flags
from rlhf_lightning.data.messages import Message
from rlhf_lightning.errors import UserError

# A word with the whitespace before it, so that whitespace always goes with the response that follows it.
WORD = re.compile(r"\s*\S+|\s+$")


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected response of two full texts.

    The prompt is what they share in whole words; where one text is the beginning of the other its last word goes to the
    response, for a response can't be empty. A character-wise prefix would cut "blue" and "black" after "bl".

    Raises:
        UserError: If they do not share their first word.
    """
    left, right = WORD.findall(chosen), WORD.findall(rejected)
    shared = common_prefix(left, right)
    if shared == min(len(left), len(right)):
        shared -= 1
    if shared <= 0:
        raise UserError(
            "'chosen' and 'rejected' share no prompt: they differ from the first word; give a column 'prompt'"
        )
    prompt = "".join(left[:shared])
    return prompt, "".join(left[shared:]), "".join(right[shared:])


def split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected turns of two full conversations; both responses begin with an assistant's turn.

    Raises:
        UserError: If they share no message that an assistant's turn follows.
    """
    shared = min(common_prefix(without_flags(chosen), without_flags(rejected)), len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not (
        chosen[shared]["role"] == rejected[shared]["role"] == "assistant" and chosen[shared - 1]["role"] != "assistant"
    ):
        shared -= 1
    if shared <= 0:
        raise UserError("'chosen' and 'rejected' share no prompt: no message before an answer is the same in both")
    return without_flags(chosen[:shared]), chosen[shared:], rejected[shared:]


def common_prefix(left: list, right: list) -> int:
    """How many leading elements are equal."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared
