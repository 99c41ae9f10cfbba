"""From text and messages to token ids: exactly one BOS where the tokenizer has one, exactly one EOS after a response.

Prompt and response are encoded apart and joined: that is what generation sees, and the prompt's ids are a prefix of
the whole by construction.

Special tokens are read as such in prompts and texts that are given as text, for those may be rendered conversations. In
messages and tools the ones that mark turns are ordinary text, and a response never holds an EOS before its end (see
:mod:`.literal`). Markers that are no tokens, such as "[INST]" or "User:", can't be told from text.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import Renderer, eos_token
from rlhf_lightning.data.literal import literal, parts, without_eos
from rlhf_lightning.data.messages import Message, Prompt
from rlhf_lightning.data.template_inputs import NOTHING, TemplateInputs, Tools, Variables
from rlhf_lightning.data.tokenizers import encode_beginnings, encode_continuations, uses_bos
from rlhf_lightning.data.turns import Piece, every_answer, everything, last_answer, pair_pieces, prompt_text
from rlhf_lightning.errors import UserError

Mask = Literal["completion", "assistant", "all"]


class Encoded(NamedTuple):
    """A prompt (BOS first) and a response (EOS last)."""

    prompt_ids: list[int]
    response_ids: list[int]


class Response(NamedTuple):
    """A response to a prompt of several.

    Attributes:
        ids: Token ids, EOS last unless it was cut off.
        skips: Start and stop, one pair after the other, of what is not scored: turns that are not the assistant's.
        scored: Number of tokens that are.
    """

    ids: list[int]
    skips: list[int]
    scored: int


class Masked(NamedTuple):
    """A sequence and, for each token, whether it is learnt."""

    ids: list[int]
    mask: list[bool]


class Encoder:
    """A tokenizer with its conventions looked up once; encodes many rows in two calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError if the tokenizer has no EOS."""
        self.eos_text = eos_token(tokenizer)
        self.tokenizer, self.bos, self.eos = tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.uses_bos = uses_bos(tokenizer)
        self._renderers: dict[bool, Renderer] = {}

    def renderer(self, inputs: TemplateInputs) -> Renderer:
        """The chat template with the tools and variables of a row; templates are looked up once, with and without tools.

        Raises:
            UserError: If the tokenizer has no chat template.
        """
        tools = inputs.tools is not None
        if tools not in self._renderers:
            self._renderers[tools] = Renderer(self.tokenizer, TemplateInputs([] if tools else None))
        return self._renderers[tools].given(inputs)

    def encode_rows(self, rows: list[list[Piece]]) -> list[list[list[int]]]:
        """Ids of each piece of each row; the first piece of a row begins the sequence, the others follow it."""
        cut = [[parts(piece.text) for piece in row] for row in rows]
        begun = each_once(encode_beginnings, self.tokenizer, [row[0][0] for row in cut])
        followers = []
        for row in cut:
            followers += row[0][1:]
            for texts in row[1:]:
                followers += texts
        followed = iter(each_once(encode_continuations, self.tokenizer, followers))
        encoded = []
        for row, ids in zip(cut, begun, strict=True):
            pieces = []
            for number, texts in enumerate(row):
                ids = next(followed) if number else ids
                for _ in texts[1:]:
                    ids = [*ids, *next(followed)]  # a new list: others may share the one that was encoded
                pieces.append(ids)
            encoded.append(pieces)
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

    def prompt_pieces(self, prompt: Prompt, inputs: TemplateInputs = NOTHING) -> list[Piece]:
        """A prompt before tokenization; see :func:`.turns.prompt_text` for messages."""
        if isinstance(prompt, str):
            return [Piece(literal(prompt, []), False, False)]
        return [Piece(prompt_text(self.renderer(inputs), prompt), False, False)]

    def pair_pieces(self, prompt: Prompt, responses: Sequence[Prompt], inputs: TemplateInputs = NOTHING) -> list[Piece]:
        """A prompt and the pieces of each response to it.

        Raises:
            UserError: If one is text and the other messages, or the template does not begin the whole with the prompt.
        """
        texts = [response for response in responses if isinstance(response, str)]
        if isinstance(prompt, str) and len(texts) == len(responses):
            eos = self.eos_text
            said = [literal(without_eos(response, eos), [eos]) for response in texts]
            return [
                *self.prompt_pieces(prompt),
                *(Piece(text, True, True, number) for number, text in enumerate(said, start=1)),
            ]
        if isinstance(prompt, str) or texts:
            raise UserError("prompt and response must both be text or both be messages")
        return pair_pieces(self.renderer(inputs), prompt, responses)  # type: ignore[arg-type]

    def join_prompt(self, pieces: list[list[int]]) -> list[int]:
        """The ids of a prompt from those of its pieces.

        Raises:
            UserError: If there is none: nothing would predict the first token of the response.
        """
        ids = self.begin(list(chain.from_iterable(pieces)))
        if not ids:
            raise UserError("the tokenizer makes no token of the prompt, and it has no BOS")
        return ids

    def join_responses(
        self, pieces: list[Piece], ids: list[list[int]], truncated: Sequence[bool | None] = ()
    ) -> tuple[list[int], list[Response]]:
        """The prompt's ids and the responses from the pieces of a row.

        Args:
            pieces: See :meth:`pair_pieces`.
            ids: Of each piece.
            truncated: Whether each response was cut off when it was sampled, so that it has no EOS; all have one otherwise.

        Raises:
            UserError: See :meth:`join_prompt`.
        """
        both = list(zip(pieces, ids, strict=True))
        prompt = self.join_prompt([own for piece, own in both if not piece.response])
        count = max(piece.response for piece in pieces)
        cut_off = [bool(flag) for flag in truncated] or [False] * count
        return prompt, [
            self._response([pair for pair in both if pair[0].response == number], cut_off[number - 1])
            for number in range(1, count + 1)
        ]

    def _response(self, both: list[tuple[Piece, list[int]]], truncated: bool) -> Response:
        ids = self.end(list(chain.from_iterable(own for _, own in both)))
        ids = ids[:-1] if truncated else ids
        skips, place = [], 0
        for piece, own in both:
            last = piece is both[-1][0]
            stop = len(ids) if last else min(place + len(own), len(ids))
            if not piece.scored and stop > place:
                skips += [place, stop]
            place = stop
        return Response(ids, skips, len(ids) - sum(skips[1::2]) + sum(skips[::2]))

    def join_sequence(self, pieces: list[Piece], ids: list[list[int]], *, truncated: bool = False) -> Masked:
        """Ids of a whole and which of them are scored, from its pieces; it has no EOS where it was ``truncated``."""
        if pieces[-1].answer:
            ids = [*ids[:-1], self.end(ids[-1])[: -1 if truncated else None]]
        joined = list(chain.from_iterable(ids))
        flags = list(chain.from_iterable([piece.scored] * len(own) for piece, own in zip(pieces, ids, strict=True)))
        # Only what comes before the first answer is looked through for BOS, which may be the same token as EOS.
        before = next((n for n, piece in enumerate(pieces) if piece.answer), len(pieces))
        opening = sum(map(len, ids[:before]))
        begun = [*self.begin(joined[:opening]), *joined[opening:]]
        head = [pieces[0].scored] * max(0, len(begun) - len(joined))
        return Masked(begun, [*head, *flags][-len(begun) :] if begun else [])


def each_once(
    encode: Callable[[PreTrainedTokenizerBase, list[str]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
) -> list[list[int]]:
    """The ids of texts, of which equal ones are encoded once and share a list: prompts with several answers, separators."""
    distinct = list(dict.fromkeys(texts))
    ids = dict(zip(distinct, encode(tokenizer, distinct), strict=True))
    return [ids[text] for text in texts]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: Prompt,
    tools: Tools = None,
    variables: Variables = None,
) -> Encoded:
    """Ids of a prompt and of the response to it.

    Args:
        tokenizer: Must have EOS, and for messages a chat template.
        prompt: Text, or messages up to where the assistant begins.
        response: Text, or the messages that follow.
        tools: JSON schemas of tools, for templates that list them.
        variables: Variables of the chat template beside those that the tokenizer was saved with.

    Returns:
        Prompt ids with one BOS where the tokenizer uses one; response ids with exactly one EOS at the end.

    Raises:
        UserError: If the template writes another prompt once the response follows, or the two are of different kinds.
    """
    encoder = Encoder(tokenizer)
    pieces = encoder.pair_pieces(prompt, [response], TemplateInputs(tools, variables))
    return _encoded(encoder, pieces, encoder.encode_rows([pieces])[0])


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[Prompt],
    inputs: Sequence[TemplateInputs] | None = None,
) -> list[Encoded]:
    """Many pairs as :func:`encode_pair` encodes one, in two calls of the tokenizer; ``inputs`` are of each row's template."""
    encoder = Encoder(tokenizer)
    rows = zip(prompts, responses, inputs or [NOTHING] * len(prompts), strict=True)
    plans = [encoder.pair_pieces(prompt, [response], own) for prompt, response, own in rows]
    return [_encoded(encoder, pieces, ids) for pieces, ids in zip(plans, encoder.encode_rows(plans), strict=True)]


