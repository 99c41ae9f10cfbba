"""Row formats: find out which one a dataset is in, and bring it into the canonical columns of what it is wanted for.

Canonical columns, by kind: *demonstrations* have ``messages``, or ``prompt`` and ``completion``, or ``text``;
*preferences* have ``prompt``, ``chosen`` and ``rejected``; *unpaired* rows have ``prompt``, ``completion`` and ``label``;
*stepwise* rows have ``prompt``, ``completions`` (the steps, text) and ``labels`` (a probability each, null for none);
*prompts* have ``prompt``. Each is text throughout or lists
of ``{"role", "content"}`` throughout. Columns that the format does not use stay as they are.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features

from rlhf_lightning.data import ranked, readers
from rlhf_lightning.data.annotations import ANNOTATIONS, annotations
from rlhf_lightning.data.cache import cached_rows, dataset_hash
from rlhf_lightning.data.messages import is_hh
from rlhf_lightning.data.rows import WEIGHT, Example, NoSignalError, Row
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.data.tables import HELD_BYTES, RowWriter, collected
from rlhf_lightning.data.views import VIEWS
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """A way to write rows.

    Attributes:
        name: What the log and the ``format`` argument call it.
        columns: Columns that it needs.
        read: Reads a row.
        optional: Columns that it uses where they are there.
        marks: Tells it, by the first row, from another format with the same columns.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Example]
    optional: tuple[str, ...] = ()
    marks: Callable[[Row], bool] = field(default=lambda row: True)


