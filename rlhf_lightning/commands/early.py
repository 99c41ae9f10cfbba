"""What a command line can be answered before torch and Lightning are imported: the command list, help, and plain mistakes.

Importing them takes several seconds. A mistake is reported here only where the source code tells it for certain; anything
else is left to the parser of the command, which has the classes themselves.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Path as CheckedPath

from rlhf_lightning.commands import registry, source_code
from rlhf_lightning.commands.config_lines import Typed, typed_keys
from rlhf_lightning.commands.help_page import help_page, wants_help
from rlhf_lightning.commands.imports import PACKAGES, POLICY, read_imports, under
from rlhf_lightning.commands.parser import CommandParser, ParserError, command_parser, keys_as_typed
from rlhf_lightning.commands.source_code import Found, Parameter
from rlhf_lightning.commands.typed_keys import DEPTH, NO_KEYS, CommandLine
from rlhf_lightning.data.paths import existing, is_path, looks_like_file
from rlhf_lightning.errors import UserError

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
LOADERS = ("self", "model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule")  # no keys of YAML
NO_LEVEL = frozenset(
    {"int", "float", "bool", "str", "bytes", "list", "tuple", "set", "pathlib.Path", "typing.Optional", "typing.Union"}
    | {"collections.abc.Sequence", "collections.abc.Iterable", "typing.List"}
)


def answered(args: Sequence[str]) -> bool:
    """Answer a command line as far as that needs no import of torch.

    Args:
        args: As typed, the command first.

    Returns:
        Whether that was all.

    Raises:
        UserError: Over an unknown command, a config that does not exist or is not YAML, an unknown key, a value of the wrong
            type, or a file of rows that does not exist.
        SystemExit: After the help of a command.
    """
    words = read_imports(list(args))
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return True
    if name not in registry.TRAINER_COMMANDS | registry.COMMANDS | registry.FIT_COMMANDS:
        print(usage())
        raise UserError(f"{name!r} is not a command")
    asks = next((i for i, word in enumerate(words) if asks_for_help(word)), len(words))
    check_configs(words[1:asks])
    if name in registry.COMMANDS and (function := source_code.stand_in(registry.COMMANDS[name])) is not None:
        parser = command_parser(name, function)
        if wants_help(words[1:]):
            print(help_page(name, parser, words[1:]))
            return True
        with keys_as_typed(parser, words[1:]):
            parser.parse_args(words[1:])
    elif asks == len(words):
        Line(name, words[1:]).check()
    return False


def usage() -> str:
    """The command list."""
    lines = ["usage: python -m rlhf_lightning COMMAND [-c CONFIG ...] [--KEY VALUE ...]", ""]
    lines += [f"  {name:<12} {said}" for name, said in registry.TRAINER_COMMANDS.items()]
    functions = registry.COMMANDS | registry.FIT_COMMANDS
    lines += [f"  {name:<12} {source_code.first_line(path)}" for name, path in functions.items()]
    lines += [
        "",
        "COMMAND --help lists its keys. --import MODULE (or FILE.py), here alone, lets a config use what is in it.",
    ]
    return "\n".join(lines)


def asks_for_help(word: str) -> bool:
    """Whether an argument prints something instead of running the command."""
    flag = word.partition("=")[0]
    return flag in ("-h", "--help", "--print_config", "--print_shtab") or (flag[:2] == "--" and flag.endswith(".help"))


def check_configs(words: Sequence[str]) -> None:
    """Check that config files exist.

    Raises:
        UserError: If one does not.
    """
    for flag, following in pairwise([*words, ""]):
        name, equals, value = flag.partition("=")
        value = value if equals else following
        if name not in ("-c", "--config") or not value or Path(value).exists() or not is_text(value):
            continue
        try:
            CheckedPath(value, mode="fr")
        except TypeError as error:
            raise UserError(f"-c: {error}") from None


def is_text(value: str) -> bool:
    """Whether a value is plain text, which a config given on the command line itself is not."""
    try:
        return isinstance(yaml.load(value, yaml.BaseLoader), str)
    except yaml.YAMLError:
        return False


class Line(CommandLine):
    """A command line, and the keys that the source code of the chosen classes accepts."""

    def __init__(self, command: str, args: Sequence[str]) -> None:
        """Args: the command, and its arguments."""
        self.command, self.args = command, args
        self.typed = list(typed_keys(args))
        self.known: dict[str, Parameter | None] = {}
        self.open: set[str] = set()  # keys below which everything is left to the parser
        self._explore(everywhere=False)

    @property
    def keys(self) -> list[str]:
        """Every accepted key."""
        return list(self.known)

    @property
    def actions(self) -> list[tuple[str, Any, Any]]:
        """Every accepted key; type hints and defaults would need imports."""
        return [(key, None, None) for key in self.known]

    @property
    def types(self) -> list[tuple[str, Any]]:
        """Every accepted key."""
        return [(key, None) for key in self.known]

    def check(self) -> None:
        """Check keys, values and the file of rows.

        Raises:
            UserError: Over the first that is wrong.
        """
        for typed in self.typed:
            if not self._may_be_known(typed):
                self._explore(everywhere=True)  # for suggestions
                raise UserError(self.unknown(typed.name) or f"{typed.place} is not a key")
        parser = CommandParser()
        for typed in self.typed:
            self._check_value(parser, typed)
        self._check_source()

    def _may_be_known(self, typed: Typed) -> bool:
        name = typed.name
        if name in self.known or name.split(".")[0] in NO_KEYS or "dict_kwargs" in typed.key.split("."):
            return True
        if any(under(name, [key]) for key in self.open):
            return True
        return typed.file is None and any(key.startswith(name) for key in self.known)  # a flag may be shortened

    def _check_value(self, parser: CommandParser, typed: Typed) -> None:
        """Compare a value with the type of its key, where that is a number or a choice by name."""
        parameter = self.known.get(typed.name)
        in_list = any(part.isdigit() for part in typed.key.split("."))
        if parameter is None or in_list or typed.value[:1] in ("", "[", "{") or typed.key.endswith("class_path"):
            return
        try:
            kind = source_code.type_of(parameter.annotation, parameter.module, source_code.NUMBERS)
        except LookupError:
            return
        if f"--{typed.name}" not in parser._option_string_actions:
            parser.add_argument(f"--{typed.name}", type=kind)
        try:
            parser.parse_args([f"--{typed.name}={typed.value}"])
        except ParserError as error:
            if (said := self.bad_value(typed.name, error.message)) is not None:
                raise UserError(said) from None

    def _check_source(self) -> None:
        """Check that a file of rows exists, where that is the only one named, or named by a flag behind the config files."""
        if not all(under(found.path, ["rlhf_lightning.data"]) for found in self._classes("data", None) or []):
            return
        last = max((i for i, word in enumerate(self.args) if word.startswith(("-c", "--config"))), default=0)
        for typed in (list(typed_keys(self.args[last:])), self.typed):
            given = [one.value for one in typed if one.file is None or typed is self.typed if one.name == "data.source"]
            if given:
                break
        else:
            return
        if len(set(given)) == 1 and is_path(given[0]) and ("/" in given[0] or looks_like_file(given[0])):
            existing(given[0])

    def _explore(self, everywhere: bool) -> None:
        """Collect the accepted keys: all of them, or only those on the way to keys that were typed, which is faster."""
        self.everywhere = everywhere
        for key, parameter in roots(self.command):
            self._add(key, parameter, DEPTH)

    def _add(self, key: str, parameter: Parameter | None, depth: int) -> None:
        """Accept a key and the keys below it."""
        parts = key.split(".")
        for end in range(1, len(parts)):
            self.known.setdefault(".".join(parts[:end]), None)
        self.known.setdefault(key, parameter)
        if not self.everywhere and not any(typed.name.startswith(f"{key}.") for typed in self.typed):
            return
        classes = self._classes(key, parameter) if depth else None
        if classes is None:
            self.open.add(key)
            return
        for found in classes:
            inner = source_code.parameters(found)
            if inner is None:
                self.open.add(key)
            for below in inner or []:
                self._add(f"{key}.{below.name}", below, depth - 1)

    def _classes(self, key: str, parameter: Parameter | None) -> list[Found] | None:
        """Classes whose arguments a key has; None where the source code does not tell."""
        named = {typed.value for typed in self.typed if typed.name == key and typed.value[:1] not in ("", "[", "{")}
        if named:
            chosen = [class_of(name) for name in named]
            return None if None in chosen else [found for found in chosen if found is not None]
        if parameter is None:
            return None
        paths = [p for p in source_code.names_in(parameter.annotation, parameter.module) if p not in NO_LEVEL]
        found = [f for path in paths if (f := source_code.find(path)) is not None and source_code.is_dataclass(f)]
        if len(found) != len(paths):
            return None
        if isinstance(parameter.default, ast.Call):
            default = parameter.module.path_of(parameter.default.func)
            origin = source_code.find(default)
            return [f for f in found if origin and f.path == origin.path] or None
        return found


def class_of(name: str) -> Found | None:
    """The class of an import path or a short name; None if it is not in the packages that a config may import."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return None
    if "." not in name:
        paths = () if POLICY.given else source_code.classes_named(name)
        name = paths[0] if len(paths) == 1 else ""
    found = source_code.find(name) if under(name, PACKAGES) else None
    return found if found is not None and isinstance(found.node, ast.ClassDef) else None


def roots(command: str) -> Iterator[tuple[str, Parameter | None]]:
    """The keys of a command at the top of a config, each with what is known of it."""
    if command in registry.COMMANDS:
        found = source_code.find(registry.COMMANDS[command])
        for parameter in (source_code.parameters(found) if found else None) or []:
            yield parameter.name, parameter
        return
    trainer = source_code.find(TRAINER)
    yield "seed_everything", None
    for parameter in (source_code.parameters(trainer) if trainer else None) or []:
        yield f"trainer.{parameter.name}", parameter
    yield from dict.fromkeys(("model", "data", *registry.RUN_FLAGS)).items()
    for key, path in registry.RUN_CLASSES.items():
        found = source_code.find(path)
        for parameter in (source_code.parameters(found) if found else None) or []:
            yield f"{key}.{parameter.name}", parameter
    yield from dict.fromkeys(registry.FIT_FLAGS.get(command, ())).items()
    loop = "fit" if command in registry.FIT_COMMANDS else command
    methods = trainer.node.body if trainer and isinstance(trainer.node, ast.ClassDef) else []
    for method in methods:
        if isinstance(method, ast.FunctionDef) and method.name == loop:
            yield from ((a.arg, None) for a in method.args.args if a.arg not in LOADERS)
