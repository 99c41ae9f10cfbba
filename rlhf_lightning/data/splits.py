"""From a source to training, validation and out-of-distribution rows in canonical form, and the tokenizer for them."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.bad_rows import BadRows, Policy, places_of
from rlhf_lightning.data.columns import Columns, parse_columns
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.prompt_split import key_columns, row_key
from rlhf_lightning.data.rows import INDEX, LEVEL, TEXT_COLUMNS
from rlhf_lightning.data.sources import Kind, Rows, as_source, marking_bad_rows
from rlhf_lightning.data.tokenization import split_by_prompt
from rlhf_lightning.data.tokenizers import load_tokenizer, repair_pad_token
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """How rows are divided where the source does not divide them itself.

    Attributes:
        validation: Share of the prompts that is held out, chosen by a hash of the prompt: all rows of a prompt go one way.
        seed: Another seed, another choice.
        limit: Number of training rows to keep, drawn by the seed: for debugging. Of a stream, the first ones.
    """

    validation: float = 0.05
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing to train on."""
        if not 0 <= self.validation < 1 or (self.limit is not None and self.limit < 1):
            raise UserError(f"split out of range: {self}; `validation` is a share in [0, 1), `limit` at least 1")


def load_splits(
    source: Rows,
    kind: Kind,
    format: str | None,
    split: Split,
    columns: Columns | None = None,
    bad: BadRows | None = None,
) -> DatasetDict:
    """Rows in canonical form, with "train" unless they are a stream and, unless ``split.validation`` is 0, "validation".

    Args:
        source: Where they come from.
        kind: What they are wanted for.
        format: Name of their format, where it should not be detected.
        split: How they are divided.
        columns: Which columns are read as which, see :mod:`.columns`.
        bad: See :func:`.to_canonical`.

    Raises:
        UserError: If the source can't be read, its format is unknown, or nothing is left to train on.
    """
    mapping = parse_columns(columns)
    chosen = as_source(source)
    text = tuple(name for target, name in mapping.names.items() if target in TEXT_COLUMNS)
    loaded = marking_bad_rows(chosen, text).load(kind)
    places = {name: places_of(part, str(chosen)) for name, part in loaded.items()}
    rows = DatasetDict(
        {name: to_canonical(part, kind, format, places[name].origin, mapping, bad) for name, part in loaded.items()}
    )
    if bad is not None:
        bad.places = places
    if "train" not in rows:  # they are read in training
        if "validation" not in rows and split.validation > 0:
            raise UserError(
                f"{chosen}: of a stream no rows can be held out; give source.validation_path, or set split.validation to 0"
            )
        return rows
    if "validation" not in rows and split.validation > 0:
        whole = rows["train"]
        rows["train"], rows["validation"] = split_by_prompt(whole, split.validation, split.seed, level_of(whole))
        if not len(rows["train"]) or not len(rows["validation"]):
            raise too_few(whole, split)
    if split.limit is not None:
        rows["train"] = drawn(rows["train"], split.limit, split.seed)
    log.info("%s: %s", kind, ", ".join(f"{len(part)} {name}" for name, part in rows.items()))
    return rows


def load_part(
    source: Rows,
    kind: Kind,
    part: str,
    split: Split,
    format: str | None = None,
    columns: Columns | None = None,
    bad_rows: Policy = "error",
) -> Dataset:
    """One part of the rows in canonical form, for what is no data module; arguments as in :class:`.RowsDataModule`.

    Raises:
        UserError: If the source has no such part, or its rows are bad.
    """
    bad = BadRows(bad_rows)
    parts = load_splits(source, kind, format, split, columns, bad)
    bad.settle()
    if part not in parts and part == "validation":
        raise UserError(
            f"{source}: no prompt is held out; set split.validation above 0, or give the source validation rows"
        )
    if part not in parts:
        raise UserError(f"{source} has no part '{part}'; it has {', '.join(parts)}")
    return parts[part].remove_columns(INDEX)


def level_of(rows: Dataset) -> int:
    """How many splits the prompts have been through, as the rows of ``sample`` say; 0 of other rows.

    The hash that sent a prompt to the training rows would send it there again, and hold out nothing.
    """
    if LEVEL not in rows.column_names:
        return 0
    levels = [level for level in rows.select_columns([LEVEL])[LEVEL][:] if isinstance(level, int)]
    return max(levels, default=0)


def too_few(rows: Dataset, split: Split) -> UserError:
    """The error about rows of which nothing can be held out, or all."""
    prompts = len({row_key(row) for row in rows.select_columns(key_columns(rows))})
    advice = "give a validation file, or set split.validation to 0"
    if prompts == 1 and len(rows) > 1:
        return UserError(f"all {len(rows)} rows have the same prompt, and whole prompts are held out; {advice}")
    count = f"{prompts} prompts in {len(rows)} rows" if prompts < len(rows) else f"{len(rows)} rows"
    return UserError(f"{count} are too few to hold out {split.validation:.0%} of the prompts; add rows, {advice}")


def drawn(rows: Dataset, limit: int, seed: int) -> Dataset:
    """Return `limit` rows, drawn at random without replacement, in their order; all rows if there are no more."""
    if limit >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
    return rows.select(np.sort(chosen))


def find_tokenizer(path: str | None, source: Rows, trainer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for; else that of the model in training; else the source's own.

    Its pad token is repaired where missing or equal to EOS.

    Raises:
        UserError: If none of the three is there.
    """
    module = getattr(trainer, "lightning_module", None)
    path = path or getattr(module, "model_path", None)
    tokenizer = load_tokenizer(path) if path else as_source(source).tokenizer()
    if tokenizer is None:
        raise UserError("no tokenizer: give data.tokenizer, or a model with a `path`")
    repair_pad_token(tokenizer)
    return tokenizer
