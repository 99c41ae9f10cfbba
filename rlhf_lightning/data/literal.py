"""Text that must stay text: what a message says can neither end a turn nor begin one.

A tokenizer reads "</s>" wherever it stands as its end-of-sequence token. In what a template writes that is meant; in what a
user or an assistant said it would end the response early, or forge a turn. So such strings are broken in two there, and the
halves are tokenized apart: they come out as the ordinary tokens that spell them.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

# Stands where text is broken: noncharacters, which Unicode leaves to programs. Its end is not its beginning, so that two
# can't overlap, and text that holds it is given back whole.
BREAK = "\ufdd0\ufdd1\ufdd1"

_MARKERS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, list[str]]] = WeakKeyDictionary()


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that say where sequences and turns begin and end: BOS, EOS, padding and those of the chat template.

    Special tokens that the template does not know are left alone in messages too: who adds some means them.
    """
    ends = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    state = (len(tokenizer), tokenizer.chat_template, *ends)
    known, markers = _MARKERS.get(tokenizer, (None, []))
    if known != state:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        template = str(tokenizer.chat_template or "")
        named = {str(token) for token in ends if token} | {token for token in added if token in template}
        markers = sorted(token for token in named if len(token) > 1)
        _MARKERS[tokenizer] = (state, markers)
    return markers


def literal(text: str, markers: Iterable[str]) -> str:
    """The text with a break inside every marker, and inside what it has of breaks; :func:`parts` takes it apart again."""
    text = text.replace(BREAK, BREAK[0] + BREAK + BREAK[1:])
    for marker in markers:
        while marker in text:
            text = text.replace(marker, marker[0] + BREAK + marker[1:])
    return text


def parts(text: str) -> list[str]:
    """What is to be tokenized apart."""
    return text.split(BREAK)


def without_eos(text: str, eos: str) -> str:
    """An answer without the EOS, or several, that its author wrote behind it: it gets one anyway."""
    while text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text
