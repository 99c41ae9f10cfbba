"""An :class:`Example` as a row, or several, of the kind that is wanted."""

from collections.abc import Callable

from rlhf_lightning.data.loss_flags import without_flags
from rlhf_lightning.data.messages import Prompt, split_at_answer
from rlhf_lightning.data.ranked import as_pairs, as_ranking, best
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
        if example.messages[-1]["role"] != "assistant":
            split_at_answer(example.messages, "messages")
        return {"messages": example.messages}
    answer = example.completion if example.completion is not None else example.chosen or best(example)
    if answer is None:
        raise UserError("a prompt alone demonstrates nothing; add a column 'completion'")
    if example.label is False:
        raise NoSignalError("a disliked completion")
    if is_blank(answer):
        raise NoSignalError("an empty answer")
    return {"prompt": example.prompt, "completion": answer}


def is_blank(answer: Prompt) -> bool:
    """Whether an answer is text, or one message, that says nothing."""
    if isinstance(answer, str):
        return not answer.strip()
    only = answer[0]
    return len(answer) == 1 and not any(only.get(key) for key in only if key != "role")


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


def as_preferences(example: Example) -> Row | list[Row]:
    """A pair, or every pair of a ranking; see :func:`as_preference`."""
    return as_preference(example) if example.completions is None else as_pairs(example)


def as_unpaired(example: Example) -> Row | list[Row]:
    """``prompt``, ``completion`` and ``label``; of a pair the chosen answer as a liked one and the rejected as a disliked one.

    Raises:
        NoSignalError: If both answers of a pair are the same.
        UserError: If the row judges nothing.
    """
    if example.chosen is not None:
        sides = as_preference(example)
        answers = ((sides["chosen"], True), (sides["rejected"], False))
        return [{"prompt": example.prompt, "completion": answer, "label": label} for answer, label in answers]
    if example.completion is None or example.label is None:
        raise UserError("nobody liked or disliked anything: add a column 'label' (true or false) beside the completion")
    return {"prompt": example.prompt, "completion": example.completion, "label": example.label}


def as_stepwise(example: Example) -> Row:
    """``prompt``, ``completions`` (the steps, as text) and ``labels``, one a step.

    Raises:
        NoSignalError: If no step has a label.
        UserError: If the row has no steps.
    """
    if example.steps is None or example.step_labels is None:
        raise UserError("no steps with a verdict each: add columns 'completions' (the steps) and 'labels' or 'ratings'")
    if all(label is None for label in example.step_labels):
        raise NoSignalError("no label on any step")
    return {"prompt": example.prompt, "completions": example.steps, "labels": example.step_labels}


def as_prompt(example: Example) -> Row:
    """``prompt``: that of the row, or its conversation up to the last answer.

    Raises:
        UserError: If the row is plain text, of which no part is a prompt.
    """
    prompt: Prompt
    if example.prompt is not None:
        prompt = example.prompt
    elif example.messages is None:
        raise UserError("plain text has no prompt; give a column 'prompt'")
    elif example.messages[-1]["role"] != "assistant":
        prompt = example.messages
    else:
        prompt = split_at_answer(example.messages, "messages")[0]
    return {"prompt": prompt if isinstance(prompt, str) else without_flags(prompt)}


VIEWS: dict[Kind, Callable[[Example], Row | list[Row]]] = {
    "demonstrations": as_demonstration,
    "preferences": as_preferences,
    "unpaired": as_unpaired,
    "stepwise": as_stepwise,
    "prompts": as_prompt,
    "rankings": as_ranking,
}
