"""The one exception that a user's mistake raises, at whatever depth it is found, and text that is safe to show."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the person at the keyboard can put right: a file, a row, a key, a folder.

    The message is one line that names the thing and says what to do; a list, as of bad rows, has further lines. Commands
    print it without a traceback and exit with code 2. Whatever it quotes can't command the terminal.
    """

    def __init__(self, message: str, *more: str) -> None:
        self.lines = [harmless(line).replace("\n", r"\n") for line in (message, *more)]  # what is quoted may hold lines
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, ...]]:
        """Between processes, the lines stay apart."""
        return type(self), tuple(self.lines)


@contextmanager
def reported() -> Iterator[None]:
    """Print a :class:`UserError` to stderr, without a traceback, and exit with code 2."""
    try:
        yield
    except UserError as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        raise SystemExit(2) from None


class RunStopped(Exception):
    """A run that was asked to end, and that has saved where it stands."""


def harmless(text: str) -> str:
    """Text to be shown: what is not printable, newlines and tabs apart, is shown as its code.

    That is every terminal escape and control character, what reverses the direction of text or hides in it, and halves of
    surrogate pairs, which no file can hold.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else code(c) for c in text)


def code(character: str) -> str:
    """A character as Python would write it."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def missing_model(path: str) -> str:
    """Say that a folder is missing, and which command makes it where the layout of runs/ and configs/ tells."""
    parts = Path(path).parts
    if parts[-1:] == ("export",) and len(parts) >= 3:
        config = Path("configs", *parts[-3:-1]).with_suffix(".yaml")
        if config.is_file():
            return f"{path} does not exist yet; make it with: python -m rlhf_lightning fit --config {config}"
    return f"{path} is neither a folder here ({Path.cwd()}) nor reachable on the hub; check it or run the stage that exports it"
