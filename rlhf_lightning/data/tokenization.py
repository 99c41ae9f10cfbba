"""Canonical rows to token ids, once, cached: what the collators pad into batches."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.cache import cached_map
from rlhf_lightning.data.chat import Piece, conversation_pieces
from rlhf_lightning.data.encoding import Encoded as Encoded
from rlhf_lightning.data.encoding import Encoder, Mask, Masked, Tools
from rlhf_lightning.data.encoding import encode_messages as encode_messages
from rlhf_lightning.data.encoding import encode_pair as encode_pair
from rlhf_lightning.data.encoding import encode_pairs as encode_pairs
from rlhf_lightning.data.encoding import encode_prompt as encode_prompt
from rlhf_lightning.data.encoding import encode_text as encode_text
from rlhf_lightning.data.literal import literal
from rlhf_lightning.data.prompt_split import prompt_key as prompt_key
from rlhf_lightning.data.prompt_split import split_by_prompt as split_by_prompt
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.tokenizers import tokenizer_fingerprint
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

CacheDir = str | os.PathLike[str] | None
Plan = Callable[[Row], list[Piece]]
Join = Callable[[Row, list[Piece], list[list[int]]], Row]
IDS = List(Value("int32"))
LARGEST_MARGIN = float(np.finfo(np.float32).max)


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
    encoder = Encoder(tokenizer)
    stop = max_length if truncation == "right" else None

    def plan(row: Row) -> list[Piece]:
        return demonstration_pieces(encoder, row, mask)

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        whole = join_demonstration(encoder, row, pieces, ids, mask)
        kept = Masked(whole.ids[:stop], [False, *whole.mask[1:stop]])  # nothing predicts the first token
        lengths = {"length": len(kept.ids), "supervised": sum(kept.mask), "full_length": len(whole.ids)}
        return {"input_ids": kept.ids, "response_mask": kept.mask, **lengths}

    numbers = {name: Value("int32") for name in ("length", "supervised", "full_length")}
    features = Features({"input_ids": IDS, "response_mask": List(Value("bool")), **numbers})
    settings = {"mask": mask, "stop": stop}
    rows = tokenize(dataset, encoder, plan, join, features, "demonstrations", settings, cache_dir)
    return limit_demonstrations(rows, max_length, truncation).remove_columns("full_length")


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 1024, cache_dir: CacheDir = None
) -> Dataset:
    """Pairs as ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``margin`` and ``length`` (of the longer side).

    Pairs with a side longer than ``max_length`` are left out, and counted aloud: cut, they would compare other texts. A side
    whose column ``chosen_truncated`` or ``rejected_truncated`` is true was cut off when it was sampled: it gets no EOS.

    Raises:
        UserError: If a row can't be encoded, or all pairs are too long.
    """
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        return encoder.pair_pieces(row["prompt"], [row["chosen"], row["rejected"]], tools_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        *start, left, right = ids
        prompt = encoder.join_prompt(start)
        chosen = left if row.get("chosen_truncated") else encoder.end(left)
        rejected = right if row.get("rejected_truncated") else encoder.end(right)
        length = len(prompt) + max(len(chosen), len(rejected))
        answers = {"chosen_ids": chosen, "rejected_ids": rejected}
        return {"prompt_ids": prompt, **answers, "margin": read_margin(row), "length": length}

    ids = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), IDS)
    features = Features({**ids, "margin": Value("float32"), "length": Value("int32")})
    rows = tokenize(dataset, encoder, plan, join, features, "preferences", {}, cache_dir)
    return keep(rows, numbers(rows, "length") <= max_length, f"pairs longer than {max_length} tokens (max_length)")


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
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        return encoder.prompt_pieces(row["prompt"], tools_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        prompt = encoder.join_prompt(ids)
        return {**row, "prompt_ids": prompt, "length": len(prompt)}

    for name in {"prompt_ids", "length"} & set(dataset.column_names):
        log.warning(
            "the column '%s' of the prompts is replaced by that of their tokens; reward functions see this one", name
        )
    features = Features({**dataset.features, "prompt_ids": IDS, "length": Value("int32")})
    rows = tokenize(dataset, encoder, plan, join, features, "prompts", {}, cache_dir)
    lengths = numbers(rows, "length")
    if long_prompts == "error":
        refuse_long(lengths, max_prompt_length, "prompt", "raise max_prompt_length or set long_prompts to 'drop'")
    return keep(
        rows, lengths <= max_prompt_length, f"prompts longer than {max_prompt_length} tokens (max_prompt_length)"
    )


def tokenize(
    dataset: Dataset,
    encoder: Encoder,
    plan: Plan,
    join: Join,
    features: Features,
    kind: str,
    settings: dict[str, Any],
    cache_dir: CacheDir,
) -> Dataset:
    """Plan the pieces of every row, encode those of many rows in one call, join each row's ids; cached."""

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [{name: values[position] for name, values in batch.items()} for position in range(len(indices))]
        plans, joined = [], []
        for index, row in zip(indices, rows, strict=True):
            with blame(f"row {index + 1} of the {kind}", row):
                plans.append(plan(row))
        for index, row, pieces, ids in zip(indices, rows, plans, encoder.encode_rows(plans), strict=True):
            with blame(f"row {index + 1} of the {kind}", row):
                joined.append(join(row, pieces, ids))
        return {name: [row[name] for row in joined] for name in features}

    settings = {"kind": kind, "tokenizer": tokenizer_fingerprint(encoder.tokenizer), **settings}
    return cached_map(dataset, encode, features=features, settings=settings, cache_dir=cache_dir)


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
    prompt, response = encoder.join_prompt(ids[:-1]), encoder.end(ids[-1])
    return Masked([*prompt, *response], [mask == "all"] * len(prompt) + [True] * len(response))


def limit_demonstrations(rows: Dataset, max_length: int, truncation: str) -> Dataset:
    """Apply ``truncation``, say how often, and leave out rows with nothing to learn."""
    full = numbers(rows, "full_length")
    cut = int((full > max_length).sum())
    if truncation == "error":
        refuse_long(full, max_length, "demonstration", "raise max_length, or set truncation to 'right' or 'drop'")
    elif truncation == "drop":
        rows = keep(rows, full <= max_length, f"demonstrations longer than {max_length} tokens (max_length)")
    elif cut:
        log.warning("cut %d of %d demonstrations after %d tokens: they lose their EOS", cut, len(rows), max_length)
    return keep(
        rows, numbers(rows, "supervised") > 0, "demonstrations without a token to learn (cut away, or no answer)"
    )


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


def numbers(rows: Dataset, column: str) -> np.ndarray:
    """A column of numbers as an array."""
    return np.asarray(rows.with_format("numpy")[column][:])


def keep(rows: Dataset, wanted: np.ndarray, what: str) -> Dataset:
    """The wanted rows; the number of others is logged.

    Raises:
        UserError: If none is wanted.
    """
    lost = len(rows) - int(wanted.sum())
    if lost == len(rows):
        raise UserError(f"no row is left of {lost}: all are {what}")
    if not lost:
        return rows
    log.warning("left out %d of %d rows: %s", lost, len(rows), what)
    return rows.select(np.flatnonzero(wanted))


def refuse_long(lengths: np.ndarray, limit: int, what: str, advice: str) -> None:
    """Raise a UserError that names the first row over the limit."""
    over = np.flatnonzero(lengths > limit)
    if over.size:
        first = int(over[0])
        raise UserError(
            f"row {first + 1}: the {what} has {lengths[first]} tokens and the limit is {limit} "
            f"({over.size} rows are longer); {advice}"
        )