def _encoded(encoder: Encoder, pieces: list[Piece], ids: list[list[int]]) -> Encoded:
    prompt, (response,) = encoder.join_responses(pieces, ids)
    return Encoded(prompt, response.ids)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Tools = None, variables: Variables = None
) -> list[int]:
    """Ids of a prompt, as :func:`encode_pair` gives them."""
    return encode_prompts(tokenizer, [prompt], [TemplateInputs(tools, variables)])[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], inputs: Sequence[TemplateInputs]
) -> list[list[int]]:
    """Ids of many prompts in one call of the tokenizer, each with the inputs of its template."""
    encoder = Encoder(tokenizer)
    plans = [encoder.prompt_pieces(prompt, own) for prompt, own in zip(prompts, inputs, strict=True)]
    return [encoder.join_prompt(ids) for ids in encoder.encode_rows(plans)]


def message_plans(renderer: Renderer, messages: Sequence[Message], mask: Mask) -> list[list[Piece]]:
    """The sequences that a conversation is learnt as, each in pieces.

    Raises:
        UserError: See :func:`.turns.last_answer`, :func:`.turns.every_answer` and :func:`.turns.everything`.
    """
    if mask == "assistant":
        return every_answer(renderer, messages)
    return [everything(renderer, messages) if mask == "all" else last_answer(renderer, messages)]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    mask: Mask,
    tools: Tools = None,
    variables: Variables = None,
) -> Masked:
    """Ids of a conversation in one sequence and which of them are learnt.

    Args:
        tokenizer: Must have EOS and a chat template.
        messages: The conversation.
        mask: "assistant": every assistant turn with its end of turn, never a header; "completion": the last such turn;
            "all": everything.
        tools: JSON schemas of tools, for templates that list them.
        variables: Variables of the chat template beside those that the tokenizer was saved with.

    Raises:
        UserError: If the assistant's turns can't be located, there is none, or the template writes earlier ones differently
            once others follow, so that one sequence does not hold what the model is given at each.
    """
    encoder = Encoder(tokenizer)
    plans = message_plans(encoder.renderer(TemplateInputs(tools, variables)), messages, mask)
    if len(plans) > 1:
        raise UserError(
            "the chat template writes earlier turns differently once another follows: each assistant turn is a sequence of "
            "its own; use mask 'completion', or tokenize_demonstrations"
        )
    return encoder.join_sequence(plans[0], encoder.encode_rows(plans)[0])


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Masked:
    """BOS, text, EOS: all of it learnt."""
    encoder = Encoder(tokenizer)
    ids = encoder.begin(encoder.end(encode_beginnings(tokenizer, [text])[0]))
    return Masked(ids, [True] * len(ids))
