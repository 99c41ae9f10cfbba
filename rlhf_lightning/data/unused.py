"""Columns that mean something and that the format of the rows does not use: refused, not ignored."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.columns import ColumnMap, as_yaml
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.data.suggestions import MEDIA, PROMPT_LIKE, fold, is_mapping, suggestions
from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from rlhf_lightning.data.format_table import Format


class Watch:
    """The columns of a table that its format does not use and that may not be lost."""

    def __init__(
        self, columns: Sequence[str], used: Sequence[str], unused: Sequence[str], prompts: bool = True
    ) -> None:
        """Look for them.

        Args:
            columns: Of the table.
            used: Those that the format reads.
            unused: Those that the user left out on purpose.
            prompts: Whether columns that look like part of the prompt are among them.
        """
        others = [name for name in columns if name not in (*used, *unused)]
        self.media = [name for name in others if fold(name) in MEDIA]
        self.prompts = [name for name in others if fold(name) in PROMPT_LIKE] if prompts else []

    @property
    def columns(self) -> list[str]:
        """All of them."""
        return [*self.media, *self.prompts]

    def lost(self, row: Row, used: Sequence[str]) -> str | None:
        """The column of which something would be lost in this row; text that a used column repeats is not lost."""
        for name in self.media:
            if row.get(name) not in (None, "", [], {}):
                return name
        said: str | None = None
        for name in self.prompts:
            texts = list(leaves(row.get(name)))
            if texts and said is None:
                said = " ".join(text for column in used for text in leaves(row.get(column)))
            if any(text not in (said or "") for text in texts):
                return name
        return None


def leaves(value: Any) -> Iterator[str]:
    """Every text in a value that says something, its whitespace evened out; of messages, what is said."""
    if isinstance(value, str):
        yield from filter(None, [" ".join(value.split())])
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in ("role", "from"):
                yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)


def lost_column(
    name: str, row: Row, known: "Format", formats: Sequence["Format"], kind: Kind, given: ColumnMap
) -> UserError:
    """The error about a column that would be lost, with the mapping that reads it where there is one."""
    leave_out = f"data.columns: {as_yaml(given.extended({name: None}))}"
    if fold(name) in MEDIA:
        return UserError(
            f"column '{name}' holds media, which no format reads; {leave_out} uses the text alone, without it"
        )
    whole = (one for one in suggestions(formats, row, kind) if is_mapping(one) and name in one.used)
    best = next(whole, None)
    mapping = (
        f"data.columns: {as_yaml(given.extended(best.names))} reads it (format {best.format.name})" if best else ""
    )
    other = "write it into the messages of the prompt"
    return UserError(
        f"column '{name}' looks like part of the prompt, and format {known.name} does not use it; "
        f"{mapping or other}; {leave_out} leaves it out"
    )
