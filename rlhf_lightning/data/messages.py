"""Conversations: what a message is, and how other spellings of one become ``{"role", "content"}``."""

import re
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.data.loss_flags import FLAGS, read_flag
from rlhf_lightning.errors import UserError

Message = dict[str, Any]
Prompt = str | list[Message]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "developer": "system",
}
# What an assistant message may hold in place of content.
SAID_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
KNOWN_ROLES = ("system", "user", "assistant", "tool")

HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_conversation(value: object) -> bool:
    """True for a list of messages, in either spelling."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and ("role" in value[0] or "from" in value[0])
    )


def read_message(value: object, column: str, *, may_be_empty: bool = False) -> Message:
    """One message as ``{"role", "content"}`` and whatever else it carried (``tool_calls``, ``name``).

    A message that is not to be learnt has ``train`` false, see :mod:`.loss_flags`.

    Raises:
        UserError: If it has no known role, or no content where the role needs some.
    """
    if not isinstance(value, dict):
        raise UserError(f"column '{column}' holds {value!r:.60} where a message {{role, content}} belongs")
    given = value.get("role") or value.get("from")
    role = ROLES.get(str(given), given)
    if role not in KNOWN_ROLES:
        raise UserError(
            f"column '{column}' has a message with role {given!r}; known: {', '.join([*KNOWN_ROLES, *ROLES])}"
        )
    said = value.get("content")
    content = flatten_content(value.get("value") if said is None else said, column)
    says_something = role == "assistant" and any(value.get(name) for name in SAID_BESIDE_CONTENT)
    if not content.strip() and role != "tool" and not says_something and not may_be_empty:
        raise UserError(f"column '{column}' has an empty {role} message")
    spelt = ("role", "from", "content", "value", *FLAGS)
    extras = {k: v for k, v in value.items() if k not in spelt and v is not None}
    return {"role": role, "content": content, **extras, **read_flag(value, column)}


def flatten_content(content: object, column: str) -> str:
    """The text of a message whose content is text, null (a bare tool call), or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    raise UserError(
        f"column '{column}' has message content that is not text: {content!r:.60}; images are not supported"
    )


def read_messages(value: object, column: str, *, may_be_empty: bool = False) -> list[Message]:
    """A list of messages in canonical spelling; ``may_be_empty`` is about the last one's content.

    Raises:
        UserError: If the list is missing or empty, or a message is malformed.
    """
    if isinstance(value, dict):  # ShareGPT pairs hold one answer as a bare message
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"column '{column}' is {'empty' if value in (None, [], '') else 'not a list of messages'}")
    last = len(value) - 1
    return [
        read_message(message, column, may_be_empty=may_be_empty and index == last)
        for index, message in enumerate(value)
    ]


def answer_start(messages: Sequence[Message]) -> int:
    """Index of the first message of the last assistant turn; the number of messages where they do not end with one."""
    start = len(messages)
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    return start


def split_at_answer(messages: Sequence[Message], column: str) -> tuple[list[Message], list[Message]]:
    """The conversation up to its last assistant turn, and that turn.

    Raises:
        UserError: If it does not end with the assistant, or nothing comes before.
    """
    if messages[-1]["role"] != "assistant":
        raise UserError(f"column '{column}' ends with a {messages[-1]['role']} message; the answer must come last")
    start = answer_start(messages)
    if not start:
        raise UserError(f"column '{column}' has an answer and no prompt")
    return list(messages[:start]), list(messages[start:])


def is_hh(text: object) -> bool:
    """True for a dialogue in the manner of Anthropic's hh-rlhf: headers in the text."""
    return isinstance(text, str) and "\n\nAssistant:" in text and text.lstrip().startswith("Human:")


def parse_hh(text: str) -> list[Message]:
    r"""Messages of ``"\n\nHuman: ...\n\nAssistant: ..."``; empty ones are kept, for some of the real ones are.

    Raises:
        UserError: If the text does not begin with a header.
    """
    if not is_hh(text):
        raise UserError(r"a dialogue must read '\n\nHuman: ...\n\nAssistant: ...'")
    parts = HH_TURN.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[header], "content": content.strip()} for header, content in turns]
