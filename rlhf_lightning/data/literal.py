"""Text that must stay text: what a message says can neither end a turn nor begin one.

A tokenizer reads "</s>" wherever it stands as its end-of-sequence token. In what a template writes that is meant; in what a
user or an assistant said, in a tool's schema, its arguments or its result, it would end the response early, or forge a turn.
So such strings are broken in two there, and the parts are tokenized apart: they come out as the ordinary tokens that spell
them.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

# Stands where text is broken: noncharacters, which Unicode leaves to programs. Its end is not its beginning, so that two
# can't overlap, and text that holds it is given back whole.
BREAK = "\ufdd0\ufdd1\ufdd1"

# Tags such as <think> and </tool_call>, which answers hold as text: templates look for them there.
TAG = re.compile(r"</?\w+>")
# Some templates build the markers of turns from the role, so that they don't stand in the template.
ROLE_NAMES = {"system", "developer", "user", "human", "assistant", "model", "tool", "ipython"}


class ControlTokens(NamedTuple):
    """Tokens that text must not spell, each sorted.

    Attributes:
        turns: Those that say where sequences and turns begin and end: BOS, EOS, padding and those of the chat template.
        all: These and every other special token.
    """

    turns: list[str]
    all: list[str]


_CONTROL: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, ControlTokens]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The tokens of a tokenizer that text must not spell, looked up once."""
    ends = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    state = (len(tokenizer), str(tokenizer.chat_template), *ends)
    known, found = _CONTROL.get(tokenizer, (None, ControlTokens([], [])))
    if known != state:
        template = str(tokenizer.chat_template or "")
        added = list(tokenizer.added_tokens_decoder.values())
        special = {token.content for token in added if token.special} | {str(token) for token in ends if token}
        # Some tokenizers don't call the markers of their turns special.
        written = {token.content for token in added if token.content in template and not TAG.fullmatch(token.content)}
        roles = {token for token in special if token.strip("<|>[]/▁ ").lower() in ROLE_NAMES}
        turns = {str(token) for token in ends if token} | {t for t in special if t in template} | written | roles
        found = ControlTokens(*(sorted(token for token in some if len(token) > 1) for some in (turns, turns | special)))
        _CONTROL[tokenizer] = (state, found)
    return found


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that say where sequences and turns begin and end: BOS, EOS, padding and those of the chat template.

    An answer may hold special tokens that the template does not know: who adds some to a tokenizer means the model to say
    them.
    """
    return control_tokens(tokenizer).turns


def literal(text: str, markers: Iterable[str]) -> str:
    """The text with a break inside every marker, and inside what it has of breaks; :func:`parts` takes it apart again."""
    text = text.replace(BREAK, BREAK[0] + BREAK + BREAK[1:])
    for marker in markers:
        while marker in text:
            text = text.replace(marker, marker[0] + BREAK + marker[1:])
    return text


def literal_leaves(value: Any, markers: Iterable[str]) -> Any:
    """A nested value with :func:`literal` applied to every text in it, keys included."""
    if isinstance(value, str):
        return literal(value, markers)
    if isinstance(value, dict):
        return {literal_leaves(key, markers): literal_leaves(item, markers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [literal_leaves(item, markers) for item in value]
    return value


def parts(text: str) -> list[str]:
    """What is to be tokenized apart."""
    return text.split(BREAK)


def without_eos(text: str, eos: str) -> str:
    """An answer without the EOS, or several, that its author wrote behind it: it gets one anyway."""
    while text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text
