"""A command in a process of its own, begun just as a person would begin it."""

import signal
import subprocess
import sys

from rlhf_lightning.commands.imports import FLAG, POLICY


def fit_command(arguments: list[str], command: str = "fit") -> list[str]:
    """The command line of a ``fit`` (or another command) with these arguments that may import what this process may."""
    imports = [part for name in POLICY.given for part in (FLAG, name)]
    return [sys.executable, "-m", "rlhf_lightning", command, *arguments, *imports]


def run_fit(command: list[str]) -> int:
    """Run it to its end; if we are asked to end (SIGTERM), that is handed on, for the run knows how to save.

    Returns:
        The exit code: 0 also for a run that was asked to end, which leaves no export.
    """
    run = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: run.terminate())
    try:
        return run.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
