"""What it takes for a file to be whole or not there, and what a disk says when it refuses."""

import errno
import os
from pathlib import Path

SCRATCH = ".tmp"  # of a name that begins with a dot


def scratch_of(path: Path) -> Path:
    """Where something is written before it has its name: in the same folder, for a rename can't leave the disk."""
    return path.with_name(f".{path.name}{SCRATCH}")


def flush_folder(folder: Path) -> None:
    """Bring renames to the disk."""
    if os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(error: BaseException | None) -> str | None:
    """What the disk said, in short; None if it was not the disk."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or os.strerror(error.errno or errno.EIO)
        if "PytorchStreamWriter failed" in str(error):
            return "the disk is full or failed"
        error = error.__cause__ or error.__context__
    return None
