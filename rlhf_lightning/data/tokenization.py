"""Canonical rows to token ids, once, cached: what the collators pad into batches."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.annotations import read_probability
from rlhf_lightning.data.bad_rows import BadRows, Places
from rlhf_lightning.data.cache import cached_map
from rlhf_lightning.data.chat import Piece, conversation_pieces
from rlhf_lightning.data.encoding import Encoded as Encoded
from rlhf_lightning.data.encoding import Encoder, Mask, Masked, Tools
from rlhf_lightning.data.encoding import encode_messages as encode_messages
from rlhf_lightning.data.encoding import encode_pair as encode_pair
from rlhf_lightning.data.encoding import encode_pairs as encode_pairs
from rlhf_lightning.data.encoding import encode_prompt as encode_prompt
from rlhf_lightning.data.encoding import encode_text as encode_text
from rlhf_lightning.data.limits import LARGEST, Limit, apply, longest
from rlhf_lightning.data.literal import literal
from rlhf_lightning.data.prompt_split import prompt_key as prompt_key
from rlhf_lightning.data.prompt_split import split_by_prompt as split_by_prompt
from rlhf_lightning.data.rows import BAD, INDEX, ROW_PLACE, WEIGHT, Row, read_weight
from rlhf_lightning.data.tokenizers import tokenizer_fingerprint
from rlhf_lightning.data.tool_calls import with_objects
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

CacheDir = str | os.PathLike[str] | None
Plan = Callable[[Row], list[Piece]]
Join = Callable[[Row, list[Piece], list[list[int]]], Row]
IDS = List(Value("int32"))
FULL_LENGTH = "full_length"  # of a demonstration before it was cut
LARGEST_MARGIN = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Tokenization:
    """How canonical rows of one kind become token ids.

    Attributes:
        kind: What errors call the rows.
        encoder: The tokenizer.
        plan: Cuts a row into the pieces that are encoded.
        join: Makes the new columns of the row, its pieces and their ids.
        features: Types of the new columns; ``length`` is one of them.
        limits: What becomes of rows that are too long or teach nothing.
        settings: What the new columns depend on beside row and tokenizer; plain data.
        weight: The column of what a row adds to the denominator of the loss; None where each adds 1.
        keeps: Whether the row's own columns stay beside the new ones.
    """

    kind: str
    encoder: Encoder
    plan: Plan
    join: Join
    features: Features
    limits: tuple[Limit, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    weight: str | None = None
    keeps: bool = False

    def encode(self, rows: Sequence[Row], places: Sequence[str]) -> list[Row]:
        """The new columns of rows, whose ids are made in one call; ``places`` is what errors call them.

        Raises:
            UserError: If one can't be encoded.
        """
        plans, joined = [], []
        for place, row in zip(places, rows, strict=True):
            with blame(place, row):
                plans.append(self.plan(row))
        for place, row, pieces, ids in zip(places, rows, plans, self.encoder.encode_rows(plans), strict=True):
            with blame(place, row):
                joined.append(self.join(row, pieces, ids))
        return joined

    def remark(self, made: Row, place: str) -> tuple[bool, str | None]:
        """Whether a tokenized row is kept, and what is to be said and counted of it.

        Raises:
            UserError: If a limit refuses it.
        """
        for limit in self.limits:
            number = made[limit.column]
            if limit.least <= number <= limit.most:
                continue
            if limit.fate == "error":
                raise UserError(f"{place}: {limit.refusal(number)}")
            return limit.fate == "cut" and made[self.weight or "length"] > 0, f"{limit.done}: {limit.others}"
        return True, None

    def encode_each(self, rows: Sequence[Row], places: Sequence[str]) -> list[Row | UserError]:
        """As :meth:`encode`, with what is wrong in place of a row that can't be encoded."""
        try:
            return list(self.encode(rows, places))
        except UserError as error:
            if len(rows) == 1:
                return [error]
            return [self.encode_each([row], [place])[0] for row, place in zip(rows, places, strict=True)]

    def tokenize(
        self, dataset: Dataset, cache_dir: CacheDir = None, bad: BadRows | None = None, places: Places | None = None
    ) -> Dataset:
        """A whole dataset, cached, without the rows that the limits leave out.

        Args:
            dataset: Canonical rows.
            cache_dir: Where results are kept.
            bad: Takes the rows that can't be encoded; None if they are an error.
            places: What errors call the rows, by the column :data:`.INDEX`.

        Raises:
            UserError: If a row can't be encoded or a limit refuses it, or none is left.
        """
        ledger = bad if bad is not None else BadRows(rows=len(dataset))
        own = set(dataset.column_names) - {INDEX} if self.keeps else set()
        for name in sorted(own & set(self.features)):
            log.warning(
                "the column '%s' of the %s is replaced by that of their tokens; reward functions see this one",
                name,
                self.kind,
            )
        features = Features(
            {name: dataset.features[name] for name in dataset.column_names if name in own} | self.features
        )
        features |= {BAD: Value("string"), INDEX: Value("int64")}

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            indices = batch.pop(INDEX, indices)
            rows = [{name: values[position] for name, values in batch.items()} for position in range(len(indices))]
            made = self.encode_each(rows, [ROW_PLACE] * len(rows))
            faults = [str(row) if isinstance(row, UserError) else None for row in made]
            new: dict[str, list[Any]] = {
                name: [None if isinstance(row, UserError) else row[name] for row in made] for name in self.features
            }
            new |= {BAD: faults, INDEX: indices}
            return {name: new[name] if name in new else batch[name] for name in features}

        settings = {"kind": self.kind, "tokenizer": tokenizer_fingerprint(self.encoder.tokenizer), **self.settings}
        rows = cached_map(dataset, encode, features=features, settings=settings, cache_dir=cache_dir)
        rows = ledger.take(rows, places or Places("", noun=self.kind)).remove_columns(INDEX)
        if bad is None:
            ledger.settle()
        elif not len(rows):
            raise ledger.error()
        for limit in self.limits:
            rows = apply(limit, rows)
        return rows.remove_columns(FULL_LENGTH) if FULL_LENGTH in self.features else rows


def demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    mask: Mask = "completion",
    max_length: int = 1024,
    truncation: Literal["right", "drop", "error"] = "right",
) -> Tokenization:
    """Of demonstrations; see :func:`tokenize_demonstrations`."""
    encoder = Encoder(tokenizer)
    stop = max_length if truncation == "right" else None

    def plan(row: Row) -> list[Piece]:
        return demonstration_pieces(encoder, row, mask)

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        whole = join_demonstration(encoder, row, pieces, ids, mask)
        kept = Masked(whole.ids[:stop], [False, *whole.mask[1:stop]])  # nothing predicts the first token
        supervised, weight = sum(kept.mask), read_weight(row)
        lengths = {"length": len(kept.ids), "supervised": supervised, FULL_LENGTH: len(whole.ids)}
        weights = {WEIGHT: weight, "weighted": weight * supervised}
        return {"input_ids": kept.ids, "response_mask": kept.mask, **lengths, **weights}

    numbers = {name: Value("int32") for name in ("length", "supervised", FULL_LENGTH)}
    numbers |= {WEIGHT: Value("float32"), "weighted": Value("float64")}
    return Tokenization(
        "demonstrations",
        encoder,
        plan,
        join,
        Features({"input_ids": IDS, "response_mask": List(Value("bool")), **numbers}),
        (
            longest(FULL_LENGTH, "demonstration", max_length, {"right": "cut"}.get(truncation, truncation)),
            Limit("supervised", 1, LARGEST, "drop", "demonstrations without a token to learn (cut away, or no answer)"),
        ),
        {"mask": mask, "stop": stop},
        weight="weighted",
    )


