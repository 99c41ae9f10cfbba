"""Whether a message is to be learnt: its ``weight``, ``loss``, ``train`` or ``trainable``, as several tools write it."""

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.errors import UserError

FLAGS = ("weight", "loss", "train", "trainable")
MASKED = "train"  # the key of a canonical message that is not to be learnt; its value is False

Message = dict[str, Any]


def read_flag(message: Message, column: str) -> Message:
    """``{"train": False}`` for a message that is not to be learnt, else nothing.

    Raises:
        UserError: If a flag is anything but true, false, 1, 0 or null.
    """
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            advice = "; to weigh a row, give it a column 'weight'" if name == "weight" else ""
            raise UserError(
                f"column '{column}' has a message whose '{name}' is {value!r:.40}; it must be true or false, or 1 or 0{advice}"
            )
    return {} if all(flags.values()) else {MASKED: False}


def is_learnt(message: Message) -> bool:
    """Whether the loss counts what the message says, if its role is one that is learnt."""
    return message.get(MASKED) is not False


def without_flags(messages: Sequence[Message]) -> list[Message]:
    """Messages as they are said: what they say about the loss is no part of them."""
    return [{name: value for name, value in message.items() if name != MASKED} for message in messages]
