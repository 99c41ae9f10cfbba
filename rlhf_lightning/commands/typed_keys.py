"""Errors of the command line that name the key as it was typed, quote the value as it was typed, and suggest the nearest key.

jsonargparse parses nested classes with parsers of their own, which know only the end of a key: its errors say ``lr`` where the
user typed ``--model.optimizer.lr``. Here the end is looked up among the flags and the config files of the command line.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from jsonargparse import ArgumentParser

from rlhf_lightning.commands.class_names import (
    classes_in,
    fitting_names,
    imported,
    loaded_names,
    named_classes,
    nearest_class,
    subclasses,
)
from rlhf_lightning.commands.config_lines import Typed, plain_key, typed_keys

UNKNOWN = re.compile(
    r"unrecognized arguments: --(?P<flag>[^\s=]+)"
    r"|ambiguous option: --(?P<short>[^\s=]+)\S* could match"
    r"|(?:Group '(?P<group>[^']+)'|Subcommand '[^']+') does not accept option '(?P<member>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted"
)
NO_VALUE = re.compile(r"argument --(?P<flag>[^\s:]+): expected one argument")
BAD_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)"')
MISSING = re.compile(r"the following arguments are required: (?P<keys>.+)|Key \"(?P<key>[^\"]+)\" is required")
COMMAND = re.compile(r"^(fit|validate|test|predict)\.")
NO_CLASS = (
    "dot import path string",
    "Problem with given class_path",
    "Not a valid subclass",
    "Import path",
    "has no attribute",
    "an instantiatable class",
)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list", "dict": "a mapping"}
KINDS |= {"NoneType": "null", "str": "text"}
DEPTH = 8  # levels of nested classes
NO_KEYS = ("help", "config", "subcommand", "print_config", "print_shtab")
MANY, MANY_CLASSES = 20, 30  # keys and classes are not listed beyond this


def explained(message: str, args: Sequence[str], parser: ArgumentParser) -> str | None:
    """What jsonargparse says of a command line, in terms of what was typed.

    Args:
        message: jsonargparse's message, on all its lines.
        args: The command line, without the command.
        parser: That of the command.

    Returns:
        One line; None where the message says nothing of a key, or nothing was typed that it can mean.

    Raises:
        UserError: If a config file is not YAML.
    """
    line = CommandLine(args, parser)
    if found := MISSING.search(message):
        keys = [line.required(COMMAND.sub("", key)) for key in (found["keys"] or found["key"]).split(", ")]
        flags = ", ".join(f"--{key}" for key in keys)
        return f"{flags} {'is' if len(keys) == 1 else 'are'} required; give it as a flag or in a config file"
    if found := UNKNOWN.search(message):
        end = found["flag"] or found["short"] or found["member"] or found["option"]
        return line.unknown(f"{found['group']}.{end}" if found["group"] else end)
    if found := NO_VALUE.search(message):
        without = [t for t in line.typed if not t.value and f"{t.name}.".startswith(f"{found['flag']}.")]
        return f"{without[0].place} needs a value" if without else None
    if found := BAD_VALUE.search(message):
        return line.bad_value(found["key"], message)
    return None


class CommandLine:
    """What was typed for a command, and which keys the command accepts with the classes that were chosen."""

    def __init__(self, args: Sequence[str], parser: ArgumentParser) -> None:
        """Args: the command line without the command, and the parser of the command."""
        self.typed, self.parser = list(typed_keys(args)), parser

    @cached_property
    def types(self) -> list[tuple[str, Any]]:
        """Every accepted key with its type hint; None for a group of keys."""
        return list(dict.fromkeys((key, kind) for key, kind, _ in self.actions))

    @cached_property
    def actions(self) -> list[tuple[str, Any, Any]]:
        """Every accepted key with its type hint and its default."""
        return list(_keys_and_types(self.parser, self.typed))

    @cached_property
    def keys(self) -> list[str]:
        """Every accepted key."""
        return list(dict.fromkeys(key for key, _ in self.types))

    def bases(self, name: str) -> list[type]:
        """The classes in the type hint of a key."""
        return [base for key, kind in self.types if key == name for base in classes_in(kind)]

    def ending(self, end: str) -> list[Typed]:
        """Typed keys that the end of a key can mean, the shortest first."""
        end = plain_key(end)
        found = [t for t in self.typed if t.name == end or t.name.endswith(f".{end}")]
        return sorted(found, key=lambda t: t.name.count("."))

    def unknown(self, end: str) -> str | None:
        """The error over a key that no class has."""
        meant = self.ending(end)
        if not meant:
            return None
        # In a list, a key of one class may be unknown to another.
        first = next((t for t in meant if t.name not in self.keys or not self.known_there(t)), meant[0])
        if first.name in self.keys:
            return f"{first.place} is not a key of the class that is given there"
        parent, _, last = first.name.rpartition(".")
        siblings = [key.rpartition(".")[2] for key in self.keys if key.rpartition(".")[0] == parent]
        near = [f"{parent}.{key}".lstrip(".") for key in siblings if key.startswith(last)]
        near = near or [key for key in (nearest(first.name, self.keys),) if key]
        if len(siblings) == 1 and not near:
            near = [f"{parent}.{siblings[0]}".lstrip(".")]
        if near:
            return f"{first.place} is not a key; did you mean {' or '.join(_as_typed(key, first) for key in near)}?"
        listed = f"{parent or 'the command'} has {', '.join(siblings)}"
        return f"{first.place} is not a key; {listed if 0 < len(siblings) <= MANY else '--help lists the keys'}"

    def known_there(self, key: Typed) -> bool:
        """Whether the class that is named beside a key has it; true where none is named."""
        owner, _, rest = key.key.rpartition(".init_args.")
        named = {t.value for t in self.typed if owner and t.file == key.file and t.key == f"{owner}.class_path"}
        for cls in named_classes(named, self.bases(plain_key(owner))):
            return plain_key(rest) in {name for name, _, _ in _keys_and_types(parser_of(cls), [])}
        return True

    def bad_value(self, end: str, message: str) -> str | None:
        """The error over a value that does not have the type of its key."""
        reason = " ".join(message.split(": ", 1)[-1].split())
        if end == "config" and "File does not exist" in message:
            return f"-c: {reason}"
        meant = self.ending(end)
        if not meant:
            return None
        quoted = [t for t in meant if t.value and t.value in message]
        first = next((t for t in quoted if t.value[0] not in "[{"), (quoted or meant)[0])
        start = f"{first.place}: {first.value!r} is not"
        if choices := re.findall(r"Literal\[(.+?)\]", message):
            names = list(dict.fromkeys(choice.strip(" '\"") for choice in ",".join(choices).split(",")))
            others = " or a list" if "<class 'list'>" in message else ""
            return f"{start} one of {', '.join(names)}{others}{_hint(first.value, names)}"
        of_class = any(sign in message for sign in NO_CLASS)
        better, listed = self.class_instead(first) if of_class else ("", "")
        kinds = re.findall(r"Expected an? <class '(\w+)'>|Subtypes: \[(.+)\]", message)
        inner = [name for one, several in kinds for name in [one, *re.findall(r"(\w+)'?>", several)] if name in KINDS]
        wanted = sorted({KINDS[name] for name in inner}, key=lambda kind: (kind == KINDS["NoneType"], kind))
        if set(wanted) - {KINDS["NoneType"]} and not better:
            return f"{start} {' or '.join(wanted)}"
        if "Unable to load config" in message and (inside := self.inside(first.name)):
            return f"{start} a mapping of {', '.join(inside)}"
        return f"{start} a class that fits here{better or listed}" if of_class else f"{first.place}: {reason}"

    def class_instead(self, typed: Typed) -> tuple[str, str]:
        """What to give for a class that does not fit: the nearest one or what to write; and all that do, if they are few."""
        bases, module = self.bases(typed.name), sys.modules.get(typed.value.rpartition(".")[0])
        names = fitting_names(bases)
        listed = f"; these do: {', '.join(names)}" if 0 < len(names) <= MANY_CLASSES else ""
        if (cls := imported(typed.value)) is not None and bases:
            from rlhf_lightning.losses.checks import abstract_methods, contract  # not above: it needs torch

            lacking = f"; it has no {', '.join(abstract_methods(cls))}" if inspect.isabstract(cls) else ""
            return f"{lacking}; {contract(bases[0])}", listed
        own = [name for name, x in vars(module).items() if isinstance(x, type)] if module else []
        if (near := nearest_class(typed.value, own)) and near not in names:
            return f"; did you mean {typed.value.rpartition('.')[0]}.{near}?", listed
        if typed.value not in loaded_names() and (near := nearest_class(typed.value, names)):
            return f"; did you mean {near}?", listed
        return "", listed

    def inside(self, key: str) -> list[str]:
        """The accepted keys directly below a key."""
        return [name.rpartition(".")[2] for name in self.keys if name.rpartition(".")[0] == key]

    def required(self, end: str) -> str:
        """The full key of one that a class requires and that was not typed."""
        typed = {t.name for t in self.typed}
        missing = [key for key in self.keys if f".{key}".endswith(f".{end}") and key not in typed]
        return min((key for key in missing if key.rpartition(".")[0] in ("", *typed)), key=len, default=end)

    def chosen(self, key: str) -> list[type]:
        """The classes that a key has with what was typed."""
        return [
            cls
            for name, kind, default in self.actions
            if name == key
            for cls in _chosen(key, kind, default, self.typed)
        ]

    def keys_of(self, cls: type) -> list[str]:
        """The keys that have this class with what was typed."""
        return [key for key in self.keys if cls in self.chosen(key)]


def _as_typed(name: str, like: Typed) -> str:
    """A key in the form of another one: as a flag, or with the levels of a file."""
    parent, _, last = name.rpartition(".")
    if parent == like.name.rpartition(".")[0]:
        name = f"{like.key.rpartition('.')[0]}.{last}".lstrip(".")
    return name if like.file else f"--{name}"


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The accepted key that an unknown one is most likely meant to be; None where none is near.

    Args:
        name: The unknown key, dotted.
        known: Accepted keys, dotted.
    """
    parent, _, last = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    initials = "".join(word[:1] for word in last.split("_"))
    if len(initials) > 1 and initials in siblings:  # lr for learning_rate
        return siblings[initials]
    if close := get_close_matches(last, siblings, 1, 0.6):
        return siblings[close[0]]
    # The right name in another place, the nearest place first.
    elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    if elsewhere:
        return min(elsewhere, key=lambda key: (not key.startswith(f"{name.split('.')[0]}."), key.count(".")))
    alike = [key for key in known if get_close_matches(last, [key.rpartition(".")[2]], 1, 0.6)]
    return next(iter(get_close_matches(name, alike, 1, 0.75)), None)


