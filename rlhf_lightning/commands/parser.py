"""Parsers whose complaints are one line, like all others here."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, _typehints

from rlhf_lightning.commands.constructor_errors import located
from rlhf_lightning.commands.imports import denied
from rlhf_lightning.commands.typed_keys import explained
from rlhf_lightning.errors import UserError

SCHEDULE = re.compile(r"Subclasses are disabled for Schedule, thus '([^']+)'|schedule\W+Unable to load config \W(\w+)")
# Lines of jsonargparse's nested messages that tell a user nothing.
NOISE = ("Given value", "Errors:", "- Expected a <class 'NoneType'>", "Does not validate against any of the Union")


def forget_other_class(parser: Any, previous: Any, value: Any) -> None:
    """Where a config names another class than stood there before, let nothing of the old one's arguments live on.

    jsonargparse keeps those whose names the new class knows too: a config with Adam would silently take over the weight decay
    of the AdamW that is a module's default, which in Adam is another thing.
    """
    if previous and previous.get("init_args") and previous["class_path"] != value["class_path"]:
        previous["init_args"] = Namespace()


_typehints.discard_init_args_on_class_path_change = forget_other_class  # there is no setting for it


AMBIGUOUS = "lightning.pytorch.cli.ReduceLROnPlateau"  # a subclass of torch's that takes the metric as an argument
_all_paths = _typehints.get_all_subclass_paths


def paths_of_subclasses(*args: Any, **kwargs: Any) -> list[str]:
    """Import paths that short names are looked up in, without one that makes the name of torch's class ambiguous."""
    return [path for path in _all_paths(*args, **kwargs) if path != AMBIGUOUS]


_typehints.get_all_subclass_paths = paths_of_subclasses


_value_or_config = _typehints.parse_value_or_config


def parsed_unless_text(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a file that is given in place of an object, unless it holds plain text: then its path is the value.

    jsonargparse puts the text in place of the path. A CSV or text file that ``data.source`` names is such a file.
    """
    parsed, path = _value_or_config(value, *args, **kwargs)
    read = parsed.val if isinstance(parsed, _typehints.NestedArg) else parsed
    return (value, None) if path is not None and isinstance(read, str) else (parsed, path)


_typehints.parse_value_or_config = parsed_unless_text


class ParserError(UserError):
    """What jsonargparse says of a command line; ``message`` has all its lines."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
        self.message = message


class OneLineErrors(ArgumentParser):
    """A parser that raises what it finds wrong as a :class:`UserError`."""

    def error(self, message: Any, ex: Exception | None = None) -> NoReturn:
        raise (
            users_mistake(ex) or denied(str(message)) or schedule_as_class(str(message)) or ParserError(str(message))
        ) from ex


class CommandParser(OneLineErrors):
    """For the commands beside the Trainer's."""


def command_parser(name: str, function: Callable[..., Any]) -> CommandParser:
    """The parser of a command that is a typed function."""
    parser = CommandParser(prog=f"rlhf_lightning {name}", description=(function.__doc__ or "").split("\n")[0])
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file.")
    parser.add_function_arguments(function, fail_untyped=True, sub_configs=True)
    return parser


@contextmanager
def keys_as_typed(parser: ArgumentParser, args: Sequence[str]) -> Iterator[None]:
    """Parsing a command line: errors name keys and values as they were typed.

    Args:
        parser: That of the command.
        args: The command line, without the command.
    """
    try:
        yield
    except ParserError as error:
        if (better := explained(error.message, args, parser)) is not None:
            raise UserError(better) from error
        raise
    except (UserError, ValueError) as error:  # of a constructor, which parsing calls for some
        if (mistake := located(error, parser, args)) is not None:
            raise mistake from error
        raise


@contextmanager
def users_mistakes(parser: ArgumentParser, args: Sequence[str]) -> Iterator[None]:
    """Instantiating classes from a config: errors of constructors name the key, file and line.

    Args:
        parser: That of the command.
        args: The command line, without the command.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # not above: it needs torch

    try:
        yield
    except (UserError, ValueError, TypeError, MisconfigurationException) as error:
        if (mistake := located(error, parser, args) or users_mistake(error)) is not None:
            raise mistake from None
        raise


def users_mistake(error: BaseException | None) -> UserError | None:
    """The :class:`UserError` that an exception was raised from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def schedule_as_class(message: str) -> UserError | None:
    """The refusal of a scheduler's class or name as the value of ``schedule`` itself; None if that was not it."""
    found = SCHEDULE.search(message)
    if found is None:
        return None
    name = (found[1] or found[2]).rpartition(".")[2]
    if name[0].isupper():
        return UserError(
            f"schedule: name a class with schedule.scheduler: {name}, or {{class_path: {name}, init_args: {{...}}}}"
        )
    return UserError(f"schedule: name a schedule with schedule.decay: {name}, and its arguments with schedule.options")


def one_line(message: str) -> str:
    """jsonargparse nests its messages over several indented lines."""
    lines = [line.strip() for line in str(message).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE))
