"""The keys and values of a command line and of its config files, each with the file and line that holds it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

from rlhf_lightning.errors import UserError

CONFIG_FLAGS = ("-c", "--config")
CONFIG_FILES = (".yaml", ".yml")  # a value that ends so may be a file with the keys of a class


class Typed(NamedTuple):
    """A key with its value, both as typed; ``file`` is the config file that holds them, None on the command line."""

    key: str
    value: str
    file: str | None
    line: int | None = None

    @property
    def place(self) -> str:
        """The key as the user finds it."""
        return f"--{self.key}" if self.file is None else f"{self.file}:{self.line}, {self.key}"

    @property
    def name(self) -> str:
        """The key as it is on the command line, without the levels that only files have."""
        return plain_key(self.key)


def plain_key(key: str) -> str:
    """A dotted key without ``init_args``, ``class_path`` and the indices of lists."""
    parts = [
        p for p in key.rstrip("+").split(".") if p not in ("init_args", "dict_kwargs", "class_path") and not p.isdigit()
    ]
    return ".".join(parts)


def config_files(args: Sequence[str]) -> Iterator[str]:
    """The files behind ``-c`` and ``--config``."""
    for flag, following in pairwise([*args, ""]):
        name, equals, value = flag.partition("=")
        if name in CONFIG_FLAGS and Path(file := value if equals else following).is_file():
            yield file


def typed_keys(args: Sequence[str]) -> Iterator[Typed]:
    """Every key of a command line and of its config files, also those inside a mapping, a list, or a file given as a value.

    Raises:
        UserError: If a config file is not YAML.
    """
    for flag, following in pairwise([*args, "--"]):
        if not flag.startswith("--") or flag == "--":
            continue
        key, equals, value = flag[2:].partition("=")
        value = value if equals else "" if following.startswith("--") else following
        yield Typed(key, value, None)
        if value[:1] in ("{", "["):
            try:
                node = yaml.compose(value, yaml.BaseLoader)
            except yaml.YAMLError:
                continue  # jsonargparse takes it for text too
            yield from (typed._replace(line=None) for typed in _inside(node, key, None))
        elif key != "config":
            yield from _file_given_as_value(value, key, ())
    for file in config_files(args):
        yield from keys_of_file(file)


def keys_of_file(file: str, prefix: str = "", opened: tuple[Path, ...] = ()) -> Iterator[Typed]:
    """Every key of a config file, and of the files that it names as values.

    Args:
        file: The path, as the user finds it from here.
        prefix: Key that the file is the value of; empty for a config of its own.
        opened: The files that name this one.

    Raises:
        UserError: If it is not YAML.
    """
    try:
        node = yaml.compose(Path(file).read_text(encoding="utf-8"), yaml.BaseLoader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where is not None else ""
        raise UserError(f"{file}{line}: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file in UTF-8; give a YAML file") from error
    except RecursionError as error:
        raise UserError(f"{file}: lists or mappings are nested too deep") from error
    for typed in _inside(node, prefix, file):
        yield typed
        yield from _file_given_as_value(typed.value, typed.key, (*opened, Path(file)))


def _file_given_as_value(value: str, key: str, opened: tuple[Path, ...]) -> Iterator[Typed]:
    """The keys of the config file that a value names: relative to the file that names it, as jsonargparse reads it."""
    if not value.endswith(CONFIG_FILES):
        return
    path = Path(*(file.parent for file in opened[-1:]), value)
    if path.is_file() and path.resolve() not in [file.resolve() for file in opened]:
        yield from keys_of_file(str(path), key, opened)


def _inside(node: yaml.Node | None, prefix: str, file: str | None, around: tuple[int, ...] = ()) -> Iterator[Typed]:
    """The keys below a node of a YAML document."""
    if node is None or id(node) in around:  # an alias may name what it is in
        return
    if isinstance(node, yaml.MappingNode):
        parts = [(str(key.value), part, key) for key, part in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        parts = [(str(index), part, part) for index, part in enumerate(node.value)]
    else:
        return
    for name, part, start in parts:
        key = f"{prefix}.{name}".lstrip(".")
        yield Typed(key, _text(part), file, start.start_mark.line + 1)
        yield from _inside(part, key, file, (*around, id(node)))


def _text(node: yaml.Node) -> str:
    """A value as it would be written on one line."""
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{_text(key)}: {_text(part)}' for key, part in node.value)}}}"
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(_text(part) for part in node.value)}]"
    return str(node.value)
