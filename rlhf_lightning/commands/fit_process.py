"""A command in a process of its own, begun just as a person would begin it."""

import os
import signal
import subprocess
import sys

from rlhf_lightning.commands.imports import FLAG, POLICY

IN_PIPELINE = "RLHF_LIGHTNING_PIPELINE"  # set for the stages of a pipeline, which runs the next command itself


def fit_command(arguments: list[str], command: str = "fit") -> list[str]:
    """The command line of a ``fit`` (or another command) with these arguments that may import what this process may."""
    imports = [part for name in POLICY.given for part in (FLAG, name)]
    return [sys.executable, "-m", "rlhf_lightning", command, *arguments, *imports]


def run_fit(command: list[str]) -> int:
    """Run it to its end; if we are asked to end (SIGTERM), that is handed on, for the run knows how to save.

    Returns:
        The exit code: 0 also for a run that was asked to end, which leaves no export.
    """
    run = subprocess.Popen(command, env={**os.environ, IN_PIPELINE: "1"})
    before = signal.signal(signal.SIGTERM, lambda *_: run.terminate())
    try:
        return run.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
