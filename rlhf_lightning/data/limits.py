"""What becomes of tokenized rows that are too long, or have nothing to learn: cut, left out, or refused, and always said."""

import logging
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

LARGEST = 2**31 - 1
ADVICE = {"prompt": "raise max_prompt_length or set long_prompts to 'drop'"}
TRUNCATE = "raise max_length, or set truncation to 'right' or 'drop'"


class Limit(NamedTuple):
    """A range that a column of numbers is to stay in.

    Attributes:
        column: Its name.
        least: Smallest number that is let through.
        most: Largest.
        fate: How others are handled: they are dropped, or have been cut, or end the run; or they are only counted ("note").
        others: What they are called where they are counted; where they end the run, one of them.
        advice: What to do if more than a tenth of the rows is dropped.
    """

    column: str
    least: int
    most: int
    fate: Literal["drop", "cut", "error", "note"]
    others: str
    advice: str = ""

    @property
    def done(self) -> str:
        """What is done to others that do not end the run."""
        return "cut" if self.fate == "cut" else "left out"

    def refusal(self, number: int, more: str = "") -> str:
        """What is wrong with a row that ends the run."""
        advice = ADVICE.get(self.others, TRUNCATE)
        return f"the {self.others} has {number} tokens and the limit is {self.most}{more}; {advice}"


def longest(column: str, noun: str, most: int, fate: str) -> Limit:
    """The limit on the tokens of a row."""
    name = "max_prompt_length" if noun == "prompt" else "max_length"
    if fate == "error":
        return Limit(column, 0, most, "error", noun)
    if fate == "cut":
        return Limit(column, 0, most, "cut", f"{noun}s after {most} tokens: they lose their EOS")
    return Limit(column, 0, most, "drop", f"{noun}s longer than {most} tokens ({name})", f"raise data.{name}")


def apply(limit: Limit, rows: Dataset) -> Dataset:
    """The rows without those that the limit leaves out, whose number is logged.

    Raises:
        UserError: If the limit refuses a row, or none is left.
    """
    values = numbers(rows, limit.column)
    wanted = (values >= limit.least) & (values <= limit.most)
    others = len(rows) - int(wanted.sum())
    if not others:
        return rows
    if limit.fate == "cut":
        log.warning("cut %d of %d %s", others, len(rows), limit.others)
        return rows
    if limit.fate == "note":
        log.warning("%d of %d are %s", others, len(rows), limit.others)
        return rows
    if limit.fate == "error":
        first = int(np.flatnonzero(~wanted)[0])
        raise UserError(f"row {first + 1}: {limit.refusal(values[first], f' ({others} rows are longer)')}")
    if others == len(rows):
        raise UserError(f"no row is left of {others}: all are {limit.others}")
    advice = f"; that is more than a tenth of them: {limit.advice}" if limit.advice and 10 * others > len(rows) else ""
    log.warning("left out %d of %d rows: %s%s", others, len(rows), limit.others, advice)
    return rows.select(np.flatnonzero(wanted))


def numbers(rows: Dataset, column: str) -> np.ndarray:
    """A column of numbers as an array of its own type: of 10 million lengths, 40 MB."""
    table = rows.select_columns([column]).with_format("arrow")[:]
    return table[column].to_numpy()


def any_items(rows: Dataset, column: str) -> bool:
    """Whether a list of a column has items."""
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    return bool(pc.any(pc.greater(pc.list_value_length(values), 0)).as_py())
