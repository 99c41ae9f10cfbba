"""Parsers whose complaints are one line, like all others here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_lightning.errors import UserError

# Lines of jsonargparse's nested messages that tell a user nothing.
NOISE = ("Given value", "Errors:", "- Expected a <class 'NoneType'>", "Does not validate against any of the Union")


class CommandParser(ArgumentParser):
    """For the commands beside the Trainer's."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise users_mistake(ex) or UserError(one_line(message)) from ex


class TrainerParser(LightningArgumentParser):
    """For fit, validate, test and predict."""

    def error(self, message: Any, ex: Exception | None = None) -> NoReturn:
        raise users_mistake(ex) or UserError(one_line(message)) from ex


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Instantiating classes from a config: jsonargparse wraps what a constructor raises; unwrap it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if (mistake := users_mistake(error)) is not None:
            raise mistake from None
        raise


def users_mistake(error: BaseException | None) -> UserError | None:
    """The :class:`UserError` that an exception was raised from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def one_line(message: str) -> str:
    """jsonargparse nests its messages over several indented lines."""
    lines = [line.strip() for line in str(message).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE))
