"""Where the assistant's turns are in a rendered conversation: its text cut into pieces, of which some are scored.

A prompt is one rendering with the generation prompt, as a model meets it when it generates. A response is what the rendering
of the complete conversation has after it. Pieces are tokenized apart and joined, so the tokens of a prompt are the beginning
of the tokens of prompt and response, and no token spans both.

Templates may write earlier turns differently once another follows; some take the reasoning out of them. So nothing is
assumed of earlier turns, unless several turns of one rendering are to be scored.
"""

import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_lightning.data.chat import OTHER_PROBE, PROBE, QUESTION, Renderer
from rlhf_lightning.data.loss_flags import is_learnt, without_flags
from rlhf_lightning.data.messages import Message, answer_start
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

_SHORTENED: set[str] = set()  # what generation prompts open and answers don't, that was logged


class Piece(NamedTuple):
    """Part of a text that is tokenized apart; it may hold breaks, see :mod:`.literal`.

    Attributes:
        text: The text.
        answer: Whether the assistant says it, end of turn included.
        scored: Whether the loss may count it.
        response: 0 in a prompt, else the index of the response, from 1.
    """

    text: str
    answer: bool
    scored: bool
    response: int = 0


class Span(NamedTuple):
    """Where a turn of the assistant is in a text; ``scored`` as in :class:`Piece`."""

    start: int
    stop: int
    scored: bool


def prompt_text(renderer: Renderer, messages: Sequence[Message]) -> str:
    """What the model continues: the conversation and the beginning of the assistant's turn.

    A conversation that ends with the assistant is continued where its last message ends.
    """
    if messages and messages[-1]["role"] == "assistant":
        return renderer.text(messages, unfinished=True)
    return opened(renderer, messages)


def opened(renderer: Renderer, messages: Sequence[Message]) -> str:
    """The conversation and the beginning of the assistant's next turn."""
    if not messages:
        return opening(renderer)
    text = renderer.text(messages, generation_prompt=True)
    if not text.rstrip().endswith(renderer.eos):
        return text
    # A template without a generation prompt, which may close the text with an EOS that no answer follows.
    try:
        answered = renderer.text([*messages, PROBE])
    except UserError:
        return text
    shared = common(text, answered)
    return text[:shared] if text[shared:].strip() == renderer.eos else text


def opening(renderer: Renderer) -> str:
    """What the template writes before the assistant's turn where that is the first of the conversation."""
    whole = renderer.text([PROBE])
    asked, told = renderer.text([QUESTION], generation_prompt=True), renderer.text([QUESTION])
    header = asked.removeprefix(told)
    if header and header != asked and header in whole:
        return whole[: whole.index(header) + len(header)]
    return whole[: common(whole, renderer.text([OTHER_PROBE]))]


def joined(prompt: Sequence[Message], response: Sequence[Message]) -> list[Message]:
    """The complete conversation; a prompt that ends with the assistant and what continues it are one message."""
    if not (prompt and response and prompt[-1]["role"] == response[0]["role"] == "assistant"):
        return [*prompt, *response]
    begun, rest = without_flags(prompt[-1:])[0], response[0]
    content = str(begun["content"] or "") + str(rest["content"] or "")
    return [*prompt[:-1], {**begun, **rest, "content": content}, *response[1:]]


def common(*texts: str) -> int:
    """Number of leading characters that the texts share."""
    return len(os.path.commonprefix(texts))  # noqa: RUF071  (of characters is what is wanted)


def response_start(
    renderer: Renderer, before: Sequence[Message], prompt: str, text: str, *, unfinished: bool = False
) -> int:
    """Where the assistant's turn begins in the rendering of a conversation that goes on after it.

    Args:
        renderer: The template.
        before: The messages before it.
        prompt: Their text with the generation prompt.
        text: The rendering.
        unfinished: Whether the turn continues the last message of the prompt.

    Returns:
        The length of ``prompt``; less where the generation prompt opens a block that the rendering of this answer does not
        have.

    Raises:
        UserError: If the template writes the earlier messages differently: the model would be trained on another prompt than
            it generates from.
    """
    if text.startswith(prompt):
        return len(prompt)
    history = prompt if unfinished else renderer.text(before) if before else ""
    start = common(prompt, text, prompt if unfinished else renderer.text([*before, PROBE]))
    if start < common(history, prompt):
        raise UserError(
            "the chat template writes the messages before an answer differently once the answer follows: the prompt's tokens "
            "would not be a prefix of the whole; give the tokenizer another template"
        )
    dropped = prompt[start:]
    if dropped not in _SHORTENED:
        _SHORTENED.add(dropped)
        log.warning(
            "the chat template begins a generation with %r, which its rendering of some answers in the rows does not have; "
            "these are learnt as rendered, without it",
            dropped,
        )
    return start


