"""The list of planted bugs can't rot: what is replaced stands where it is said to, and every bug is caught."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.planted.bugs import BUGS
from tests.planted.plant import ALL, ROOT, planted, seen, source


@pytest.mark.parametrize("bug", ALL, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted(bug):
    for edit in bug.edits:
        before = source(ROOT, edit).read_text()
        after = planted(edit, before)
        assert after != before
        compile(after, edit.file, "exec")
    for test in bug.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file()
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_names_are_unique():
    assert max(Counter(bug.name for bug in ALL).values()) == 1


def test_a_text_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match="0 times"):
        planted(BUGS[0].edits[0], Path(__file__).read_text())


@pytest.mark.parametrize(
    ("code", "output", "caught", "words"),
    [
        (1, "FAILED tests/a.py::test_b[x-y z] - AssertionError: 1", True, "AssertionError in a.py::test_b[x-y z]"),
        (1, "FAILED tests/a.py::test_b - rlhf_lightning.errors.UserError: no", True, "UserError in"),
        (1, "FAILED tests/a.py::test_b - NameError: name 'x'", False, "NameError in"),
        (1, "ERROR tests/a.py::test_b - ValueError: in a fixture", False, "no test failed"),
        (2, "ERROR tests/a.py - ImportError: while collecting", False, "no test failed"),
        (0, "1 passed", False, "all tests pass"),
        (-9, "", False, "no end"),
    ],
)
def test_only_a_test_that_fails_counts(code, output, caught, words):
    outcome = seen(code, output)
    assert outcome.caught == caught
    assert words in outcome.what


def plant(*options):
    """The command; what it printed."""
    command = [sys.executable, "-m", "tests.planted.plant", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_every_bug_is_caught():
    done = plant("--jobs", "2")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.endswith(f"{len(ALL)} of {len(ALL)} caught\n")
