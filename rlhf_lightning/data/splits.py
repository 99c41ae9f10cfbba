"""From a source to training, validation and out-of-distribution rows in canonical form, and the tokenizer for them."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ensure_chat_template
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.rows import ROW_INDEX
from rlhf_lightning.data.sources import Kind, Source, as_source
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
        limit: Keep only the first so many training rows: for debugging.
    """

    validation: float = 0.05
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing to train on."""
        if not 0 <= self.validation < 1 or (self.limit is not None and self.limit < 1):
            raise UserError(f"split out of range: {self}; `validation` is a share in [0, 1), `limit` at least 1")


def load_splits(
    source: str | Dataset | DatasetDict | Source, kind: Kind, format: str | None, split: Split, *, indexed: bool = False
) -> DatasetDict:
    """Rows in canonical form, with "train" unless they are a stream and, unless ``split.validation`` is 0, "validation".

    Args:
        source: Where rows come from.
        kind: What they are wanted for.
        format: Name of their format; None to detect it.
        split: How they are divided.
        indexed: Add the column ``ROW_INDEX``: where each row is in its part of the source.

    Raises:
        UserError: If the source can't be read, its format is unknown, or nothing is left to train on.
    """
    chosen = as_source(source)
    loaded = chosen.load(kind)
    if indexed:
        loaded = DatasetDict({name: part.add_column(ROW_INDEX, np.arange(len(part))) for name, part in loaded.items()})
    rows = DatasetDict({name: to_canonical(part, kind, format, origin=str(chosen)) for name, part in loaded.items()})
    if "train" not in rows:  # they are read in training
        if "validation" not in rows and split.validation > 0:
            raise UserError(
                f"{chosen}: of a stream no rows can be held out; give source.validation_path, or set split.validation to 0"
            )
        return rows
    if "validation" not in rows and split.validation > 0:
        rows["train"], rows["validation"] = split_by_prompt(rows["train"], split.validation, split.seed)
        if not len(rows["train"]) or not len(rows["validation"]):
            raise UserError(
                f"{len(loaded['train'])} rows are too few to hold out {split.validation:.0%} of the prompts; add rows, give a "
                "validation file, or set split.validation to 0"
            )
    if split.limit is not None:
        rows["train"] = rows["train"].select(range(min(split.limit, len(rows["train"]))))
    log.info("%s: %s", kind, ", ".join(f"{len(part)} {name}" for name, part in rows.items()))
    return rows


def find_tokenizer(
    path: str | None, source: str | Dataset | DatasetDict | Source, trainer: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for; else that of the model in training; else the source's own.

    Its pad token is repaired where missing or equal to EOS, and it gets a plain chat template where it has none.

    Raises:
        UserError: If none of the three is there.
    """
    module = getattr(trainer, "lightning_module", None)
    path = path or getattr(module, "model_path", None)
    tokenizer = load_tokenizer(path) if path else as_source(source).tokenizer()
    if tokenizer is None:
        raise UserError("no tokenizer: give data.tokenizer, or a model with a `path`")
    repair_pad_token(tokenizer)
    ensure_chat_template(tokenizer)
    return tokenizer
