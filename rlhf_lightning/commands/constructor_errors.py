"""Errors that a constructor raises, under the key that the object was built for."""

import inspect
import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from rlhf_lightning.commands.config_lines import Typed
from rlhf_lightning.commands.typed_keys import CommandLine
from rlhf_lightning.errors import UserError

LIGHTNINGS = "MisconfigurationException"  # by name: importing it takes seconds, which an early error need not spend
CONSTRUCTORS = ("__init__", "__post_init__")
ABSTRACT = re.compile(r"Can't instantiate abstract class (\w+)")


def located(error: BaseException, parser: ArgumentParser, args: Sequence[str]) -> UserError | None:
    """The error of a constructor, with the key, file and line of what it complains about.

    Args:
        error: As it was raised while a config was parsed or its classes were instantiated.
        parser: That of the command.
        args: The command line, without the command.

    Returns:
        One that names the place; None where no constructor of a class of this config raised the error.
    """
    cause = raised_first(error)
    if not isinstance(cause, UserError | ValueError | TypeError) and type(cause).__name__ != LIGHTNINGS:
        return None
    line = CommandLine(args, parser)
    if isinstance(cause, TypeError):
        return _of_abstract_class(str(cause), line)
    text = cause.lines if isinstance(cause, UserError) else [" ".join(str(cause).split())]
    for built in reversed(constructed(cause.__traceback__)):
        if isinstance(cause, UserError) or _raised_in_file_of(type(built), cause.__traceback__):
            keys = line.keys_of(type(built))
            if keys:
                key = max(keys, key=lambda key: _agreement(line, key, built))
                return UserError(f"{_place(line, key, type(built), text[0])}: {text[0]}", *text[1:])
    return None


def raised_first(error: BaseException) -> BaseException:
    """The error that this one was raised from: a UserError wherever there is one, else the first of all."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        if isinstance(cause, UserError):
            return cause
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain[-1]


def constructed(traceback: TracebackType | None) -> list[Any]:
    """The objects whose constructors a traceback goes through, the outermost first."""
    found = []
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name in CONSTRUCTORS and "self" in frame.f_locals:
            found.append(frame.f_locals["self"])
        traceback = traceback.tb_next
    return found


def _raised_in_file_of(cls: type, traceback: TracebackType | None) -> bool:
    """Whether the last frame is in the file of a class: what a library raises far below it needs its traceback."""
    last = None
    while traceback is not None:
        last, traceback = traceback, traceback.tb_next
    return last is not None and last.tb_frame.f_code.co_filename == inspect.getsourcefile(cls)


def _agreement(line: CommandLine, key: str, built: Any) -> int:
    """How many of the values typed below a key the object has, less those that it has not."""
    score = 0
    for typed in line.typed:
        parent, _, last = typed.name.rpartition(".")
        if parent == key and hasattr(built, last):
            score += 1 if yaml.safe_load(typed.value) == getattr(built, last) else -1
    return score


def _place(line: CommandLine, key: str, cls: type, message: str) -> str:
    """The typed key that a message is about: an argument that it names, else the key of the object."""
    named = []
    for name in inspect.signature(cls).parameters:
        typed = [t for t in line.typed if t.name == f"{key}.{name}"]
        if typed and (found := re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message)):
            named.append((found.start(), _last(typed)))
    if named:
        return min(named, key=lambda pair: pair[0])[1].place
    own = [t for t in line.typed if t.name == key]
    below = [t for t in line.typed if t.name.startswith(f"{key}.")]
    return _last(own or below).place if own or below else key


def _last(typed: list[Typed]) -> Typed:
    """The one that counts: a flag wins over files, a later file over an earlier one, a class over what is in it."""
    flags = [t for t in typed if t.file is None]
    if flags:
        return flags[-1]
    return next(t for t in typed if t.file == typed[-1].file)


def _of_abstract_class(message: str, line: CommandLine) -> UserError | None:
    """The error over a class that lacks a method of its base class; it shows what to write."""
    found = ABSTRACT.search(message)
    if found is None:
        return None
    from rlhf_lightning.losses.checks import abstract_methods, contract  # not above: it needs torch

    for key in line.keys:
        for cls in line.chosen(key):
            if cls.__name__ == found[1] and inspect.isabstract(cls):
                base = next(base for base in line.bases(key) if issubclass(cls, base))
                missing = ", ".join(abstract_methods(cls))
                own = [t for t in line.typed if t.name == key]
                place = _last(own).place if own else key
                return UserError(f"{place}: {cls.__name__} has no {missing}; {contract(base)}")
    return None