ALPACA_OPTIONAL = ("input", "system", "history")
# The columns of each kind: a row's own of that name give way to them.
CANONICAL: dict[Kind, tuple[str, ...]] = {
    "demonstrations": ("text", "messages", "prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
    "rankings": ("prompt", "completions", "ranks"),
    "unpaired": ("prompt", "completion", "label"),
    "stepwise": ("prompt", "completions", "labels"),
}
RANKED = ("completions", "ranks")  # as the prompt is, and numbers
BATCH = 1000  # rows converted together

# The first that fits is taken, so those with more columns come first.
FORMATS = (
    Format("sharegpt-preference", ("conversations", "chosen", "rejected"), readers.sharegpt_preference, ("system",)),
    Format("preference", ("prompt", "chosen", "rejected"), readers.preference),
    Format(
        "alpaca-preference",
        ("instruction", "chosen", "rejected"),
        readers.alpaca_preference,
        (*ALPACA_OPTIONAL, "output"),
    ),
    Format("hh-rlhf", ("chosen", "rejected"), readers.hh_preference, marks=lambda row: is_hh(row["chosen"])),
    Format("implicit-preference", ("chosen", "rejected"), readers.implicit_preference),
    Format("swift-preference", ("messages", "rejected_response"), readers.swift_preference, ("system",)),
    Format("ranking", ("prompt", "completions", "ranks"), ranked.ranking),
    Format("ordering", ("prompt", "completions", "ranking"), ranked.ordering),
    Format("nemo-ranking", ("context", "completions"), ranked.nemo_ranking, marks=ranked.has_rank_objects),
    Format("stepwise", ("prompt", "completions", "labels"), readers.stepwise),
    Format("stepwise-ratings", ("prompt", "completions", "ratings"), readers.stepwise_ratings),
    Format("prm800k", ("question", "label"), readers.prm800k, marks=lambda row: isinstance(row["label"], dict)),
    Format("unpaired-preference", ("prompt", "completion", "label"), readers.unpaired),
    Format("prompt-completion", ("prompt", "completion"), readers.prompt_completion),
    Format("labelled-messages", ("messages", "label"), readers.labelled_messages, ("system",)),
    Format("labelled-sharegpt", ("conversations", "kto_tag"), readers.labelled_sharegpt, ("system",)),
    Format("alpaca", ("instruction", "output"), readers.alpaca, ALPACA_OPTIONAL),
    Format("messages", ("messages",), readers.messages, ("system",)),
    Format("sharegpt", ("conversations",), readers.sharegpt, ("system",)),
    Format("prompt-only", ("prompt",), readers.prompt_only),
    Format("hh-rlhf-text", ("text",), readers.hh_text, marks=lambda row: is_hh(row["text"])),
    Format("text", ("text",), readers.text),
)


def detect_format(columns: Sequence[str], first_row: Row) -> Format:
    """The format of rows with these columns.

    Args:
        columns: Names of the columns.
        first_row: Tells apart formats with the same columns.

    Raises:
        UserError: If none fits; lists the columns found and those accepted.
    """
    for known in FORMATS:
        if set(known.columns) <= set(columns) and known.marks(first_row):
            return known
    accepted = "; ".join(f"{known.name}: {', '.join(known.columns)}" for known in FORMATS)
    raise UserError(f"unknown format: found columns {', '.join(columns) or '(none)'}; accepted are {accepted}")


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: If there is none.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise UserError(f"unknown format '{name}'; known: {', '.join(known.name for known in FORMATS)}")


def to_canonical(dataset: Dataset, kind: Kind, format: str | None = None, origin: str = "dataset") -> Dataset:
    """Bring rows into the canonical columns of ``kind``.

    A dataset of pairs or of labelled completions serves demonstrations (what was preferred), one of pairs also unpaired rows
    (two of each), and any with a prompt serves prompts. Pairs of equal sides and disliked demonstrations are left out,
    counted and logged.

    Args:
        dataset: Rows in a known format.
        kind: What they are wanted for.
        format: Name of the format, where it should not be detected.
        origin: What errors call the dataset: its file.

    Raises:
        UserError: If no format fits, a row is malformed (names row and column), or no row is left.
    """
    converter = Converter(choose_format(dataset, format, origin), kind, origin)
    converter.announce()
    used, others = converter.divide(dataset.column_names)
    if kind == "demonstrations" and WEIGHT in others:
        log.info("%s: each row weighs in the loss what its column '%s' says", origin, WEIGHT)
    given = Features({name: dataset.features[name] for name in others})

    def fill(writer: RowWriter) -> None:
        beside = dataset.select_columns(others).with_format("arrow").iter(BATCH)
        for number, columns in enumerate(dataset.select_columns(used).iter(BATCH)):
            kept, rows = converter.convert_all(columns, first=number * BATCH)
            table = next(beside) if others else None
            if rows:
                writer.write(rows, table.take(kept) if table is not None else None)
        if not writer.rows:
            raise UserError(f"{origin}: no row is left for {kind}: {converter.reasons()}")
        if converter.dropped:
            log.warning("%s: left out rows without anything to learn: %s", origin, converter.reasons())

    if dataset.data.nbytes <= HELD_BYTES:
        return collected(fill, given)
    settings = {"format": converter.format.name, "kind": kind}
    return cached_rows(fill, {"rows": dataset_hash(dataset), **settings}, given)


def choose_format(dataset: Dataset, name: str | None, origin: str) -> Format:
    """The format asked for, or the one detected.

    Raises:
        UserError: If there is none, or columns that it needs are not there.
    """
    if not len(dataset):
        raise UserError(f"{origin} has no rows")
    try:
        found = find_format(name) if name else detect_format(dataset.column_names, dataset[0])
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    missing = [column for column in found.columns if column not in dataset.column_names]
    if missing:
        raise UserError(
            f"{origin}: format {found.name} needs columns {', '.join(missing)}; found {', '.join(dataset.column_names)}"
        )
    return found


class Converter:
    """Converts rows one by one and counts what it leaves out."""

    def __init__(self, format: Format, kind: Kind, origin: str) -> None:
        self.format, self.kind, self.origin = format, kind, origin
        self.dropped: Counter[str] = Counter()
        self.shape = ""

    def announce(self) -> None:
        """Say what the rows are taken for."""
        halves = {
            "demonstrations": " (prompt and chosen answer)",
            "unpaired": " (each pair as a liked and a disliked answer)",
        }
        pairs = bool({"chosen", "rejected_response"} & set(self.format.columns))
        taken = halves.get(self.kind, "") if pairs else ""
        log.info("%s: format %s, used for %s%s", self.origin, self.format.name, self.kind, taken)

    def divide(self, columns: Sequence[str]) -> tuple[list[str], list[str]]:
        """The columns that the format uses, and the others, which stay as they are."""
        read = (*self.format.columns, *self.format.optional, *ANNOTATIONS.get(self.kind, ()))
        used = [name for name in columns if name in read]
        # Alpaca's rows repeat themselves in a column "text": it is not to be taken for what is learnt.
        return used, [name for name in columns if name not in (*used, *CANONICAL[self.kind])]

    def convert_all(self, columns: dict[str, list[Any]], first: int = 0) -> tuple[list[int], list[Row]]:
        """Places in this batch of the rows that are kept, and their canonical columns; ``first`` numbers its first row."""
        kept: list[int] = []
        rows: list[Row] = []
        for place, values in enumerate(zip(*columns.values(), strict=True)):
            new = self.try_row(dict(zip(columns, values, strict=True)), f"{self.origin}, row {first + place + 1}")
            rows += new
            kept += [place] * len(new)
        return kept, rows

    def try_row(self, row: Row, place: str) -> list[Row]:
        """The canonical columns of the rows that one makes: none if there is nothing to learn from it, which is counted.

        Raises:
            UserError: If it is malformed; names its place.
        """
        try:
            return self.convert(row)
        except NoSignalError as reason:
            self.dropped[str(reason)] += 1
            return []
        except UserError as error:
            raise UserError(f"{place} (read as {self.format.name}): {error}") from error

    def convert(self, row: Row) -> list[Row]:
        """The canonical columns of what one row makes, all like the first: text throughout, or messages throughout."""
        made = VIEWS[self.kind](self.format.read(row))
        said = annotations(row, self.kind)
        new = [part | said for part in (made if isinstance(made, list) else [made])]
        texts = {name: value for name, value in new[0].items() if isinstance(value, str | list) and name not in RANKED}
        shape = ", ".join(f"'{name}' as {'text' if isinstance(v, str) else 'messages'}" for name, v in texts.items())
        self.shape = self.shape or shape
        if shape != self.shape:
            raise UserError(f"gives {shape}, where the rows before give {self.shape}; make them alike")
        return new

    def reasons(self) -> str:
        """What was left out and why, in one line."""
        return ", ".join(f"{count} with {reason}" for reason, count in self.dropped.items())