def response_spans(
    renderer: Renderer, prompt: Sequence[Message], response: Sequence[Message], text: str, start: int
) -> list[Span]:
    """The assistant's turns in the rendering of prompt and response, from ``start`` on.

    Raises:
        UserError: If they can't be located.
    """
    if len(response) == 1:
        return [Span(start, len(text), is_learnt(response[0]))]
    messages = joined(prompt, response)
    first = len(messages) - len(response)
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    starts = [start]
    for index in turns[1:]:
        before = opened(renderer, messages[:index])
        starts.append(response_start(renderer, messages[:index], before, text))
    limits = [*starts[1:], len(text)]
    stops = [
        len(text) if index == len(messages) - 1 else turn_end(renderer, messages[: index + 1], text, begin, limit)
        for index, begin, limit in zip(turns, starts, limits, strict=True)
    ]
    return [
        Span(begin, stop, is_learnt(messages[index])) for index, begin, stop in zip(turns, starts, stops, strict=True)
    ]


def turn_end(renderer: Renderer, messages: Sequence[Message], text: str, start: int, limit: int) -> int:
    """Where the last of these messages, the assistant's, ends in the rendering of a conversation that goes on after it.

    Raises:
        UserError: If it can't be located.
    """
    alone = renderer.text(messages)
    body = alone.rstrip()
    if text.startswith(body):
        return min(common(alone, text), limit)
    bare = body.removesuffix(renderer.eos)  # it may be written at the very end only
    if len(bare.rstrip()) >= start and text.startswith(bare.rstrip()):
        return min(common(bare, text), limit)
    # What precedes the end is written differently, such as a think block that only the last turn has.
    marker = next((marker for marker in renderer.markers if body.endswith(marker)), None)
    place = -1 if marker is None else text.find(marker, start, limit)
    if marker is None or place < 0:
        raise UserError(
            f"the chat template writes turn {len(messages)} differently once another follows, and without a token that ends "
            "it, so that the assistant's part can't be located; use a template with {% generation %} markers"
        )
    return place + len(marker)


def cut(text: str, spans: Sequence[Span], begin: int, eos: str, response: int = 0) -> list[Piece]:
    """The text from ``begin`` on, cut at its spans; an EOS right behind a span belongs to it.

    What follows the EOS of a span that ends the text is dropped; after any other span it belongs to the next piece.
    """
    pieces: list[Piece] = []
    position = begin
    for start, stop, scored in spans:
        stop += len(eos) if text.startswith(eos, stop) else 0
        answer = close_turn(text[start:stop], eos)
        if start > position or not pieces:
            pieces.append(Piece(text[position:start], False, False, response))
        pieces.append(Piece(answer, True, scored, response))
        position = len(text) if stop == len(text) else start + len(answer)
    if position < len(text) or not spans:
        pieces.append(Piece(text[position:], False, False, response))
    return pieces


def close_turn(text: str, eos: str) -> str:
    """The assistant's text without the whitespace that a template writes after EOS."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(eos) else text


def pair_pieces(renderer: Renderer, prompt: Sequence[Message], responses: Sequence[Sequence[Message]]) -> list[Piece]:
    """A prompt and the responses to it, which share the prompt's tokens.

    Raises:
        UserError: See :func:`response_start` and :func:`response_spans`.
    """
    asked, texts = prompt_text(renderer, prompt), [renderer.text(joined(prompt, response)) for response in responses]
    if renderer.has_clock and not all(text.startswith(asked) for text in texts):  # midnight may have passed
        asked, texts = (
            prompt_text(renderer, prompt),
            [renderer.text(joined(prompt, response)) for response in responses],
        )
    unfinished = bool(prompt) and prompt[-1]["role"] == "assistant"
    starts = [response_start(renderer, prompt, asked, text, unfinished=unfinished) for text in texts]
    start = min(starts, default=len(asked))
    pieces = [Piece(asked[:start], False, False)]
    for number, (response, text) in enumerate(zip(responses, texts, strict=True), start=1):
        spans = response_spans(renderer, prompt, response, text, start)
        # No empty piece before the first turn, which begins where the prompt ends.
        pieces += [piece for piece in cut(text, spans, start, renderer.eos, number) if piece.text or piece.answer]
    return pieces


def conversation_spans(renderer: Renderer, messages: Sequence[Message]) -> tuple[str, list[Span]] | None:
    """The rendering of a conversation and the assistant's turns in it; None where the template rewrites earlier turns.

    What is scored after a beginning of the conversation is then not what the model would be given there.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if renderer.marks_answers and not renderer.rewrites_answers:
        text, marked = renderer.marked(messages)
        if len(marked) == len(turns):
            learnt = [is_learnt(messages[index]) for index in turns]
            return text, [Span(*place, flag) for place, flag in zip(marked, learnt, strict=True)]
    text, spans = renderer.text(messages), []
    for index in turns:
        before, after = opened(renderer, messages[:index]), renderer.text(messages[: index + 1])
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            return None
        spans.append(Span(len(before), common(after, text), is_learnt(messages[index])))
    return text, spans


