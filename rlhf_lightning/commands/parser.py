"""Parsers whose complaints are one line, like all others here."""

from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_lightning.errors import UserError


class CommandParser(ArgumentParser):
    """For the commands beside the Trainer's."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_line(message)) from ex


class TrainerParser(LightningArgumentParser):
    """For fit, validate, test and predict."""

    def error(self, message: Any, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_line(message)) from ex


def one_line(message: str) -> str:
    """jsonargparse nests its messages over several indented lines."""
    return " ".join(str(message).split())
