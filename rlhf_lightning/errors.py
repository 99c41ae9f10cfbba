"""The one exception that a user's mistake raises, at whatever depth it is found."""

from pathlib import Path


class UserError(Exception):
    """Something that the person at the keyboard can put right: a file, a row, a key, a folder.

    The message is one line that names the thing and says what to do. Commands print it without a traceback and exit
    with code 2.
    """


def missing_model(path: str) -> str:
    """Say that a folder is missing, and which command makes it where the layout of runs/ and configs/ tells."""
    parts = Path(path).parts
    if parts[-1:] == ("export",) and len(parts) >= 3:
        config = Path("configs", *parts[-3:-1]).with_suffix(".yaml")
        if config.is_file():
            return f"{path} does not exist yet; make it with: python -m rlhf_lightning fit --config {config}"
    return f"{path} is neither a folder here ({Path.cwd()}) nor reachable on the hub; check it or run the stage that exports it"