def conversation_pieces(renderer: Renderer, text: str, spans: Sequence[Span], *, complete: bool) -> list[Piece]:
    """A conversation in pieces.

    Args:
        renderer: The template.
        text: The rendering.
        spans: The assistant's turns.
        complete: Whether the last turn ends the conversation; what follows its end is then dropped.
    """
    if complete and spans:
        spans = [*spans[:-1], spans[-1]._replace(stop=len(text))]
    return cut(text, spans, 0, renderer.eos)


def last_answer(renderer: Renderer, messages: Sequence[Message]) -> list[Piece]:
    """A conversation of which the last answer is scored; what comes before it is a prompt.

    Raises:
        UserError: If it does not end with an answer, or nothing comes before; see also :func:`pair_pieces`.
    """
    start = answer_start(messages)
    if start == len(messages):
        raise UserError("the conversation has no assistant turn at its end to learn from")
    if not start:
        raise UserError("the conversation has an answer and no prompt; mask 'assistant' learns such answers")
    return pair_pieces(renderer, messages[:start], [messages[start:]])


def every_answer(renderer: Renderer, messages: Sequence[Message]) -> list[list[Piece]]:
    """A conversation of which every answer is scored: one sequence, or where the template rewrites earlier turns one each.

    Raises:
        UserError: If there is no answer; see also :func:`pair_pieces`.
    """
    runs = answers(messages)
    if not runs:
        raise UserError("the conversation has no assistant turn to learn from")
    if len(runs[0]) == len(messages):
        raise UserError("the conversation begins with the assistant and ends there: it has an answer and no prompt")
    found = conversation_spans(renderer, messages)
    if found is not None:
        return [conversation_pieces(renderer, *found, complete=runs[-1].stop == len(messages))]
    learnt = [run for run in runs if any(is_learnt(messages[index]) for index in run)]
    return [
        pair_pieces(renderer, messages[: run.start], [messages[run.start : run.stop]]) for run in learnt or runs[-1:]
    ]


def everything(renderer: Renderer, messages: Sequence[Message]) -> list[Piece]:
    """A conversation of which all is scored but messages that say otherwise.

    Raises:
        UserError: If a message says so and the template rewrites earlier turns, so that it can't be located.
    """
    if all(map(is_learnt, messages)):
        start = answer_start(messages)
        if start == len(messages):
            return [Piece(renderer.text(messages), False, True)]
        return [piece._replace(scored=True) for piece in pair_pieces(renderer, messages[:start], [messages[start:]])]
    found = conversation_spans(renderer, messages)
    if found is None:
        raise UserError(
            "a message is not to be learnt, and the chat template writes earlier turns differently once another follows, so "
            "that it can't be located; use mask 'assistant'"
        )
    text, spans = found
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    pieces = conversation_pieces(renderer, text, spans, complete=turns[-1:] == [len(messages) - 1])
    reached, marked = 0, []
    for piece in pieces:  # what stands between two answers holds the messages between them
        stop = next((turn for turn in turns if turn >= reached), len(messages))
        marked.append(piece if piece.answer else piece._replace(scored=all(map(is_learnt, messages[reached:stop]))))
        reached = stop + 1 if piece.answer else reached
    return marked


def answers(messages: Sequence[Message]) -> list[range]:
    """The assistant's turns, each of one message or several that follow one another."""
    runs: list[range] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
