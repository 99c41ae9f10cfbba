"""What a row may hold, and its columns read one by one with an error that names the column."""

from dataclasses import dataclass
from typing import Any

from rlhf_lightning.data.loss_flags import without_flags
from rlhf_lightning.data.messages import Message, Prompt, read_messages
from rlhf_lightning.errors import UserError

Row = dict[str, Any]
WEIGHT = "weight"  # the column of what a row weighs in a loss
LARGEST_WEIGHT = 1e30
ROW_INDEX = "index of the row"  # the column of where a row is in its source, from 0 on; no file has one of that name

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
        completions: Several answers.
        ranks: Of each of them; the lowest is the best, equal ones are tied.
        steps: The completion step by step, as text.
        step_labels: For each, the probability that it is right; None where nobody said.
    """

    prompt: Prompt | None = None
    completion: Prompt | None = None
    chosen: Prompt | None = None
    rejected: Prompt | None = None
    text: str | None = None
    messages: list[Message] | None = None
    label: bool | None = None
    completions: list[Prompt] | None = None
    ranks: list[float] | None = None
    steps: list[str] | None = None
    step_labels: list[float | None] | None = None


def read_string(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    """A column that must hold text; text of whitespace alone is empty.

    Raises:
        UserError: If it is missing, null or not text, or empty and ``may_be_empty`` is false.
    """
    value = row.get(column)
    if value is None:
        raise UserError(f"column '{column}' is missing or null")
    if not isinstance(value, str):
        raise UserError(f"column '{column}' holds {type(value).__name__} {value!r:.40} where text belongs")
    if not value.strip():
        if may_be_empty:
            return ""
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


def read_step_label(value: object, column: str) -> float | None:
    """The probability that a step is right, or true or false; None where nobody said.

    Raises:
        UserError: If it is anything else.
    """
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        advice = "; ratings -1, 0, 1 belong in a column 'ratings'" if value == -1 else ""
        raise UserError(
            f"column '{column}' holds {value!r:.40}; a label is true, false or a number from 0 to 1{advice}"
        )
    return float(value)


def read_rating(value: object, column: str) -> float | None:
    """A rating -1 (wrong), 0 (neutral) or 1 (right); None where nobody rated.

    Raises:
        UserError: If it is anything else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (-1, 0, 1):
        raise UserError(f"column '{column}' holds {value!r:.40}; a rating is -1, 0 or 1, or null")
    return float(value)


def read_weight(row: Row) -> float:
    """What the row weighs in the loss: the column "weight", 1 where it is absent or null.

    Raises:
        UserError: If it is no positive number.
    """
    weight = row.get(WEIGHT)
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < LARGEST_WEIGHT:
        raise UserError(
            f"column '{WEIGHT}' is {weight!r:.40}; it must be a positive number (leave out rows without weight)"
        )
    return float(weight)


def read_prompt(row: Row) -> Prompt:
    """The column "prompt": text, or messages; where these end with the assistant, the answer continues the last of them.

    Raises:
        UserError: If it is empty or ends with a tool call.
    """
    if not isinstance(row.get("prompt"), list):
        return read_string(row, "prompt")
    messages = read_messages(row["prompt"], "prompt")
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        raise UserError(
            "column 'prompt' ends with an assistant message without text, such as a tool call: nothing can continue it; add "
            "the tool's result, or leave the message out"
        )
    return messages


def read_answer(row: Row, column: str, prompt: Prompt, *, may_be_empty: bool = False) -> Prompt:
    """Text after a text, messages after messages; a bare text after messages becomes the assistant's turn.

    Messages may repeat the prompt before the answer. An answer that ``may_be_empty`` is taught as EOS alone.

    Raises:
        UserError: If it is empty or does not begin with the assistant.
    """
    value = row.get(column)
    if isinstance(prompt, str) or not isinstance(value, list | dict):
        answer = read_string(row, column, may_be_empty=may_be_empty)
        return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    messages = read_messages(value, column, may_be_empty=may_be_empty)
    if len(messages) > len(prompt) and without_flags(messages[: len(prompt)]) == without_flags(prompt):
        messages = messages[len(prompt) :]
    if messages[0]["role"] != "assistant":
        raise UserError(
            f"column '{column}' begins with a {messages[0]['role']} message; it must hold the answer alone, or the complete "
            "prompt before it"
        )
    return messages
