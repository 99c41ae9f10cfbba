"""An :class:`Example` as a row of the kind that is wanted."""

from collections.abc import Callable

from rlhf_lightning.data.messages import split_at_answer
from rlhf_lightning.data.rows import Example, NoSignalError, Row
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.errors import UserError


def as_demonstration(example: Example) -> Row:
    """``text``, ``messages``, or ``prompt`` and ``completion``; the chosen side of a pair.

    Raises:
        NoSignalError: If the completion was disliked.
        UserError: If the row demonstrates nothing.
    """
    if example.text is not None:
        return {"text": example.text}
    if example.messages is not None:
        split_at_answer(example.messages, "messages")
        return {"messages": example.messages}
    answer = example.completion if example.completion is not None else example.chosen
    if answer is None:
        raise UserError("a prompt alone demonstrates nothing; add a column 'completion'")
    if example.label is False:
        raise NoSignalError("a disliked completion")
    return {"prompt": example.prompt, "completion": answer}


def as_preference(example: Example) -> Row:
    """``prompt``, ``chosen`` and ``rejected``.

    Raises:
        NoSignalError: If both are the same.
        UserError: If the row compares nothing.
    """
    if example.chosen is None:
        raise UserError("preferences need two answers to one prompt: columns 'prompt', 'chosen', 'rejected'")
    if example.chosen == example.rejected:
        raise NoSignalError("the same text as chosen and rejected")
    return {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}


def as_prompt(example: Example) -> Row:
    """``prompt``: that of the row, or its conversation up to the last answer.

    Raises:
        UserError: If the row is plain text, of which no part is a prompt.
    """
    if example.prompt is not None:
        return {"prompt": example.prompt}
    if example.messages is None:
        raise UserError("plain text has no prompt; give a column 'prompt'")
    if example.messages[-1]["role"] != "assistant":
        return {"prompt": example.messages}
    return {"prompt": split_at_answer(example.messages, "messages")[0]}


VIEWS: dict[Kind, Callable[[Example], Row]] = {
    "demonstrations": as_demonstration,
    "preferences": as_preference,
    "prompts": as_prompt,
}
