"""Chat templates: from messages to text cut into pieces, of which the assistant's are known.

Pieces are tokenized apart and joined. So the tokens of a prompt are the beginning of the tokens of prompt and answer,
and no token spans both: it is what the model meets when it generates.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_lightning.data.literal import literal, turn_markers, without_eos
from rlhf_lightning.data.messages import Message
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

# Headers are ordinary text, so any vocabulary can spell them; a turn of the assistant ends with EOS and no other does.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Piece(NamedTuple):
    """Part of a rendered conversation; ``answer`` is True on what the assistant says, end of turn included.

    The text may hold breaks, see :mod:`.literal`.
    """

    text: str
    answer: bool


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a plain chat template where it has none; True if it was given one."""
    if tokenizer.chat_template:
        return False
    log.warning("the tokenizer has no chat template; using plain 'User:' and 'Assistant:' headers")
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return True


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where its template marks the assistant's part (nowhere, if it does not).

    Raises:
        UserError: If there is no template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the rows are conversations and the tokenizer has no chat template; set tokenizer.chat_template"
        )
    template = tokenizer.get_chat_template(None, tools)
    arguments: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        rendered: Any = render_jinja_template(
            conversations=[[speakable(tokenizer, message) for message in messages]],
            tools=tools,  # type: ignore[arg-type]
            chat_template=template,
            return_assistant_tokens_mask=bool(GENERATION.search(template)),
            add_generation_prompt=add_generation_prompt,
            **arguments,
        )
    except (TemplateError, TypeError) as error:  # a template may add a number to a text
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses a conversation of {roles}: {error}") from error
    texts, spans = rendered
    return texts[0], [(start, end) for start, end in (spans[0] if spans else [])]


def speakable(tokenizer: PreTrainedTokenizerBase, message: Message) -> Message:
    """A message as templates take it: no nulls, and content that can't end or begin a turn."""
    said = str(message["content"] or "")
    if message["role"] == "assistant":
        said = without_eos(said, eos_token(tokenizer))
    given = {name: value for name, value in message.items() if value is not None}
    return {**given, "content": literal(said, turn_markers(tokenizer))}


def answer_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    tools: list[dict[str, Any]] | None = None,
) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in the text, by rendering one turn more at a time.

    Raises:
        UserError: If the template changes what it wrote before once a turn is added, so that no such place exists.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise UserError("the conversation begins with the assistant; its chat template needs generation markers")
        before, _ = render(tokenizer, messages[:turn], add_generation_prompt=True, tools=tools)
        after, _ = render(tokenizer, messages[: turn + 1], tools=tools)
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            raise UserError(
                f"the chat template writes the beginning of a conversation differently once turn {turn + 1} is added; "
                "use one with {% generation %} markers, or mask 'completion'"
            )
        spans.append((len(before), min(len(after), len(text))))
    return spans


def close_turn(text: str, eos: str) -> str:
    """The assistant's text without the whitespace that a template writes after EOS."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(eos) else text


def conversation_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> list[Piece]:
    """A whole conversation in pieces; what follows the last answer's end of turn is cut off.

    Raises:
        UserError: See :func:`render` and :func:`answer_spans`.
    """
    text, spans = render(tokenizer, messages, tools=tools)
    if not GENERATION.search(tokenizer.get_chat_template(None, tools)):
        spans = answer_spans(tokenizer, messages, text, tools)
    return cut(text, spans, eos_token(tokenizer), ends_with_answer=messages[-1]["role"] == "assistant")


def cut(text: str, spans: list[tuple[int, int]], eos: str, *, ends_with_answer: bool) -> list[Piece]:
    """Cut a text at its spans; an EOS right behind a span belongs to it, whitespace behind EOS does not."""
    pieces, position = [], 0
    for number, (start, end) in enumerate(spans):
        if ends_with_answer and number == len(spans) - 1:
            end = len(text)
        elif text.startswith(eos, end):
            end += len(eos)
        answer = close_turn(text[start:end], eos)
        pieces += [Piece(text[position:start], False), Piece(answer, True)]
        position = start + len(answer)
    if not (ends_with_answer and spans):
        pieces.append(Piece(text[position:], False))
    return pieces


def prompt_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> list[Piece]:
    """A conversation up to where the assistant is to speak, in the pieces that a longer one would be cut into."""
    text, spans = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
    if not GENERATION.search(tokenizer.get_chat_template(None, tools)):
        spans = answer_spans(tokenizer, messages, text, tools)
    return cut(text, spans, eos_token(tokenizer), ends_with_answer=False)


def response_piece(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    prompt_text: str,
    response: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
) -> Piece:
    """What the template adds to the text of the prompt when the response follows.

    Raises:
        UserError: If the prompt's text is not the beginning of the whole: the model would be trained on another prompt
            than it generates from.
    """
    whole, _ = render(tokenizer, [*prompt, *response], tools=tools)
    if not whole.startswith(prompt_text):
        raise UserError(
            "the chat template writes a prompt differently once the answer follows: the prompt's tokens would not be a "
            "prefix of the whole; give the tokenizer another template"
        )
    return Piece(close_turn(whole[len(prompt_text) :], eos_token(tokenizer)), True)


def eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The end-of-sequence token.

    Raises:
        UserError: If there is none: nothing would teach the model to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so no response could end; set tokenizer.eos_token")
    return str(tokenizer.eos_token)
