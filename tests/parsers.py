"""The parsers of fit, validate, test and predict, built once in a process: that takes longer than to use them."""

from functools import cache

from rlhf_lightning.cli import BuildOnly, run_trainer


class Built(Exception):
    """Carries a parser out of the command line that built it."""


class ParserOnly(BuildOnly):
    def parse_arguments(self, parser, args):
        raise Built(parser, self._subcommand_parsers)


@cache
def trainer_parsers():
    """The parser of all commands, and those of each by name."""
    try:
        run_trainer(["fit"], ParserOnly)
    except Built as built:
        return built.args
    raise AssertionError("no parser was built")