def _hint(value: str, names: Sequence[str]) -> str:
    close = get_close_matches(value.rpartition(".")[2], names, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


# ---------------------------------------------------------------- which keys there are


def _keys_and_types(
    parser: ArgumentParser, typed: list[Typed], prefix: str = "", depth: int = DEPTH
) -> Iterator[tuple[str, Any, Any]]:
    for action in parser._actions:
        if action.dest in (NO_KEYS if not prefix else ("help",)) or action.dest.endswith(".help"):
            continue
        key = prefix + action.dest
        parts = key.split(".")
        yield from ((".".join(parts[:end]), None, None) for end in range(1, len(parts)))
        kind = getattr(action, "_typehint", None)
        yield key, kind or getattr(action, "basetype", None), action.default
        chosen = _chosen(key, kind, action.default, typed)
        for cls in chosen if depth else ():
            yield from _keys_and_types(parser_of(cls), typed, f"{key}.", depth - 1)


def _chosen(key: str, kind: Any, default: Any, typed: list[Typed]) -> list[type]:
    """Classes whose arguments a key has: those that were typed, else its default's, else the one dataclass of its type."""
    bases = classes_in(kind)
    named = {t.value for t in typed if t.name == key}
    found = [
        cls for base in bases for cls in subclasses(base) if named & {cls.__name__, f"{cls.__module__}.{cls.__name__}"}
    ]
    found += [cls for path in named if "." in path and (cls := imported(path)) and cls not in found]
    if not found and dataclasses.is_dataclass(default) and type(default) in bases:
        found = [type(default)]
    return found or [base for base in bases if dataclasses.is_dataclass(base)]


def parser_of(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    return parser