def preferences(tokenizer: PreTrainedTokenizerBase, max_length: int = 1024) -> Tokenization:
    """Of pairs; see :func:`tokenize_preferences`."""
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        return encoder.pair_pieces(row["prompt"], [row["chosen"], row["rejected"]], tools_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        *start, left, right = ids
        prompt = encoder.join_prompt(start)
        chosen = ended(encoder, left, row.get("chosen_truncated"))
        rejected = ended(encoder, right, row.get("rejected_truncated"))
        length = len(prompt) + max(len(chosen), len(rejected))
        answers = {"chosen_ids": chosen, "rejected_ids": rejected}
        said = {"chosen_probability": read_probability(row), WEIGHT: read_weight(row)}
        return {"prompt_ids": prompt, **answers, "margin": read_margin(row), "length": length, **said}

    ids = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), IDS)
    numbers = dict.fromkeys(("margin", "chosen_probability", WEIGHT), Value("float32"))
    features = Features({**ids, **numbers, "length": Value("int32")})
    return Tokenization("preferences", encoder, plan, join, features, (longest("length", "pair", max_length, "drop"),))


def unpaired(tokenizer: PreTrainedTokenizerBase, max_length: int = 1024) -> Tokenization:
    """Of liked and disliked completions: ``prompt_ids``, ``completion_ids``, ``label`` and ``length``.

    Those longer than ``max_length`` are left out, and counted aloud. A completion of which the column
    ``completion_truncated`` (of one half of a pair ``chosen_truncated`` or ``rejected_truncated``) is true gets no EOS.
    """
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        return encoder.pair_pieces(row["prompt"], [row["completion"]], tools_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        side = "chosen" if row["label"] else "rejected"
        cut = row.get("completion_truncated") or row.get(f"{side}_truncated")
        prompt, completion = encoder.join_prompt(ids[:-1]), ended(encoder, ids[-1], cut)
        length = len(prompt) + len(completion)
        return {"prompt_ids": prompt, "completion_ids": completion, "label": row["label"], "length": length}

    numbers = {"label": Value("bool"), "length": Value("int32")}
    features = Features({"prompt_ids": IDS, "completion_ids": IDS, **numbers})
    limits = (longest("length", "labelled completion", max_length, "drop"),)
    return Tokenization("labelled completions", encoder, plan, join, features, limits)


def prompts(
    tokenizer: PreTrainedTokenizerBase, max_prompt_length: int = 512, long_prompts: Literal["error", "drop"] = "error"
) -> Tokenization:
    """Of prompts; see :func:`tokenize_prompts`."""
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        return encoder.prompt_pieces(row["prompt"], tools_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        prompt = encoder.join_prompt(ids)
        return {"prompt_ids": prompt, "length": len(prompt)}

    limit = longest("length", "prompt", max_prompt_length, long_prompts)
    features = Features({"prompt_ids": IDS, "length": Value("int32")})
    return Tokenization("prompts", encoder, plan, join, features, (limit,), keeps=True)


def tokenize_demonstrations(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask: Mask = "completion",
    max_length: int = 1024,
    truncation: Literal["right", "drop", "error"] = "right",
    cache_dir: CacheDir = None,
) -> Dataset:
    """Demonstrations as ``input_ids``, ``response_mask``, ``length`` and ``supervised`` (number of learnt tokens).

    Beside them ``weight``, that of the row, and ``weighted``, the two multiplied. A completion whose column
    ``completion_truncated`` is true was cut off when it was sampled: it gets no EOS.

    Args:
        dataset: Canonical demonstrations.
        tokenizer: Must have EOS, and for messages a chat template.
        mask: What is learnt: the completion (of plain text, all), every assistant turn, or everything.
        max_length: Longest sequence, in tokens.
        truncation: What becomes of longer ones: cut on the right, EOS with it; left out; or refused.
        cache_dir: Where results are kept.

    Raises:
        UserError: If a row can't be encoded, one is too long and ``truncation`` is "error", or none is left.
    """
    return demonstrations(tokenizer, mask, max_length, truncation).tokenize(dataset, cache_dir)


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 1024, cache_dir: CacheDir = None
) -> Dataset:
    """Pairs as ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``margin``, ``chosen_probability``, ``weight`` and ``length``
    (of the longer side).

    Pairs with a side longer than ``max_length`` are left out, and counted aloud: cut, they would compare other texts. A side
    whose column ``chosen_truncated`` or ``rejected_truncated`` is true was cut off when it was sampled: it gets no EOS.

    Raises:
        UserError: If a row can't be encoded, or all pairs are too long.
    """
    return preferences(tokenizer, max_length).tokenize(dataset, cache_dir)


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int = 512,
    long_prompts: Literal["error", "drop"] = "error",
    cache_dir: CacheDir = None,
) -> Dataset:
    """Prompts as ``prompt_ids`` and ``length`` beside every column that they came with, ``prompt`` included.

    Raises:
        UserError: If a row can't be encoded, a prompt is longer than ``max_prompt_length`` and ``long_prompts`` is
            "error", or none is left.
    """
    return prompts(tokenizer, max_prompt_length, long_prompts).tokenize(dataset, cache_dir)


