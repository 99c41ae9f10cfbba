"""Conversations: what a message is, and how other spellings of one become ``{"role", "content"}``."""

import re
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.data.loss_flags import FLAGS, read_flag
from rlhf_lightning.data.tool_calls import parse_json, read_tool_calls
from rlhf_lightning.errors import UserError

Message = dict[str, Any]
Prompt = str | list[Message]

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "developer": "system",
}
KNOWN_ROLES = ("system", "user", "assistant", "tool")
# Other names of the keys of a message.
SPEAKER_KEYS = ("speaker", "author", "sender", "who", "name", "participant", "agent")
SPOKEN_KEYS = ("text", "message", "utterance", "said", "body", "msg")
REASONING = ("reasoning_content", "reasoning", "thinking")  # what the assistant thinks before it speaks
TEXT_PARTS = ("text", "input_text", "output_text")

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

    Args:
        value: The message.
        column: What errors call its column.
        may_be_empty: Whether the assistant may say nothing at all, as a rejected response may.

    Raises:
        UserError: If it has no known role, or no content where the role needs some.
    """
    if not isinstance(value, dict):
        raise UserError(f"column '{column}' holds {value!r:.60} where a message {{role, content}} belongs")
    given, said = value.get("role") or value.get("from"), value.get("content")
    if len(value) == 2 and given in KNOWN_ROLES and isinstance(said, str) and said.strip():
        return {"role": given, "content": said}  # as nearly all messages are, and there is nothing more to read
    if given is None:
        raise UserError(
            f"column '{column}' has a message without a role, with keys {', '.join(value)}; {key_advice(value)}"
        )
    role = read_role(given)
    if role is None:
        raise UserError(
            f"column '{column}' has a message with role {given!r}; known: {', '.join([*KNOWN_ROLES, *ROLES])}; "
            f"others are named in data.columns: {{roles: {{{given}: user}}}}"
        )
    if "tool_calls" in value or "function_call" in value:
        value = read_tool_calls(value)
    said = value.get("content")
    content = flatten_content(value.get("value") if said is None else said, column)
    if not content.strip() and role != "tool" and not (role == "assistant" and (may_be_empty or says_otherwise(value))):
        raise UserError(f"column '{column}' has an empty {role} message")
    spelt = ("role", "from", "content", "value", *FLAGS)
    extras = {k: v for k, v in value.items() if k not in spelt and v is not None}
    return {"role": role, "content": content, **extras, **read_flag(value, column)}


def says_otherwise(message: Message) -> bool:
    """Whether a message without content says something all the same."""
    return any(message.get(key) for key in ("tool_calls", *REASONING))


def read_role(name: object) -> str | None:
    """The role of a speaker, whatever the case of its name; None where it is unknown."""
    if isinstance(name, str) and name in KNOWN_ROLES:
        return name
    folded = str(name).strip().lower()
    role = ROLES.get(folded, folded)
    return role if role in KNOWN_ROLES else None


def key_advice(message: Message) -> str:
    """How to name the keys of a message that are spelt otherwise."""
    role, content = likely_keys([message])
    return f"name them: data.columns: {{role: {role or '...'}, content: {content or '...'}}}"


def likely_keys(messages: Sequence[Message]) -> tuple[str | None, str | None]:
    """The keys under which messages most likely have their role and their content."""
    texts = [key for key in messages[0] if all(isinstance(message.get(key), str) for message in messages)]
    usual = [key for key in ("role", "from", *SPEAKER_KEYS) if key in texts]
    spoken = [key for key in ("content", "value", *SPOKEN_KEYS) if key in texts]
    readable = [key for key in texts if all(read_role(message[key]) for message in messages)]
    role = next((key for key in (*usual, *readable, *texts) if key not in spoken), None)
    return role, next((key for key in (*spoken, *texts[::-1]) if key != role), None)


def flatten_content(content: object, column: str) -> str:
    """The text of a message whose content is text, null (a bare tool call), or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [text_of(part) for part in parts]
    if None not in texts:
        return "".join(map(str, texts))
    other = parts[texts.index(None)]
    media = isinstance(other, dict) and any(word in str(other.get("type")) for word in ("image", "audio", "video"))
    reason = f"; {other['type']} parts are not supported" if isinstance(other, dict) and media else ""
    raise UserError(f"column '{column}' has message content that is not text: {content!r:.60}{reason}")


def text_of(part: object) -> str | None:
    """The text of a part of a message, under whichever key it stands; None where the part is something else."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") not in TEXT_PARTS:
        return None
    return next((part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)


def read_messages(value: object, column: str, *, may_be_empty: bool = False) -> list[Message]:
    """A list of messages in canonical spelling; ``may_be_empty`` is about the last one's content.

    Raises:
        UserError: If the list is missing or empty, or a message is malformed.
    """
    if isinstance(value, dict):  # ShareGPT pairs hold one answer as a bare message
        value = [value]
    if isinstance(value, str) and value.strip():
        raise UserError(f"column '{column}' is text where messages belong: {not_messages(value)}")
    if not isinstance(value, list) or not value:
        raise UserError(f"column '{column}' is {'empty' if value in (None, [], '') else 'not a list of messages'}")
    last = len(value) - 1
    return [
        read_message(message, column, may_be_empty=may_be_empty and index == last)
        for index, message in enumerate(value)
    ]


def not_messages(text: str) -> str:
    """Why a text is no list of messages."""
    if text.lstrip().startswith(("[{'", "{'")):
        return "it is Python's spelling of a list, not JSON; write it with json.dumps"
    return "it is JSON, but no list of messages" if parse_json(text) is not None else f"not JSON, {text!r:.40}"


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
