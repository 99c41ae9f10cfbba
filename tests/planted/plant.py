"""Plants each known bug in a copy of the package and sees a test turn red; ``make planted-bugs``.

``python -m tests.planted.plant [--only NAME ...] [--jobs 2]``; exit code 1 if a bug survives.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.planted.bugs import BUGS, Bug, Edit
from tests.planted.wiring import WIRING

ROOT = Path(__file__).parents[2]
ALL = [*BUGS, *WIRING]
COPIED = ("rlhf_lightning", "tests", "configs", "pyproject.toml")
OWN = ("rlhf_lightning", "tests")
# Loaded once and inherited by every run: else most of the time would go into importing them.
HEAVY = (
    "datasets",
    "jsonargparse",
    "lightning.pytorch",
    "torchmetrics",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_utils",
)
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=short", "--capture=fd")
SECONDS = 300
ALL_SECONDS = 3000  # all tests, one after the other
NOT_THE_COPY = 99
FAILED = re.compile(r"^FAILED (\S.*?) - ([\w.]+)", re.MULTILINE)
# A plant that does not run says nothing of the tests.
CLUMSY = ("NameError", "ImportError", "ModuleNotFoundError", "SyntaxError", "AttributeError", "TypeError")


class Outcome(NamedTuple):
    """Whether a test saw it, and which one or why not."""

    caught: bool
    what: str


@dataclass
class Run:
    """Tests of a copy in a process of their own."""

    folder: Path
    tests: list[str]
    bug: Bug | None = None
    limit: float = SECONDS
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Begin."""
        self.log = self.folder.with_suffix(".log")
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(in_the_copy(self.folder, self.tests, self.log))

    def result(self) -> tuple[int, str] | None:
        """Exit code and output; None while it runs. One that takes too long is ended."""
        late = self.seconds > self.limit
        if late:
            os.kill(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, 0 if late else os.WNOHANG)
        return (os.waitstatus_to_exitcode(status), self.log.read_text()) if pid else None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.start


def main(arguments: list[str] | None = None) -> int:
    """Plant the bugs one after the other; a survivor decides the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted.plant", description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="bugs whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tested at the same time")
    options = parser.parse_args(arguments)
    bugs = [bug for bug in ALL if not options.only or any(name in bug.name for name in options.only)]
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in HEAVY:
        import_module(name)
    with tempfile.TemporaryDirectory(prefix="planted-") as scratch:
        copies = [copy_to(Path(scratch, str(number))) for number in range(max(1, options.jobs))]
        tests = sorted({test for bug in bugs for test in bug.tests})
        code, output = finished([Run(copies[0], tests, limit=ALL_SECONDS)])[1]
        if code:
            print(f"without any bug the tests must pass:\n{output[-5000:]}")
            return 1
        print(f"{len(tests)} tests are green without bugs", flush=True)
        caught = plant_all(bugs, copies)
    print(f"{caught} of {len(bugs)} caught")
    return int(caught < len(bugs))


def plant_all(bugs: list[Bug], copies: list[Path]) -> int:
    """Each bug alone, in whichever copy is free; how many were caught."""
    waiting, free, running, caught = list(bugs), list(copies), list[Run](), 0
    while waiting or running:
        while waiting and free:
            bug, folder = waiting.pop(0), free.pop()
            for edit in bug.edits:
                path = source(folder, edit)
                path.write_text(planted(edit, path.read_text()))
            running.append(Run(folder, bug.tests, bug))
        run, (code, output) = finished(running)
        assert run.bug is not None
        for edit in run.bug.edits:
            shutil.copy(source(ROOT, edit), source(run.folder, edit))
        running.remove(run)
        free.append(run.folder)
        outcome = seen(code, output)
        verdict = "caught  " if outcome.caught else "SURVIVED"
        print(f"{verdict} {run.bug.name} ({run.bug.source}), {run.seconds:.0f} s: {outcome.what}", flush=True)
        caught += outcome.caught
    return caught


def finished(runs: list[Run]) -> tuple[Run, tuple[int, str]]:
    """The first of these that ends."""
    while True:
        for run in runs:
            if result := run.result():
                return run, result
        time.sleep(0.05)


def copy_to(folder: Path) -> Path:
    """The package and its tests, without what Python has compiled."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def in_the_copy(folder: Path, tests: list[str], log: Path) -> int:
    """In a process that is ours alone: everything of our own comes from the copy, and is compiled anew."""
    sys.stdout = sys.stderr = log.open("w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    os.environ |= {"PYTHONPATH": str(folder), "COLUMNS": "200", "PYTEST_ADDOPTS": ""}
    sys.dont_write_bytecode = True  # a bug may be as long as what it stands in for, and as old
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, folder))]
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    code = int(pytest.main([*OPTIONS, *tests]))
    sys.stdout.flush()
    package = sys.modules.get("rlhf_lightning")
    return code if package is None or Path(str(package.__file__)).is_relative_to(folder) else NOT_THE_COPY


def source(folder: Path, edit: Edit) -> Path:
    """The file that an edit is made in."""
    return folder / "rlhf_lightning" / edit.file


def planted(edit: Edit, text: str) -> str:
    """The file with the bug.

    Raises:
        ValueError: If the old text does not stand there exactly once.
    """
    if (count := text.count(edit.old)) != 1:
        raise ValueError(f"{edit.file} holds {count} times, and not once: {edit.old!r}")
    return text.replace(edit.old, edit.new)


def seen(code: int, output: str) -> Outcome:
    """Whether a test failed because of the bug, rather than broke."""
    failed = FAILED.search(output)
    if code == 0:
        return Outcome(False, "all tests pass")
    if code == -signal.SIGKILL:
        return Outcome(False, f"no end within {SECONDS} s")
    if code != pytest.ExitCode.TESTS_FAILED or failed is None:
        return Outcome(False, f"no test failed, but the run did ({code}):\n{output[-2000:]}")
    test, error = failed[1].removeprefix("tests/"), failed[2].rpartition(".")[2]
    return Outcome(error not in CLUMSY, f"{error} in {test}")


if __name__ == "__main__":
    sys.exit(main())
