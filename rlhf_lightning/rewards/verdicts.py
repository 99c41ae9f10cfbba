"""Whether a program passes its tests, found out where it can't have a say in it."""

import contextlib
import secrets
import socket

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.sandbox import Sandbox


def prints(sandbox: Sandbox, source: str, given: str, due: str) -> bool:
    """Whether a program ends well and prints what is due, blanks at the ends of lines aside."""
    outcome = sandbox.run(source, given)
    printed = outcome.output.decode(errors="replace")
    return (outcome.ended, outcome.code) == ("exit", 0) and _lines(printed) == _lines(due)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def passed_tests(sandbox: Sandbox, source: str, tests: list[str], setup: str = "") -> list[bool]:
    """Which tests a program passes.

    Raises:
        UserError: If no program could pass a test: it is no Python, or imports what is not there.
    """
    token = secrets.token_hex(16)
    mine, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        for end in (mine, theirs):
            stack.enter_context(end)
        order = {"source": source, "channel": theirs.fileno()}
        stack.enter_context(sandbox.start("program", order, share=(theirs.fileno(),)))
        theirs.close()  # so that the tests hear when the program is gone
        order = {"setup": setup, "tests": tests, "token": token, "channel": mine.fileno()}
        tester = stack.enter_context(sandbox.start("tester", order, share=(mine.fileno(),)))
        mine.close()
        said = tester.outcome(sandbox.limits.seconds, sandbox.limits.output).output.decode().splitlines()
    verdicts = [line.removeprefix(f"{token} ") for line in said if line.startswith(f"{token} ")]
    for test, verdict in zip(tests, verdicts, strict=False):
        if verdict.startswith("!"):
            raise UserError(
                f"CodeReward: a test is at fault, not the program: {verdict[2:]}; the test begins {test[:80]!r}"
            )
    return [verdict == "1" for verdict in verdicts] + [False] * (len(tests) - len(verdicts))
