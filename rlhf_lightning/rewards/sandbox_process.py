"""A process in a sandbox: what it is given, what it says, and its end."""

import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Literal, NamedTuple

from rlhf_lightning.errors import UserError

SETTING_UP = 60.0  # seconds until a sandbox has to be ready, on a machine that has other work too
SEALABLE = getattr(os, "MFD_ALLOW_SEALING", 0)


class Outcome(NamedTuple):
    """How a program ended ("exit", or for too much "time" or "output"), its exit code, and what it printed until then."""

    ended: Literal["exit", "time", "output"]
    code: int | None
    output: bytes


class Running:
    """A process in a sandbox; leaving the ``with`` kills it and all that it started."""

    def __init__(self, process: subprocess.Popen[bytes], folder: "tempfile.TemporaryDirectory[str] | None") -> None:
        self.process, self.folder = process, folder
        assert process.stdout is not None
        self.stdout = process.stdout.fileno()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.stdout, selectors.EVENT_READ)

    def until_ready(self) -> None:
        """Wait for the first line, which is written before anything of the program's is run.

        Raises:
            UserError: If it does not come.
        """
        end, seen = time.monotonic() + SETTING_UP, b""
        while seen != b"ready\n":
            piece = self.piece(end, 1)
            if not piece:
                self.kill()
                assert self.process.stderr is not None
                said = self.process.stderr.read(2000).decode(errors="replace").strip().splitlines()
                raise UserError(f"a sandbox could not be set up: {said[-1] if said else 'no answer'}")
            seen += piece

    def piece(self, end: float, most: int) -> bytes | None:
        """The next output; nothing at its end, and None when time is up."""
        if not self.selector.select(max(0.0, end - time.monotonic())):
            return None
        return os.read(self.stdout, most)

    def outcome(self, seconds: float, most: int) -> Outcome:
        """Read until it ends, or until it has used up its seconds or said more than so many bytes."""
        end, output = time.monotonic() + seconds, b""
        while len(output) <= most:
            piece = self.piece(end, 1 << 16)
            if piece is None:
                return Outcome("time", None, output)
            if not piece:
                return self._ended(end, output)
            output += piece
        return Outcome("output", None, output)

    def _ended(self, end: float, output: bytes) -> Outcome:
        try:
            return Outcome("exit", self.process.wait(max(0.0, end - time.monotonic())), output)
        except subprocess.TimeoutExpired:  # it closed its output and went on
            return Outcome("time", None, output)

    def kill(self) -> None:
        """Kill the group; the namespace goes with its first process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Close pipes and delete what it left in the folder of ``none``."""
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if self.folder is not None:
            self.folder.cleanup()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.kill()
        self.close()


@contextlib.contextmanager
def in_memory(content: bytes) -> Iterator[int]:
    """The descriptor of a file that can be read once it is inherited, and not changed."""
    # macOS has no files in memory; nor has it a sandbox.
    made = os.fdopen(os.memfd_create("order", SEALABLE), "w+b") if SEALABLE else tempfile.TemporaryFile()  # noqa: SIM115
    with made as file:
        file.write(content)
        file.seek(0)
        if SEALABLE:
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        yield file.fileno()
