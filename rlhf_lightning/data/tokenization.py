"""Canonical rows to token ids, once, cached: what the collators pad into batches."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data import notes
from rlhf_lightning.data.annotations import read_margin, read_probability
from rlhf_lightning.data.bad_rows import BadRows, Places
from rlhf_lightning.data.cache import cached_map
from rlhf_lightning.data.demonstration_plans import demonstration_plans, earlier_answers, join_demonstration
from rlhf_lightning.data.encoding import Encoded as Encoded
from rlhf_lightning.data.encoding import Encoder, Mask, Masked
from rlhf_lightning.data.encoding import encode_messages as encode_messages
from rlhf_lightning.data.encoding import encode_pair as encode_pair
from rlhf_lightning.data.encoding import encode_pairs as encode_pairs
from rlhf_lightning.data.encoding import encode_prompt as encode_prompt
from rlhf_lightning.data.encoding import encode_text as encode_text
from rlhf_lightning.data.limits import LARGEST, Limit, any_items, apply, longest
from rlhf_lightning.data.messages import Message
from rlhf_lightning.data.prompt_split import prompt_key as prompt_key
from rlhf_lightning.data.prompt_split import split_by_prompt as split_by_prompt
from rlhf_lightning.data.rows import BAD, INDEX, ROW_PLACE, WEIGHT, Row, read_weight
from rlhf_lightning.data.template_inputs import KWARGS, default_variables, inputs_of
from rlhf_lightning.data.template_inputs import tools_of as tools_of
from rlhf_lightning.data.tokenizers import tokenizer_fingerprint
from rlhf_lightning.data.turns import Piece
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

CacheDir = str | os.PathLike[str] | None
Plan = Callable[[Row], list[Piece] | list[list[Piece]]]
DifferingPrompts = Literal["error", "drop", "accept"]
Join = Callable[[Row, list[Piece], list[list[int]]], Row]
IDS = List(Value("int32"))
FULL_LENGTH = "full_length"  # of a demonstration before it was cut
EARLIER, SCORED, DIFFERING = "earlier_answers", "scored", "differing_prompts"
COUNTED = (FULL_LENGTH, EARLIER, SCORED, DIFFERING, *notes.FEATURES)  # columns that serve the limits only
SKIPS = ("chosen_skips", "rejected_skips", "completion_skips")  # kept where a response has some
NOTHING_LEARNT = "demonstrations without a token to learn (cut away, or no answer, or only messages of weight 0)"
UNLEARNT = (
    "dialogues with earlier answers, which mask 'completion' does not learn; data.mask 'assistant' learns every answer"
)
UNSCORED = "without a token to score (every assistant message of a response has weight 0, or it is empty and cut off)"
DIFFER = (
    "the user or system turns of the answers differ after these part, so they answer different prompts; set "
    "data.differing_prompts to 'drop', or to 'accept' to compare them all the same"
)


@dataclass(frozen=True)
class Tokenization:
    """How canonical rows of one kind become token ids.

    Attributes:
        kind: What errors call the rows.
        encoder: The tokenizer.
        plan: Cuts a row into the pieces that are encoded; a row that becomes several sequences gives a list of pieces each.
        join: Makes the new columns of the row, its pieces and their ids.
        features: Types of the new columns; ``length`` is one of them.
        limits: How rows are handled that are too long or teach nothing.
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
        """The new columns of every sequence that the rows become, see :meth:`encode_each`."""
        return [made for _, made in self.encode_each(rows, places)]

    def encode_each(self, rows: Sequence[Row], places: Sequence[str]) -> list[tuple[int, Row]]:
        """The new columns of rows, whose ids are made in one call, each with the index of the row that it comes from.

        Args:
            rows: Canonical rows.
            places: What errors call them.

        Raises:
            UserError: If one can't be encoded.
        """
        plans: list[tuple[int, list[Piece]]] = []
        counts = []
        for index, (place, row) in enumerate(zip(places, rows, strict=True)):
            try:
                planned: Any = self.plan(row)
                several = planned if isinstance(planned[0], list) else [planned]
                counts.append(notes.notes(row, inputs_of(row), several))
            except UserError as error:
                raise blamed(error, place, row) from error
            plans += [(index, pieces) for pieces in several]
        joined = []
        encoded = self.encoder.encode_rows([pieces for _, pieces in plans])
        for (index, pieces), ids in zip(plans, encoded, strict=True):
            try:
                joined.append((index, {**self.join(rows[index], pieces, ids), **counts[index]}))
            except UserError as error:
                raise blamed(error, places[index], rows[index]) from error
        return joined

    @property
    def every_limit(self) -> tuple[Limit, ...]:
        """The limits, and after them what is only counted, of the rows that are left."""
        return (*self.limits, *notes.LIMITS)

    def remark(self, made: Row, place: str) -> tuple[bool, str | None]:
        """Whether a tokenized row is kept, and what is to be logged and counted of it.

        Raises:
            UserError: If a limit refuses it.
        """
        for limit in self.every_limit:
            number = made[limit.column]
            if limit.least <= number <= limit.most:
                continue
            if limit.fate == "error":
                raise UserError(f"{place}: {limit.refusal(number)}")
            if limit.fate == "note":
                return True, limit.others
            return limit.fate == "cut" and made[self.weight or "length"] > 0, f"{limit.done}: {limit.others}"
        return True, None

    def try_each(self, rows: Sequence[Row], places: Sequence[str]) -> list[tuple[int, Row | UserError]]:
        """As :meth:`encode_each`, with what is wrong in place of a row that can't be encoded."""
        try:
            return list(self.encode_each(rows, places))
        except UserError as error:
            if len(rows) == 1:
                return [(0, error)]
        both = enumerate(zip(rows, places, strict=True))
        return [(index, made) for index, (row, place) in both for _, made in self.try_each([row], [place])]

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
        given = {name: of for name, of in dataset.features.items() if name in own and name not in notes.FEATURES}
        features = Features({**given, **self.features, **notes.FEATURES, BAD: Value("string"), INDEX: Value("int64")})

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            indices = batch.pop(INDEX, indices)
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            made: list[Row] = []
            for source, new in self.try_each(rows, [ROW_PLACE] * len(rows)):
                found = (
                    {BAD: str(new)} if isinstance(new, UserError) else {**rows[source], **new} if self.keeps else new
                )
                made.append({**found, INDEX: indices[source]})
            return {name: [row.get(name) for row in made] for name in features}

        tokenizer = self.encoder.tokenizer
        settings = {"kind": self.kind, "tokenizer": tokenizer_fingerprint(tokenizer), **self.settings}
        settings[KWARGS] = default_variables(tokenizer)
        rows = cached_map(dataset, encode, features=features, settings=settings, cache_dir=cache_dir)
        rows = ledger.take(rows, places or Places("", noun=self.kind))
        if INDEX not in dataset.column_names:  # where a row is in its source is kept where it was known
            rows = rows.remove_columns(INDEX)
        if bad is None:
            ledger.settle()
        elif not len(rows):
            raise ledger.error()
        for limit in self.every_limit:
            rows = apply(limit, rows)
        unused = [name for name in SKIPS if name in self.features and not any_items(rows, name)]
        return rows.remove_columns([*(name for name in COUNTED if name in features), *unused])


def demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    mask: Mask = "completion",
    max_length: int = 1024,
    truncation: Literal["right", "drop", "error"] = "right",
) -> Tokenization:
    """Of demonstrations; see :func:`tokenize_demonstrations`."""
    encoder = Encoder(tokenizer)
    stop = max_length if truncation == "right" else None

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        whole = join_demonstration(encoder, row, pieces, ids)
        kept = Masked(whole.ids[:stop], [False, *whole.mask[1:stop]])  # nothing predicts the first token
        supervised, weight = sum(kept.mask), read_weight(row)
        lengths = {"length": len(kept.ids), "supervised": supervised, FULL_LENGTH: len(whole.ids)}
        weights = {WEIGHT: weight, "weighted": weight * supervised}
        counts = {EARLIER: earlier_answers(row) if mask == "completion" else 0}
        return {"input_ids": kept.ids, "response_mask": kept.mask, **lengths, **weights, **counts}

    numbers = {name: Value("int32") for name in ("length", "supervised", FULL_LENGTH, EARLIER)}
    numbers |= {WEIGHT: Value("float32"), "weighted": Value("float64")}
    advice = "raise data.max_length" + (", or set data.mask to 'assistant'" if mask == "completion" else "")
    return Tokenization(
        "demonstrations",
        encoder,
        partial(demonstration_plans, encoder, mask=mask),
        join,
        Features({"input_ids": IDS, "response_mask": List(Value("bool")), **numbers}),
        (
            longest(FULL_LENGTH, "demonstration", max_length, {"right": "cut"}.get(truncation, truncation)),
            Limit("supervised", 1, LARGEST, "drop", NOTHING_LEARNT, advice),
            Limit(EARLIER, 0, 0, "note", UNLEARNT),
        ),
        {"mask": mask, "stop": stop},
        weight="weighted",
    )


