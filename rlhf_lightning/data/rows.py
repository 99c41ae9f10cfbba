"""What a row may hold, and its columns read one by one with an error that names the column."""

from dataclasses import dataclass
from typing import Any

from rlhf_lightning.data.messages import Message, Prompt, read_messages
from rlhf_lightning.errors import UserError

Row = dict[str, Any]

# Columns that hold text wherever they are not lists of messages.
TEXT_COLUMNS = (
    "text",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "rejected_response",
    "instruction",
    "input",
    "output",
    "system",
)


class NoSignalError(Exception):
    """A well-formed row with nothing to learn from; it is left out and counted."""


@dataclass(frozen=True)
class Example:
    """What a row says. Fields that its format does not have are None.

    Attributes:
        prompt: What is answered.
        completion: The demonstrated answer: text or messages, as the prompt is.
        chosen: The better answer.
        rejected: The worse answer.
        text: Plain text to model.
        messages: A whole conversation.
        label: Whether the completion was liked.
    """

    prompt: Prompt | None = None
    completion: Prompt | None = None
    chosen: Prompt | None = None
    rejected: Prompt | None = None
    text: str | None = None
    messages: list[Message] | None = None
    label: bool | None = None


def read_string(row: Row, column: str) -> str:
    """A column that must hold text.

    Raises:
        UserError: If it is missing, null, empty or not text.
    """
    value = row.get(column)
    if value is None:
        raise UserError(f"column '{column}' is missing or null")
    if not isinstance(value, str):
        raise UserError(f"column '{column}' holds {type(value).__name__} {value!r:.40} where text belongs")
    if not value.strip():
        raise UserError(f"column '{column}' is empty")
    return value


def read_optional(row: Row, column: str) -> str:
    """A column that may hold text; "" where it is missing, null or blank.

    Raises:
        UserError: If it holds anything else.
    """
    value = row.get(column)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else read_string(row, column)


def read_label(row: Row, column: str) -> bool:
    """A column that must hold true or false, or 1 or 0.

    Raises:
        UserError: If it holds anything else.
    """
    value = row.get(column)
    if value not in (True, False):
        raise UserError(f"column '{column}' is {value!r}; it must be true or false")
    return bool(value)


def read_prompt(row: Row) -> Prompt:
    """The column "prompt": text, or messages that end where the assistant is to answer.

    Raises:
        UserError: If it is empty or ends with the assistant.
    """
    if not isinstance(row.get("prompt"), list):
        return read_string(row, "prompt")
    messages = read_messages(row["prompt"], "prompt")
    if messages[-1]["role"] == "assistant":
        raise UserError("column 'prompt' ends with an assistant message; it must end where the assistant is to begin")
    return messages


def read_answer(row: Row, column: str, prompt: Prompt) -> Prompt:
    """Text after a text, messages after messages; a bare text after messages becomes the assistant's turn.

    Raises:
        UserError: If it is empty or does not begin with the assistant.
    """
    value = row.get(column)
    if isinstance(prompt, str) or not isinstance(value, list | dict):
        answer = read_string(row, column)
        return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    messages = read_messages(value, column)
    if messages[0]["role"] != "assistant":
        raise UserError(f"column '{column}' begins with a {messages[0]['role']} message; it must hold the answer alone")
    return messages
