"""What the text of a source may be: a file or folder, or a hub id. Needs no import of ``datasets``."""

from pathlib import Path

from rlhf_lightning.errors import UserError

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "csv",
    ".tsv.gz": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
READABLE = tuple(KINDS)


def is_path(source: str) -> bool:
    """Whether a text is a path and not a hub id ``owner/name``."""
    owner, _, name = source.partition("/")
    return not (owner and name) or "/" in name or source.startswith((".", "~")) or looks_like_file(name)


def looks_like_file(name: str) -> bool:
    """Whether a name ends as data files do."""
    return name.lower().endswith((*READABLE, ".gz"))


def existing(path: str) -> Path:
    """The path.

    Raises:
        UserError: If nothing is there.
    """
    expanded = Path(path).expanduser()
    if not expanded.exists():
        raise UserError(f"{path} does not exist (working directory {Path.cwd()}); a hub dataset is named 'owner/name'")
    return expanded