def preferences(
    tokenizer: PreTrainedTokenizerBase, max_length: int = 1024, differing_prompts: DifferingPrompts = "error"
) -> Tokenization:
    """Of pairs; see :func:`tokenize_preferences`."""
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        if differing_prompts == "error" and prompts_differ([row["chosen"], row["rejected"]]):
            raise UserError(DIFFER)
        return encoder.pair_pieces(row["prompt"], [row["chosen"], row["rejected"]], inputs_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        cut_off = [row.get("chosen_truncated"), row.get("rejected_truncated")]
        prompt, (chosen, rejected) = encoder.join_responses(pieces, ids, cut_off)
        length = len(prompt) + max(len(chosen.ids), len(rejected.ids))
        answers = {"chosen_ids": chosen.ids, "rejected_ids": rejected.ids}
        skips = {"chosen_skips": chosen.skips, "rejected_skips": rejected.skips}
        said = {"chosen_probability": read_probability(row), WEIGHT: read_weight(row)}
        counts = {
            SCORED: min(chosen.scored, rejected.scored),
            DIFFERING: int(differing_prompts == "drop" and prompts_differ([row["chosen"], row["rejected"]])),
        }
        new = {"prompt_ids": prompt, **answers, **skips, "margin": read_margin(row), "length": length}
        return {**new, **said, **counts}

    ids = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "chosen_skips", "rejected_skips"), IDS)
    numbers = dict.fromkeys(("margin", "chosen_probability", WEIGHT), Value("float32"))
    counts = dict.fromkeys(("length", SCORED, DIFFERING), Value("int32"))
    limits = (
        longest("length", "pair", max_length, "drop"),
        Limit(SCORED, 1, LARGEST, "drop", f"pairs {UNSCORED}"),
        Limit(DIFFERING, 0, 0, "drop", "pairs whose user or system turns differ after their answers part"),
    )
    features, settings = Features({**ids, **numbers, **counts}), {"differing_prompts": differing_prompts}
    return Tokenization("preferences", encoder, plan, join, features, limits, settings)


def unpaired(tokenizer: PreTrainedTokenizerBase, max_length: int = 1024) -> Tokenization:
    """Tokenization of liked and disliked completions.

    Columns: ``prompt_ids``, ``completion_ids``, ``label`` and ``length``; where some completions have turns that are not
    scored, also ``completion_skips``, see :class:`.encoding.Response`.

    Those longer than ``max_length`` are dropped and counted. A completion of which the column ``completion_truncated`` (of
    one half of a pair ``chosen_truncated`` or ``rejected_truncated``) is true gets no EOS.
    """
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        return encoder.pair_pieces(row["prompt"], [row["completion"]], inputs_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        side = "chosen" if row["label"] else "rejected"
        cut_off = row.get("completion_truncated") or row.get(f"{side}_truncated")
        prompt, (completion,) = encoder.join_responses(pieces, ids, [cut_off])
        own = {"prompt_ids": prompt, "completion_ids": completion.ids, "completion_skips": completion.skips}
        length = len(prompt) + len(completion.ids)
        return {**own, "label": row["label"], "length": length, SCORED: completion.scored}

    numbers = {"label": Value("bool"), "length": Value("int32"), SCORED: Value("int32")}
    features = Features({**dict.fromkeys(("prompt_ids", "completion_ids", "completion_skips"), IDS), **numbers})
    limits = (
        longest("length", "labelled completion", max_length, "drop"),
        Limit(SCORED, 1, LARGEST, "drop", f"labelled completions {UNSCORED}"),
    )
    return Tokenization("labelled completions", encoder, plan, join, features, limits)


def prompts_differ(responses: Sequence[str | list[Message]]) -> bool:
    """Whether user or system turns within responses to one prompt are not the same in all: then they answer other prompts."""
    told = [
        [(message["role"], message["content"]) for message in response if message["role"] in ("user", "system")]
        for response in responses
        if isinstance(response, list)
    ]
    return any(turns != told[0] for turns in told[1:])


def prompts(
    tokenizer: PreTrainedTokenizerBase, max_prompt_length: int = 512, long_prompts: Literal["error", "drop"] = "error"
) -> Tokenization:
    """Of prompts; see :func:`tokenize_prompts`."""
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        return encoder.prompt_pieces(row["prompt"], inputs_of(row))

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


def blamed(error: UserError, name: str, row: Row) -> UserError:
    """The error with the row's number and first words before it: after a split its number alone says little."""
    return UserError(f"{name} ({str(next(iter(row.values())))[:40]!r}...): {error}")
