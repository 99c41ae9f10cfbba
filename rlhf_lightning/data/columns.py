"""The ``columns`` key of every data module: which columns of a file are which columns of a row format.

``columns: {prompt: question, completion: answer}`` reads the column "question" as "prompt" and "answer" as "completion". A null
leaves a column out: ``{system: null}``. Four keys speak of the messages inside a conversation: ``role``, ``content`` and
``tool_calls`` name the keys of a message, and ``roles`` translates the names of its speakers::

    columns: {messages: dialogue, role: speaker, content: text, roles: {Client: user, Agent: assistant}}
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from datasets import Dataset

from rlhf_lightning.data.messages import KNOWN_ROLES
from rlhf_lightning.data.rows import BAD, Row
from rlhf_lightning.errors import UserError

Columns = dict[str, str | dict[str, str] | None]
MESSAGE_KEYS = ("role", "content", "tool_calls")
ROLE_NAMES = "roles"


@dataclass(frozen=True)
class ColumnMap:
    """A parsed ``columns`` key.

    Attributes:
        names: The file's column for each column of the format.
        unused: Columns that are left out on purpose.
        keys: The file's name for each key of a message.
        roles: The role of each speaker's name.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def check_targets(self, known: Collection[str]) -> None:
        """Raise UserError if a key is no column that anything reads."""
        for name in self.names:
            if name not in known:
                close = get_close_matches(name, [*known, *MESSAGE_KEYS, ROLE_NAMES], n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
                raise UserError(f"data.columns: no row format has a column '{name}'{hint}")

    def check_sources(self, columns: Sequence[str], origin: str) -> None:
        """Raise UserError if a column that is mapped is not in the file."""
        for target, name in [*self.names.items(), *((name, name) for name in self.unused)]:
            if name not in columns:
                close = get_close_matches(name, columns, n=1)
                hint = f"did you mean '{close[0]}'? " if close else ""
                found = ", ".join(column for column in columns if column != BAD)
                raise UserError(f"{origin}: data.columns.{target} names the column '{name}': {hint}found {found}")

    def replaced(self, columns: Sequence[str]) -> list[str]:
        """Columns of the file whose name the mapping gives to another column."""
        return [name for name in columns if name in self.names and name not in self.names.values()]

    def rename(self, columns: Sequence[str]) -> dict[str, str]:
        """The new name of each column of the file that is kept."""
        targets = {source: target for target, source in self.names.items()}
        gone = self.replaced(columns)
        return {name: targets.get(name, name) for name in columns if name not in gone}

    def apply(self, dataset: Dataset, origin: str) -> Dataset:
        """The dataset with its columns renamed.

        Raises:
            UserError: If a column that is mapped is not there.
        """
        if not self.names and not self.unused:
            return dataset
        self.check_sources(dataset.column_names, origin)
        names = self.rename(dataset.column_names)
        return dataset.select_columns(list(names)).rename_columns(names)

    def apply_row(self, row: Row) -> Row:
        """One row of a stream with its columns renamed; a column that the row lacks is absent."""
        if not self.names:
            return row
        return {new: row[name] for name, new in self.rename(list(row)).items()}

    def extended(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """The ``columns`` key that reads what this one does and, of the columns that it renamed, ``more``."""
        names = {target: name for target, name in self.names.items() if target not in more.values()}
        names |= {
            target: self.names.get(name, name) if isinstance(name, str) else name for target, name in more.items()
        }
        roles = {ROLE_NAMES: dict(self.roles)} if self.roles else {}
        return {**dict.fromkeys(self.unused), **self.keys, **roles, **names}

    def respell(self, value: Any) -> Any:
        """A message, or lists of messages, with the keys and roles that readers know; other values as they are."""
        if isinstance(value, list):
            return [self.respell(part) for part in value]
        if not isinstance(value, dict) or not (self.keys or self.roles):
            return value
        message = {key: part for key, part in value.items() if key not in self.keys.values()}
        message |= {target: value[source] for target, source in self.keys.items() if source in value}
        for key in ("role", "from"):
            if isinstance(message.get(key), str):
                message[key] = self.role(message[key])
        return message

    def respell_row(self, row: Row) -> Row:
        """A row with its messages respelt, wherever they are."""
        return {name: self.respell(value) for name, value in row.items()}

    def role(self, name: str) -> str:
        """The role of a speaker, by the exact name or else whatever its case."""
        folded = {given.strip().lower(): role for given, role in self.roles.items()}
        return self.roles.get(name) or folded.get(name.strip().lower(), name)


AS_THEY_ARE = ColumnMap()


def parse_columns(columns: Columns | None) -> ColumnMap:
    """The mapping that a ``columns`` key describes.

    Raises:
        UserError: If a value is of the wrong type, a role is unknown, or two keys name one column.
    """
    names: dict[str, str] = {}
    unused, keys, roles = [], {}, {}
    for key, value in (columns or {}).items():
        if key == ROLE_NAMES:
            roles = check_roles(value)
        elif value is None:
            unused.append(key)
        elif not isinstance(value, str):
            raise UserError(f"data.columns.{key} is {value!r:.60}; it must be the name of a column, or null")
        elif key in MESSAGE_KEYS:
            keys[key] = value
        elif value in names.values():
            raise UserError(f"data.columns gives the column '{value}' twice; a column is read as one thing")
        else:
            names[key] = value
    return ColumnMap(names, tuple(unused), keys, roles)


def check_roles(roles: Any) -> dict[str, str]:
    """The roles of speakers; raises UserError if one is unknown."""
    if not isinstance(roles, dict):
        raise UserError(f"data.columns.roles is {roles!r:.60}; write {{name: role}}, such as {{Client: user}}")
    for name, role in roles.items():
        if role not in KNOWN_ROLES:
            raise UserError(f"data.columns.roles.{name} is {role!r:.40}; a role is one of {', '.join(KNOWN_ROLES)}")
    return {str(name): role for name, role in roles.items()}


def as_yaml(columns: Mapping[str, Any]) -> str:
    """A mapping as it is written in YAML, in one line."""
    parts = (
        f"{name}: {as_yaml(value) if isinstance(value, dict) else scalar(value)}" for name, value in columns.items()
    )
    return "{" + ", ".join(parts) + "}"


def scalar(value: str | None) -> str:
    """A column's name as YAML; in quotes where YAML would read something else."""
    if value is None:
        return "null"
    plain = value.replace("_", "").replace("-", "").isalnum() and not value[0].isdigit() and value[0] not in "-_"
    words = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    return value if plain and value.lower() not in words else "'" + value.replace("'", "''") + "'"