@contextmanager
def blame(name: str, row: Row) -> Iterator[None]:
    """Put the row's number and first words before what is wrong with it: after a split its number alone says little."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name} ({str(next(iter(row.values())))[:40]!r}...): {error}") from error


def demonstration_pieces(encoder: Encoder, row: Row, mask: Mask) -> list[Piece]:
    """The pieces of a demonstration; prompt and completion stay apart unless every assistant turn is to be found."""
    if "text" in row:
        return [Piece(literal(row["text"], []), True)]
    if "messages" in row:
        return conversation_pieces(encoder.tokenizer, row["messages"], tools_of(row))
    if mask == "assistant" and isinstance(row["prompt"], list):
        return conversation_pieces(encoder.tokenizer, [*row["prompt"], *row["completion"]], tools_of(row))
    return encoder.pair_pieces(row["prompt"], [row["completion"]], tools_of(row))


def join_demonstration(encoder: Encoder, row: Row, pieces: list[Piece], ids: list[list[int]], mask: Mask) -> Masked:
    """Ids and mask of what :func:`demonstration_pieces` cut."""
    if "text" in row:
        whole = encoder.begin(encoder.end(ids[0]))
        return Masked(whole, [True] * len(whole))
    if "messages" in row or (mask == "assistant" and isinstance(row["prompt"], list)):
        return encoder.join_messages(pieces, ids, mask)
    prompt = encoder.join_prompt(ids[:-1])
    response = ended(encoder, ids[-1], row.get("completion_truncated"))
    return Masked([*prompt, *response], [mask == "all"] * len(prompt) + [True] * len(response))


def ended(encoder: Encoder, ids: list[int], cut: bool | None) -> list[int]:
    """A response with its EOS; without, where it was cut off when it was sampled, even if a template has written one."""
    return encoder.end(ids)[: -1 if cut else None]


def tools_of(row: Row) -> Tools:
    """The tools of a row: a list of JSON schemas, also written as text.

    Raises:
        UserError: If it is no list of objects, or the text not one in JSON.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except (ValueError, RecursionError) as error:
            raise UserError(f"column 'tools' is not JSON: {error}") from error
    if isinstance(tools, list):
        tools = [with_objects(tool, "parameters") for tool in tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"column 'tools' holds {tools!r:.60} where a list of JSON schemas belongs")
    return tools


def read_margin(row: Row) -> float:
    """How much better the chosen side was judged; 0 where the column is absent or null.

    Raises:
        UserError: If it is no number.
    """
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= LARGEST_MARGIN:
        raise UserError(f"column 'margin' is {margin!r:.40}; it must be a finite number")
    return float(margin)
