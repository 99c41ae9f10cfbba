"""From text and messages to token ids: exactly one BOS where the tokenizer has one, exactly one EOS after a response.

Prompt and response are encoded apart and joined: that is what generation sees, and the prompt's ids are a prefix of
the whole by construction.

Special tokens are read as such in prompts and texts that are given as text, for those may be rendered conversations. In
messages the ones that mark turns are ordinary text, and a response never holds an EOS before its end (see :mod:`.literal`).
Markers that are no tokens, such as "[INST]" or "User:", can't be told from text.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import Piece, conversation_pieces, eos_token, prompt_pieces, response_piece
from rlhf_lightning.data.literal import literal, parts, without_eos
from rlhf_lightning.data.messages import Message, Prompt
from rlhf_lightning.data.tokenizers import encode_beginnings, encode_continuations, uses_bos
from rlhf_lightning.errors import UserError

Mask = Literal["completion", "assistant", "all"]
Tools = list[dict[str, Any]] | None


class Encoded(NamedTuple):
    """A prompt (BOS first) and a response (EOS last)."""

    prompt_ids: list[int]
    response_ids: list[int]


class Masked(NamedTuple):
    """A sequence and, for each token, whether it is learnt."""

    ids: list[int]
    mask: list[bool]


class Encoder:
    """A tokenizer with its conventions looked up once; encodes many rows in two calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError if the tokenizer has no EOS."""
        eos_token(tokenizer)
        self.tokenizer, self.bos, self.eos = tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.uses_bos = uses_bos(tokenizer)

    def encode_rows(self, rows: list[list[Piece]]) -> list[list[list[int]]]:
        """Ids of each piece of each row; the first piece of a row begins the sequence, the others follow it."""
        cut = [[parts(piece.text) for piece in row] for row in rows]
        begun = encode_beginnings(self.tokenizer, [row[0][0] for row in cut])
        followers = [text for row in cut for text in list(chain.from_iterable(row))[1:]]
        followed = iter(encode_continuations(self.tokenizer, followers))
        encoded = []
        for row, first in zip(cut, begun, strict=True):
            ids = chain([first], followed)
            encoded.append([list(chain.from_iterable(next(ids) for _ in piece)) for piece in row])
        return encoded

    def begin(self, ids: Sequence[int]) -> list[int]:
        """With exactly one BOS in front, where the tokenizer uses one or the text brought one."""
        start = 0
        while start < len(ids) and self.bos is not None and ids[start] == self.bos:
            start += 1
        return [self.bos, *ids[start:]] if start or self.uses_bos else list(ids)

    def end(self, ids: Sequence[int]) -> list[int]:
        """With exactly one EOS at the end."""
        stop = len(ids)
        while stop > 0 and ids[stop - 1] == self.eos:
            stop -= 1
        return [*ids[:stop], self.eos]

    def prompt_pieces(self, prompt: Prompt, tools: Tools = None) -> list[Piece]:
        """A prompt before tokenization; see :func:`rlhf_lightning.data.chat.prompt_pieces` for messages."""
        return (
            [Piece(literal(prompt, []), False)]
            if isinstance(prompt, str)
            else prompt_pieces(self.tokenizer, prompt, tools)
        )

    def pair_pieces(self, prompt: Prompt, responses: Sequence[Prompt], tools: Tools = None) -> list[Piece]:
        """A prompt and, as the last pieces, one for each response.

        Raises:
            UserError: If one is text and the other messages, or the template does not begin the whole with the prompt.
        """
        pieces = self.prompt_pieces(prompt, tools)
        text = "".join(piece.text for piece in pieces)
        for response in responses:
            if isinstance(prompt, str) and isinstance(response, str):
                eos = eos_token(self.tokenizer)
                pieces.append(Piece(literal(without_eos(response, eos), [eos]), True))
            elif isinstance(prompt, list) and isinstance(response, list):
                pieces.append(response_piece(self.tokenizer, prompt, text, response, tools))
            else:
                raise UserError("prompt and response must both be text or both be messages")
        return pieces

    def join_prompt(self, pieces: list[list[int]]) -> list[int]:
        """The ids of a prompt from those of its pieces.

        Raises:
            UserError: If there is none: nothing would predict the first token of the response.
        """
        ids = self.begin(list(chain.from_iterable(pieces)))
        if not ids:
            raise UserError("the tokenizer makes no token of the prompt, and it has no BOS")
        return ids

    def join_messages(self, pieces: list[Piece], ids: list[list[int]], mask: Mask) -> Masked:
        """Ids and mask of a conversation from its pieces.

        Raises:
            UserError: If there is no answer in it to learn.
        """
        answers = [number for number, piece in enumerate(pieces) if piece.answer]
        if not answers and mask != "all":
            raise UserError("the conversation has no assistant turn to learn from")
        if pieces[-1].answer:
            ids = [*ids[:-1], self.end(ids[-1])]
        learnt = {"all": range(len(pieces)), "assistant": answers, "completion": answers[-1:]}[mask]
        joined = list(chain.from_iterable(ids))
        flags = list(chain.from_iterable([number in learnt] * len(piece) for number, piece in enumerate(ids)))
        begun = self.begin(joined)
        head = [flags[0] if mask == "all" else False] * max(0, len(begun) - len(joined))
        return Masked(begun, [*head, *flags][-len(begun) :])


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: Prompt, tools: Tools = None) -> Encoded:
    """Ids of a prompt and of the response to it.

    Args:
        tokenizer: Must have EOS, and for messages a chat template.
        prompt: Text, or messages up to where the assistant begins.
        response: Text, or the messages that follow.
        tools: JSON schemas of tools, for templates that list them.

    Returns:
        Prompt ids with one BOS where the tokenizer uses one; response ids with exactly one EOS at the end.

    Raises:
        UserError: If the template writes another prompt once the response follows, or the two are of different kinds.
    """
    encoder = Encoder(tokenizer)
    *prompt_ids, response_ids = encoder.encode_rows([encoder.pair_pieces(prompt, [response], tools)])[0]
    return Encoded(encoder.join_prompt(prompt_ids), encoder.end(response_ids))


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], responses: Sequence[Prompt]
) -> list[Encoded]:
    """Many pairs as :func:`encode_pair` encodes one, in two calls of the tokenizer."""
    encoder = Encoder(tokenizer)
    plans = [encoder.pair_pieces(prompt, [response]) for prompt, response in zip(prompts, responses, strict=True)]
    return [Encoded(encoder.join_prompt(ids[:-1]), encoder.end(ids[-1])) for ids in encoder.encode_rows(plans)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Tools = None) -> list[int]:
    """Ids of a prompt, as :func:`encode_pair` gives them."""
    encoder = Encoder(tokenizer)
    return encoder.join_prompt(encoder.encode_rows([encoder.prompt_pieces(prompt, tools)])[0])


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], mask: Mask, tools: Tools = None
) -> Masked:
    """Ids of a conversation and which of them are learnt.

    Args:
        tokenizer: Must have EOS and a chat template.
        messages: The conversation.
        mask: "assistant": every assistant turn with its end of turn, never a header; "completion": the last such turn;
            "all": everything.
        tools: JSON schemas of tools, for templates that list them.

    Raises:
        UserError: If the assistant's turns can't be located, or there is none.
    """
    encoder = Encoder(tokenizer)
    pieces = conversation_pieces(tokenizer, messages, tools)
    return encoder.join_messages(pieces, encoder.encode_rows([pieces])[0], mask)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Masked:
    """BOS, text, EOS: all of it learnt."""
    encoder = Encoder(tokenizer)
    ids = encoder.begin(encoder.end(encode_beginnings(tokenizer, [text])[0]))
    return Masked(ids, [True] * len(ids))
